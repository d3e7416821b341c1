"""learn_format: the loss never rises, levels lie where they err least, and the record is a format like any other."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import ifjax
from ifjax.formats import E3M3, E4M3, UE2M3, Format
from ifjax.formats.hifloat4 import HiFloat4Scale


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def learned(x, **settings):
    """(format, the loss of each round)."""
    losses = []
    fmt = ifjax.learn_format(x, report=lambda i, loss: losses.append((i, loss)), **settings)
    assert [i for i, _ in losses] == list(range(len(losses)))
    return fmt, [loss for _, loss in losses]


def error(x, fmt, **settings):
    return float(np.mean(np.square(np.asarray(ifjax.quantize(x, fmt, **settings).dequantize(), np.float64) - x)))


@pytest.mark.by_default("grids, mirror")
@pytest.mark.parametrize(
    "settings",
    [
        {"grids": 1, "mirror": False}, {"grids": 4, "scale": UE2M3, "prevent_zero": True},
        {"grids": 3, "mirror": False, "bits": 3, "block": 8}, {"grids": 1, "scale": E4M3, "search": "fast"},
        {"zero": False},
    ],
    ids=lambda settings: ", ".join(settings),
)  # fmt: skip
def test_the_loss_never_rises(settings):
    x = normal(8, 256) ** 3  # far from the start
    fmt, losses = learned(x, rounds=12, **settings)
    assert len(losses) > 5 and losses[-1] < 0.95 * losses[0]
    assert all(after <= before for before, after in itertools.pairwise(losses))
    assert (fmt.block, fmt.bits) == (settings.get("block", 16), settings.get("bits", 4))
    assert len(fmt.candidates) == settings.get("grids", 2) * (2 if settings.get("mirror", True) else 1)


@pytest.mark.by_default("None")
@pytest.mark.parametrize("search", [None, "fast"])
def test_the_reported_loss_is_what_quantize_does(search):
    """On the samples themselves; the last round's levels were moved once more, and rounded to float32."""
    x = normal(32, 256, seed=1)
    fmt, losses = learned(x, search=search, grids=1, rounds=20)
    assert 0.98 * losses[-1] < error(x, fmt, search=search) <= losses[-1] * (1 + 1e-6)
    assert error(x, fmt, search=search) < 0.85 * error(x, "if4", search=search)


def test_levels_that_are_in_the_data_are_found():
    """Blocks of eight values times a scale that is a number of the table: nothing is left to err."""
    levels = np.float32([-1, -0.7, -0.5, -0.25, 0, 0.25, 0.6, 0.9])
    rng = np.random.default_rng(2)
    x = levels[rng.integers(0, 8, (512, 16))]
    x[:, 0] = -1  # each block reaches its maximum
    x *= np.float32([0.25, 1, 2, 28])[rng.integers(0, 4, (512, 1))]
    x[0] = x[0] / np.abs(x[0]).max() * 28
    fmt, losses = learned(x, grids=1, mirror=False, bits=3, rounds=60)
    assert losses[-1] < 1e-6
    assert_allclose(np.sort(fmt.grid.values), np.sort(levels), atol=2e-3)


def test_a_mirror_is_an_image_and_zero_is_held():
    fmt, _ = learned(normal(16, 256), grids=2, rounds=5)
    (a, a_mirror, b, b_mirror) = [c.grid for c in fmt.candidates]
    assert a.mirrored() == a_mirror and b.mirrored() == b_mirror and a != b
    assert a.values[8] == b.values[8] == 0 and np.all(np.diff(a.values) > 0)
    free, _ = learned(normal(16, 256) + 3, grids=1, mirror=False, zero=False, rounds=5)
    assert 0 in free.grid.values and free.grid.values[8] != 0


@pytest.mark.slow
def test_samples_are_arrays_of_any_shape_each_with_its_own_amax():
    x, y = normal(40, 32), normal(2, 3, 5, 40, seed=3)
    y[..., 32:] = 100  # is left out
    x, kept = x * np.float32(1024), y[..., :32].reshape(-1, 32)
    assert ifjax.learn_format([x, y], rounds=3) == ifjax.learn_format((x, kept), rounds=3)
    assert ifjax.learn_format([x, x / 1024], rounds=3) != ifjax.learn_format(np.concatenate([x, x / 1024]), rounds=3)
    assert ifjax.learn_format(jnp.asarray(x, jnp.bfloat16), rounds=1).block == 16


def test_blocks_of_zeros_say_nothing():
    x = normal(8, 64)
    padded = np.concatenate([x, np.zeros((8, 64), np.float32)])
    assert ifjax.learn_format(padded, rounds=4) == ifjax.learn_format(x, rounds=4)


@pytest.mark.slow
def test_the_record_works_like_any_other(tmp_path, monkeypatch):
    x = normal(8, 64)
    fmt = ifjax.learn_format(x, name="ours", grids=2, rounds=3)
    assert Format.from_dict(json.loads(json.dumps(fmt.to_dict()))) == fmt and fmt.bits_per_value == 4.5
    q = jax.jit(lambda x: ifjax.quantize(x, fmt))(x)
    loaded = ifjax.load_file(ifjax.save_file({"w": q}, tmp_path / "m.safetensors"))["w"]
    assert loaded.fmt == fmt
    assert_array_equal(loaded.dequantize(), q.dequantize())
    y = ifjax.einsum("ij,kj->ik", x, q)
    assert_allclose(y, x @ np.asarray(q.dequantize()).T, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(ifjax.FORMATS, "_records", dict(ifjax.FORMATS))
    ifjax.FORMATS.register(fmt)
    packed, _ = ifjax.quantize_params({"w": {"kernel": x.T}}, [ifjax.Rule(".*kernel", "ours", axis=-2)])
    assert packed["w"]["kernel"].fmt is fmt


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"scale": HiFloat4Scale()}, TypeError, "needs a TableScale.* got HiFloat4Scale"),
        ({"grids": 0}, ValueError, "grids >= 1, got 0"),
        ({"rounds": True}, ValueError, "rounds >= 1, got True"),
        ({"bits": 1}, ValueError, "bits >= 2, got 1"),
        ({"grids": 3}, ValueError, "6 different decodings do not fit the 2 free bits .* at most 4"),
        ({"search": "exhaustive"}, ValueError, "offsets only, such as 'fast', got 'exhaustive'"),
        ({"search": "least_squares"}, ValueError, "offsets only"),
        ({"samples": np.ones((4, 8), np.float32)}, ValueError, "at least one block of 16 values"),
        ({"samples": []}, ValueError, "at least one block"),
        ({"samples": np.zeros((4, 16), np.float32)}, ValueError, "at least one block"),
        ({"samples": np.float32([[np.nan] * 16])}, ValueError, "finite samples"),
        ({"samples": np.zeros((4, 64), np.float32)}, ValueError, "not all zero"),
        ({"samples": np.ones((4, 16), np.int32)}, TypeError, "must be a float array"),
    ],
)
def test_bad_arguments_are_refused(arguments, kind, message):
    with pytest.raises(kind, match=message):
        ifjax.learn_format(**{"samples": normal(4, 32), "scale": E3M3, **arguments})
