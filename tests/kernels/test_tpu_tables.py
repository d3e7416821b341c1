"""The TPU kernel by tables of sixteen values, interpreted: every code under every byte, and what products take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import ifjax
from ifjax.products.backends import decoding_of
from pallas_kernels import tpu_matmul
from pallas_kernels.decoding import TableDecoding
from pallas_kernels.tpu_matmul import UNIT_K, Tiles, matmul, pack, reference, supports

BY_TABLE = ("quad", "split87", "nf4", "nf4_mirror", "octet", "sfp4", "razer", "razer_act", "nvfp4_ue5m3")


def test_formats_with_other_grids_or_scales_go_by_tables():
    for name in BY_TABLE:
        decoding = decoding_of(ifjax.get_format(name))
        assert isinstance(decoding, TableDecoding), name
        assert supports(decoding, jnp.bfloat16, 8) is None
    assert decoding_of(ifjax.get_format("hifloat4")) is None
    assert not isinstance(decoding_of(ifjax.get_format("if4")), TableDecoding)


def product(x, nibbles, scales, decoding, out_dtype="float32"):
    n, k = nibbles.shape
    words, packed = pack(jnp.asarray(nibbles), jnp.asarray(scales), decoding)
    tiles = Tiles(m=-(-len(x) // 16) * 16, n=256, k=UNIT_K)
    return matmul(x, words, packed, jnp.float32(1), n=n, k=k, decoding=decoding, out_dtype=out_dtype, tiles=tiles,
                  interpret=True)  # fmt: skip


@pytest.mark.by_default("split87-float32-float32")
@pytest.mark.parametrize(("dtype", "arithmetic"), [("bfloat16",) * 2, ("bfloat16", "float32"), ("float32",) * 2])
@pytest.mark.parametrize("name", ["quad", "split87", "nf4", "octet", "nvfp4_ue5m3"])
def test_every_code_with_every_byte_is_the_formula_rounded_once(monkeypatch, name, dtype, arithmetic):
    """x is the identity, so that the product shows each weight alone; only a NaN spreads, over its row of W."""
    monkeypatch.setattr(tpu_matmul, "_arithmetic", lambda _: jnp.dtype(arithmetic))
    fmt = ifjax.get_format(name)
    decoding, k = decoding_of(fmt), UNIT_K
    nibbles = np.tile(np.arange(k).astype(np.uint8) % 16, (256, 1))
    scales = np.tile(np.arange(256, dtype=np.uint8)[:, None], (1, k // 16))
    got = np.asarray(product(jnp.eye(k, dtype=dtype), nibbles, scales, decoding)).T
    selector, payload = fmt.split(jnp.arange(256))
    rows = np.array([[d.grid.values[code] for code in range(16)] for d in fmt.decodings], np.float32)
    selector = np.broadcast_to(selector, 256)
    wanted = rows[np.minimum(selector, len(rows) - 1)] * np.asarray(fmt.scale.decode(payload))[:, None]
    wanted = np.tile(wanted.astype(dtype).astype(np.float32), (1, k // 16))
    wanted[np.isnan(wanted).any(1)] = np.nan
    assert_array_equal(got, wanted)
    assert np.isnan(wanted).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quad", "razer", "sfp4", "mixfp4"])
def test_products_of_quantized_weights_are_those_of_their_values(name):
    """Ragged shapes, the codes as the format has them, and the kernel's own reference."""
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((5, 160), (40, 160)))
    q = ifjax.quantize(w, name)
    packed = ifjax.prepack(q, "TPU v6e")
    assert_array_equal(packed.unpack().codes, q.codes)
    decoding, factor = decoding_of(q.fmt), q.amax / q.fmt.tensor_constant()
    y = matmul(x, packed.words, packed.scales, factor, n=40, k=160, decoding=decoding, out_dtype="float32",
               interpret=True)  # fmt: skip
    assert_allclose(y, x @ q.dequantize().T, rtol=2e-5, atol=2e-4)
    assert_allclose(reference(x, q.unpacked_codes(), q.scales, factor, decoding), y, rtol=2e-5, atol=2e-4)
    way = ifjax.explain_matmul(x, q, (((1,), (1,)), ((), ())), target="TPU v6e")
    assert way.path == "tpu"


def test_what_a_kernel_cannot_hold_is_refused():
    with pytest.raises(ValueError, match=r"hopper cannot hold .*scales of at most E4M3"):
        ifjax.prepack(ifjax.quantize(jnp.ones((64, 64)), "nvfp4_ue5m3"), "H200")
    with pytest.raises(ValueError, match="sixteen finite values"):
        TableDecoding(((1.0,) * 8,), 4, 3, 7, 127, 16)
    with pytest.raises(ValueError, match="4 modes beside a scale of 7 bits"):
        TableDecoding(((1.0,) * 16,) * 4, 4, 3, 7, 127, 16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_lowers_for_a_tpu_where_there_is_none(dtype):
    decoding = decoding_of(ifjax.get_format("quad"))
    words, scales = jax.eval_shape(
        lambda a, b: pack(a, b, decoding),
        *(jax.ShapeDtypeStruct(shape, jnp.uint8) for shape in ((512, 512), (512, 32))),
    )
    arguments = jax.ShapeDtypeStruct((16, 512), dtype), words, scales, jax.ShapeDtypeStruct((), jnp.float32)
    run = jax.jit(lambda *a: matmul(*a, n=512, k=512, decoding=decoding, out_dtype=dtype))
    assert "tpu_custom_call" in run.trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
