"""A multiple-choice knapsack: one option for each item, with the least total loss within a budget.

It works on plain numbers; `plan` defines the items, costs and losses.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

DP_UNITS = 4096


class Choice(NamedTuple):
    """One option for every item.

    Attributes:
        choices: index of each item's option.
        loss: sum of the options' losses.
        cost: sum of the options' costs.
    """

    choices: tuple[int, ...]
    loss: float
    cost: float


def choose(costs: ArrayLike, losses: ArrayLike, budget: float, *, exact: bool = True) -> Choice:
    """Return the choice of least loss that was found within the budget.

    It is the best of the greedy choice, of each option for all items, and if `exact` of the dynamic program.

    Args:
        costs: [items, options], positive and finite.
        losses: [items, options], finite and >= 0.
        budget: upper bound of the sum of costs.

    Raises:
        ValueError: the cheapest options exceed the budget.
    """
    costs, losses = _checked(costs, losses, budget)
    items, options = costs.shape
    found = [greedy(costs, losses, budget)[0]]
    found += [_choice(costs, losses, [option] * items) for option in range(options)]
    if exact:
        found.append(_choice(costs, losses, by_dynamic_program(costs, losses, budget)))
    return min((c for c in found if c.cost <= budget), key=lambda c: (c.loss, c.cost))


def greedy(costs: ArrayLike, losses: ArrayLike, budget: float) -> tuple[Choice, float]:
    """Return the greedy choice and a lower bound of the loss of any choice within the budget (the relaxed problem's).

    Every item starts with its cheapest option. The steps along all items' lower convex hulls are taken in the order of
    their gain per unit of cost (ties: the earlier item, then the earlier step). A step that does not fit closes its
    item.

    Raises:
        ValueError: the cheapest options exceed the budget.
    """
    costs, losses = _checked(costs, losses, budget)
    hulls = [_hull(c, e) for c, e in zip(costs, losses, strict=True)]
    choices, steps = [hull[0] for hull in hulls], []
    for item, hull in enumerate(hulls):
        for k, (a, b) in enumerate(itertools.pairwise(hull)):
            gain, more = losses[item, a] - losses[item, b], costs[item, b] - costs[item, a]
            steps.append((-gain / more, item, k, b, gain, more))
    left = budget - sum(costs[item, option] for item, option in enumerate(choices))
    bound = sum(losses[item, option] for item, option in enumerate(choices))
    closed, relaxed = set(), True
    for _, item, _, option, gain, more in sorted(steps):
        if relaxed:
            bound -= gain * min(1.0, left / more)
        if item in closed:
            continue
        if more <= left:
            choices[item], left = option, left - more
        else:
            closed.add(item)
            relaxed = False
    return _choice(costs, losses, choices), float(bound)


def by_dynamic_program(costs: ArrayLike, losses: ArrayLike, budget: float) -> tuple[int, ...]:
    """Return the best choice for costs rounded up to multiples of budget / 4096, exact if all costs are such multiples.

    If no choice fits after rounding up, return the cheapest one.
    """
    costs, losses = _checked(costs, losses, budget)
    items, options = costs.shape
    # The tolerance keeps a cost that is a multiple of the unit, up to float rounding, from being rounded up.
    units = np.ceil(costs / (budget / DP_UNITS) - 1e-9).astype(np.int64)
    best = np.zeros(DP_UNITS + 1)  # least loss of the items so far, for each budget in units
    taken = np.zeros((items, DP_UNITS + 1), np.int64)
    for item in range(items):
        offers = np.full((options, DP_UNITS + 1), np.inf)
        for option, n in enumerate(units[item]):
            if n <= DP_UNITS:
                offers[option, n:] = best[: DP_UNITS + 1 - n] + losses[item, option]
        # Among options of equal loss, argmin then takes the cheapest.
        order = np.argsort(units[item], kind="stable")
        taken[item] = order[offers[order].argmin(0)]
        best = offers.min(0)
    if not math.isfinite(best[-1]):
        return tuple(int(i) for i in costs.argmin(1))
    choices, left = [0] * items, DP_UNITS
    for item in reversed(range(items)):
        choices[item] = int(taken[item, left])
        left -= int(units[item, choices[item]])
    return tuple(choices)


def _checked(costs: ArrayLike, losses: ArrayLike, budget: float) -> tuple[np.ndarray, np.ndarray]:
    costs, losses = np.asarray(costs, np.float64), np.asarray(losses, np.float64)
    if costs.ndim != 2 or costs.shape != losses.shape or 0 in costs.shape:
        raise ValueError(f"costs and losses must be [items, options], got {costs.shape} and {losses.shape}")
    if not (np.all(costs > 0) and np.all(np.isfinite(costs)) and np.all(losses >= 0) and np.all(np.isfinite(losses))):
        raise ValueError("costs must be positive, losses not negative, and both finite")
    least = costs.min(1).sum()
    if least > budget:
        raise ValueError(f"the budget of {budget:,.0f} bits is below {least:,.0f}, what the cheapest formats take")
    return costs, losses


def _choice(costs, losses, choices: Sequence[int]) -> Choice:
    at = np.arange(len(choices)), np.asarray(choices)
    return Choice(tuple(int(c) for c in choices), float(losses[at].sum()), float(costs[at].sum()))


def _hull(costs, losses) -> list[int]:
    """Return the options on the lower convex hull of loss over cost, in order of rising cost and falling loss."""
    hull: list[int] = []
    for option in sorted(range(len(costs)), key=lambda i: (costs[i], losses[i])):
        if hull and losses[option] >= losses[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            steep = (losses[a] - losses[b]) * (costs[option] - costs[b])
            if steep > (losses[b] - losses[option]) * (costs[b] - costs[a]):
                break
            hull.pop()
        hull.append(option)
    return hull
