"""The choice under a budget: published instances, brute force, the bound, and what must never happen."""

import itertools

import numpy as np
import pytest

from ifjax.models.budget import DP_UNITS, by_dynamic_program, choose, greedy


def instance(seed, items=5, options=4):
    """As formats are: more bits, less loss, and costs that the dynamic program's unit divides."""
    rng = np.random.default_rng(seed)
    values, bits = rng.integers(1, 30, items), np.sort(rng.choice(np.arange(3, 17), options, replace=False))
    losses = -np.sort(-rng.exponential(size=(items, options)), axis=1)
    return np.outer(values, bits).astype(float), losses


def brute(costs, losses, budget):
    items, options = costs.shape
    best = min(
        (sum(losses[i, c] for i, c in enumerate(choice)), sum(costs[i, c] for i, c in enumerate(choice)), choice)
        for choice in itertools.product(range(options), repeat=items)
        if sum(costs[i, c] for i, c in enumerate(choice)) <= budget
    )
    return best[2]


def test_published_instances(golden_dir):
    with np.load(golden_dir / "frontier_budget.npz") as data:
        for n, loss, budget, walked, exact, bound in zip(
            *(data[name] for name in ("n", "loss", "budget", "greedy", "exact", "lp_bound")), strict=True
        ):
            costs = np.outer(n, data["bits"])
            found, lowest = greedy(costs, loss, budget)
            assert found.choices == tuple(walked)
            np.testing.assert_allclose(lowest, bound, rtol=1e-12)
            wanted = loss[np.arange(6), exact].sum()
            chosen = choose(costs, loss, budget)
            assert chosen.cost <= budget and wanted <= chosen.loss * (1 + 1e-12)
            # Costs are rounded up to 1/4096 of the budget, so that a choice at its very edge may be missed.
            assert chosen.choices == tuple(exact) or costs[np.arange(6), exact].sum() > budget * (1 - 6 / DP_UNITS)


@pytest.mark.parametrize("seed", range(8))
def test_the_dynamic_program_is_exact_where_its_unit_divides_the_costs(seed):
    costs, losses = instance(seed)
    low, high = costs.min(1).sum(), costs.max(1).sum()
    scaled = np.floor(costs * DP_UNITS / (low + 0.4 * (high - low)))  # the unit is 1
    scaled_budget = float(DP_UNITS)
    wanted = brute(scaled, losses, scaled_budget)
    got = by_dynamic_program(scaled, losses, scaled_budget)
    assert losses[np.arange(5), list(got)].sum() == pytest.approx(losses[np.arange(5), list(wanted)].sum(), rel=1e-12)


@pytest.mark.by_default("20")
@pytest.mark.parametrize("items", [3, 20, 200])
def test_never_over_budget_below_the_bound_or_worse_than_one_format_for_all(items):
    for seed in range(20):
        costs, losses = instance(seed, items)
        for option in range(4):
            budget = costs[:, option].sum()
            walked, bound = greedy(costs, losses, budget)
            chosen = choose(costs, losses, budget)
            assert max(walked.cost, chosen.cost) <= budget
            assert bound <= chosen.loss + 1e-9 and chosen.loss <= walked.loss
            assert chosen.loss <= losses[:, option].sum() + 1e-12


def test_refusals():
    with pytest.raises(ValueError, match="below 8, what the cheapest"):
        choose([[4, 8], [4, 8]], [[1, 0], [1, 0]], 7)
    with pytest.raises(ValueError, match="finite"):
        choose([[4, 8]], [[float("nan"), 0]], 9)
    with pytest.raises(ValueError, match="items, options"):
        choose([4, 8], [1, 0], 9)
