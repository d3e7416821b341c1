"""evaluate: figures by hand, error bars that hold, and what is refused."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samples import normal

import ifjax


def model(params, x):
    return x @ params


def data(rows=12, tokens=5, classes=8):
    x = normal(rows, tokens, 16)
    w = normal(16, classes, seed=1)
    targets = jax.random.categorical(jax.random.key(2), model(w, x)).astype(jnp.int32)
    return w, x, targets.at[0, :2].set(-1)


def test_figures_are_those_worked_out_by_hand(capsys):
    w, x, targets = data()
    noisy = w + 0.1 * normal(*w.shape, seed=3)
    fns = [functools.partial(model, p) for p in (w, noisy)]
    found = ifjax.evaluate(*fns, [(x[:7], targets[:7]), (x[7:], targets[7:])], progress=True)
    p, q = (np.asarray(jax.nn.log_softmax(f(x)), np.float64) for f in fns)
    kept = np.asarray(targets) >= 0
    nll = [-np.take_along_axis(a, np.maximum(targets, 0)[..., None], -1)[..., 0] for a in (p, q)]
    assert (found.rows, found.tokens) == (12, 58)
    assert found.loss.mean == pytest.approx(nll[0][kept].mean(), rel=1e-5)
    assert found.packed_loss.mean == pytest.approx(nll[1][kept].mean(), rel=1e-5)
    assert found.packed_perplexity.mean == pytest.approx(math.exp(nll[1][kept].mean()), rel=1e-5)
    assert found.divergence.mean == pytest.approx((np.exp(p) * (p - q)).sum(-1)[kept].mean(), rel=1e-4)
    assert found.agreement.mean == pytest.approx((p.argmax(-1) == q.argmax(-1))[kept].mean())
    assert found.difference.mean == pytest.approx(found.packed_loss.mean - found.loss.mean, rel=1e-5)
    assert found.difference.error < found.loss.error  # pairs
    json.dumps(found.to_dict())
    text = str(found)
    assert "perplexity" in text and "±" in text and "12 rows, 58 tokens" in text
    assert capsys.readouterr().out == ""


def test_error_bars_are_the_spread_of_repeated_measurements():
    w, _, _ = data()
    noisy = w + 0.3 * normal(*w.shape, seed=3)
    means, errors = [], []
    for seed in range(40):
        x = normal(30, 4, 16, seed=seed) * (1.0 + jnp.arange(30.0) % 3)[:, None, None]
        found = ifjax.evaluate(functools.partial(model, w), functools.partial(model, noisy), [(x, None)])
        means.append(found.divergence.mean)
        errors.append(found.divergence.error)
    assert 0.75 < np.mean(errors) / np.std(means) < 1.33
    assert found.loss is None and found.perplexity is None and found.tokens == 120


def test_a_loss_of_ones_own():
    w, x, _ = data()
    fns = [functools.partial(model, p) for p in (w, 1.1 * w)]
    square = lambda y, wanted: (y - wanted) ** 2  # noqa: E731
    found = ifjax.evaluate(*fns, [(x, model(w, x))], loss=square, logits=False)
    assert found.loss.mean == 0 and found.perplexity is None and found.agreement is None
    assert found.packed_loss.mean == pytest.approx(float((0.1 * model(w, x)).astype(jnp.float32).var()), rel=0.05)
    assert "perplexity" not in str(found)


def test_batches_without_rows_count_nothing():
    w, x, targets = data()
    fns = [functools.partial(model, p) for p in (w, 1.1 * w)]
    assert ifjax.evaluate(*fns, [(x[:0], targets[:0]), (x, targets)]) == ifjax.evaluate(*fns, [(x, targets)])


def test_refusals():
    w, x, targets = data()
    fn = functools.partial(model, w)
    for batches, match in [
        ([], "no batch"), ([(x[:0], targets[:0])], "no batch with a row"),
        ([(x, targets), (x, None)], "all or none"), ([(x, targets[:, :2])], "targets must be"),
        ([(x, jnp.full_like(targets, -1))], "all targets are negative"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=match):
            ifjax.evaluate(fn, fn, batches)
    with pytest.raises(ValueError, match="of one shape"):
        ifjax.evaluate(fn, lambda x: fn(x)[:, :2], [(x, targets)])
    with pytest.raises(ValueError, match="nothing to measure"):
        ifjax.evaluate(fn, fn, [(x, None)], logits=False)
