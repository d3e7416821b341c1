"""Every named format does what if4 does, or refuses it by a message that names what it lacks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from numpy.testing import assert_array_equal
from samples import normal
from test_sharding import assert_same

import ifjax
from ifjax import cli, plots

pytestmark = pytest.mark.slow


@pytest.fixture(params=ifjax.FORMATS)
def fmt(request):
    return ifjax.get_format(request.param)


@pytest.fixture
def x(fmt):
    """Two matrices whose rows end within a block."""
    return normal(2, 3, 2 * fmt.block + 3)


def test_values_are_the_same_along_other_axes_and_under_transformations(fmt, x):
    whole = jax.jit(lambda x: ifjax.quantize(x, fmt, amax_axes=(0,) * fmt.has_tensor_scale))
    q = whole(x)
    values = np.asarray(q.dequantize())
    assert q.dtype == x.dtype and np.square(values - x).sum() < 0.1 * np.square(x).sum()  # mxfp3: .068
    first = ifjax.quantize(np.moveaxis(x, -1, 0), fmt, axis=0, amax_axes=(1,) * fmt.has_tensor_scale)
    assert_array_equal(np.moveaxis(np.asarray(first.dequantize()), 0, -1), values)
    faked, pull = jax.vjp(jax.vmap(lambda x: ifjax.fake_quantize(x, fmt)), x)
    assert_array_equal(faked, values)
    assert_array_equal(pull(faked)[0], values)
    mesh = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    assert_same(whole(jax.device_put(x, NamedSharding(mesh, PartitionSpec("a")))), q)


def test_noise_rounds_to_a_neighbour_and_squares_are_shared_or_refused(fmt, x):
    key = jax.random.key(0)
    q = ifjax.quantize(x, fmt, rounding="stochastic", key=key)
    step = np.abs(np.asarray(q.dequantize()) - x).max()
    assert 0 < step < 4 * np.abs(ifjax.quantize(x, fmt).dequantize() - x).max()
    square = normal(2 * fmt.block, fmt.block + 1)
    if fmt.scale.runs:
        with pytest.raises(ValueError, match=f"{fmt.name} scales parts of a block, which squares cannot share"):
            ifjax.quantize(square, fmt, block_2d=True)
        return
    turned = ifjax.quantize(square.T, fmt, block_2d=True)
    assert_array_equal(turned.dequantize(), np.asarray(ifjax.quantize(square, fmt, block_2d=True).dequantize()).T)


def test_products_rules_reports_and_files_take_it(fmt, x, tmp_path):
    w, rows = normal(5, 2 * fmt.block), normal(3, 2 * fmt.block, seed=1)
    q = ifjax.quantize(w, fmt)
    values = np.asarray(q.dequantize())
    y, pull = jax.vjp(lambda rows: ifjax.einsum("mk,nk->mn", rows, q), rows)
    np.testing.assert_allclose(y, rows @ values.T, rtol=1e-5, atol=1e-5)
    sums = np.broadcast_to(values.sum(0), rows.shape)
    np.testing.assert_allclose(pull(np.ones_like(y))[0], sums, rtol=1e-4, atol=1e-4)
    packed, report = ifjax.quantize_params({"w": jnp.asarray(w)}, ifjax.Rule(".*", fmt.name, axis=-1))
    assert_same(packed["w"], q)
    (entry,) = report.check().quantized
    assert (entry.fmt, entry.bits_per_value) == (fmt.name, q.bits_per_value)
    by_hand = np.asarray(ifjax.quantize(rows, fmt).dequantize())
    both = ifjax.quantized(lambda p, x: x @ p["w"].T, ifjax.Rule(".*", fmt.name, act_fmt=fmt.name))(packed, rows)
    np.testing.assert_allclose(both, by_hand @ values.T, rtol=1e-5, atol=1e-5)
    path = ifjax.save_file({"w": q}, tmp_path / "w.safetensors")
    assert_same(ifjax.load_file(path)["w"], q)


def test_figures_and_the_command_show_it(fmt, x, tmp_path, capsys):
    for figure in (plots.plot_grid(fmt), plots.plot_block(x[0, 0, : fmt.block], fmt),
                   plots.plot_bytes(ifjax.quantize(x[0, 0], fmt))):  # fmt: skip
        assert figure.axes
    path = ifjax.save_file({"w": x[0]}, tmp_path / "w.safetensors")
    assert cli.main(["compare", str(path), "--formats", fmt.name]) == 0
    assert fmt.name in capsys.readouterr().out
