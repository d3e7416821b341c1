"""The Hopper matmul without a GPU: its decoding instruction by instruction, its layout, and the kernel interpreted.

The kernel runs in a process of its own: the interpreter gives each warpgroup a thread, and these wait for each other,
so jax needs more threads than a small machine has processors, and wants to know when it is imported.
"""

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import autotune, gpu_matmul, tiles
from pallas_kernels.decoding import Decoding
from pallas_kernels.tiles import Entry, Tiles

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
INT4 = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)
DECODINGS = {
    "if4": Decoding((E2M1, INT4), (7, 6), "e4m3", 16),
    "nvfp4": Decoding((E2M1,), (1,), "e4m3", 16),
    "nvint4": Decoding((INT4,), (1,), "e4m3", 16),
    "two steps": Decoding((E2M1, E2M1), (3, 2), "e4m3", 16),
    "fine": Decoding(((0.0, 0.125, 0.25, 0.4375, 1.0, 1.25, 5.0, 12.0),), (5,), "e4m3", 16),
}
E8M0 = dataclasses.replace(DECODINGS["nvfp4"], scale="e8m0", block=32)

each_decoding = pytest.mark.parametrize("decoding", DECODINGS.values(), ids=DECODINGS)
each_dtype = pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["float16", "bfloat16"])


def weights(nibbles, scales, decoding: Decoding) -> np.ndarray:
    """The formula of `Decoding` in float64."""
    scales = np.repeat(scales, decoding.block, -1)[:, : nibbles.shape[1]]
    two = len(decoding.magnitudes) == 2
    mode = scales >> 7 if two else np.zeros_like(scales)
    exponent, mantissa = (scales >> 3 & 15).astype(int), (scales & 7).astype(float)
    scale = np.where(exponent > 0, np.ldexp(8 + mantissa, exponent - 10), np.ldexp(mantissa, -9))
    scale = np.where(scales & 127 == 127, np.nan, scale)
    magnitude = np.array(decoding.magnitudes)[mode, nibbles & 7] * np.array(decoding.multipliers)[mode]
    sign = np.where(nibbles & 8, -1, 1) * np.where((scales >> 7 == 1) & (not two), -1, 1)
    return sign * magnitude * scale


def random_weights(n, k, seed=0):
    """Nibbles [n, k] and scale bytes [n, k / 16], none of which is NaN."""
    rng = np.random.default_rng(seed)
    scales = rng.integers(0, 256, (n, -(-k // 16)), dtype=np.uint8)
    return rng.integers(0, 16, (n, k), dtype=np.uint8), np.where(scales & 127 == 127, scales ^ 1, scales)


# The decoding, instruction by instruction.


def emulate(dtype):
    """`emit` of a lane that computes: PTX instructions on numpy arrays of uint32, as the PTX manual defines them."""

    def prmt(a, b, selector):
        pool = [(r >> np.uint32(8 * i)) & np.uint32(255) for r in (a, b) for i in range(4)]
        result = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)
        for i in range(4):
            nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
            byte = np.choose(nibble & 7, np.broadcast_arrays(*pool, result)[:8])
            byte = np.where(nibble > 7, np.where(byte > 127, np.uint32(255), np.uint32(0)), byte)
            result |= byte << np.uint32(8 * i)
        return result

    def lop3(a, b, c, table):
        result = np.uint32(0)
        for i in range(8):
            if int(table) >> i & 1:
                result = result | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return result

    def pairwise(compute):
        def run(*registers):
            halves = []
            for shift in (0, 16):
                values = [(r >> np.uint32(shift)).astype(np.uint16).view(dtype).astype(np.float64) for r in registers]
                with np.errstate(over="ignore", invalid="ignore"):
                    halves.append(compute(*values).astype(dtype).view(np.uint16).astype(np.uint32))
            return halves[0] | halves[1] << np.uint32(16)

        return run

    kind = "f16x2" if dtype == jnp.float16 else "bf16x2"
    instructions = {
        "mov.b32": lambda a: a,
        "and.b32": np.bitwise_and,
        "shr.u32": np.right_shift,
        "shl.b32": np.left_shift,
        "prmt.b32": prmt,
        "lop3.b32": lop3,
        f"mul.rn.{kind}": pairwise(np.multiply),
        f"fma.rn.{kind}": pairwise(lambda a, b, c: a * b + c),
    }

    def emit(instruction, *operands):
        return instructions[instruction](*(np.asarray(operand, np.uint32) for operand in operands))

    return emit


def decode_unit(words, scale_words, decoding, dtype) -> np.ndarray:
    """A unit [64, 128] as its 128 lanes decode it, each weight where wgmma's lane has it and x's order puts it."""
    unit = np.empty((64, 128), dtype)
    lane = np.arange(128)
    row, quarter = lane // 32 * 16 + lane % 32 // 4, lane % 4
    for group in range(2):
        own = np.asarray(words).view(np.uint32).reshape(2, 128, 2, 2)[group]
        own = [[own[:, h, half] for half in range(2)] for h in range(2)]
        scale = np.asarray(scale_words).view(np.uint32)
        pairs = gpu_matmul.decode_lane(emulate(dtype), own, scale, group, decoding, dtype)
        for j, h, b in itertools.product(range(8), range(2), range(2)):
            weight = (pairs[j][h] >> np.uint32(16 * b)).astype(np.uint16).view(dtype)
            unit[row + 8 * h, 64 * group + 16 * quarter + 2 * j + b] = weight
    return unit


@each_dtype
@each_decoding
def test_every_code_with_every_scale_byte_is_decoded(decoding, dtype):
    """In float16 exactly, in bfloat16 rounded once; NaN bytes make NaN of all 16 codes."""
    scales = np.arange(8 * 256, dtype=np.uint32).astype(np.uint8).reshape(128, 16)
    nibbles = (np.arange(16) + np.arange(8 * 256)[:, None] // 256 * 3) % 16  # all codes in each block, in eight orders
    nibbles = nibbles.astype(np.uint8).reshape(128, 256)
    words, scale_words = gpu_matmul.pack(jnp.asarray(nibbles), jnp.asarray(scales), decoding)
    decoded = np.block([[decode_unit(words[i, j], scale_words[i, j], decoding, dtype) for j in (0, 1)] for i in (0, 1)])
    wanted = weights(nibbles, scales, decoding)
    if dtype == jnp.float16:
        np.testing.assert_array_equal(decoded.astype(np.float64), wanted)
    np.testing.assert_array_equal(decoded.astype(np.float64), wanted.astype(dtype).astype(np.float64))
    assert np.isnan(decoded).sum() == 8 * 2 * 16


@each_decoding
def test_the_reference_is_the_formula(decoding):
    nibbles, scales = random_weights(24, 64)
    x = jnp.eye(64, dtype=jnp.float16)
    found = gpu_matmul.reference(x, jnp.asarray(nibbles), jnp.asarray(scales), jnp.float32(0.5), decoding)
    np.testing.assert_array_equal(found, weights(nibbles, scales, decoding).T / 2)


# The layout.


@pytest.mark.by_default("1-16", "129-272")
@pytest.mark.parametrize("n, k", [(1, 16), (64, 128), (100, 300), (128, 256), (129, 272), (300, 512)])
def test_unpack_is_the_inverse_of_pack(n, k):
    decoding = DECODINGS["if4"]
    rng = np.random.default_rng(n)
    nibbles, scales = rng.integers(0, 16, (n, k), np.uint8), rng.integers(0, 256, (n, -(-k // 16)), np.uint8)
    words, scale_words = jax.jit(gpu_matmul.pack, static_argnums=2)(nibbles, scales, decoding)
    high, wide = tiles.padded(n, k)
    assert high % 128 == wide % 256 == 0 and high - n < 128 and wide - k < 256
    assert words.dtype == scale_words.dtype == jnp.int32
    assert 8 * (words.nbytes + scale_words.nbytes) == 4.5 * high * wide
    found = jax.jit(gpu_matmul.unpack, static_argnums=(2, 3, 4))(words, scale_words, n, k, decoding)
    np.testing.assert_array_equal(found[0], nibbles)
    np.testing.assert_array_equal(found[1], scales)
    # All of the padding is zero.
    whole, bytes_ = gpu_matmul.unpack(words, scale_words, high, wide, decoding)
    assert int(whole.astype(jnp.int32).sum()) == int(nibbles.sum(dtype=int))
    assert int(bytes_.astype(jnp.int32).sum()) == int(scales.sum(dtype=int))


# The kernel, interpreted.

CASES = {
    # decoding, dtype, result, M, N, K, tiles: ragged in all three, several tiles a block, each way to share the work
    "one warpgroup": ("if4", "float16", "float32", 5, 100, 297, Tiles(8, stages=2, blocks=1)),
    "two share K": ("if4", "float16", "float16", 13, 40, 1000, Tiles(8, k_warpgroups=2, stages=2, blocks=1)),
    "two share N": ("if4", "bfloat16", "float32", 20, 200, 272, Tiles(16, n_warpgroups=2, stages=3, blocks=2, band=1)),
    "two units": ("nvfp4", "float16", "bfloat16", 70, 128, 512, Tiles(72, k_units=2, stages=2)),
    "a cluster": ("if4", "float16", "float32", 9, 250, 256, Tiles(8, stages=2, blocks=2, cluster=2)),
    "bands": ("nvint4", "bfloat16", "float32", 40, 60, 256, Tiles(8, n_warpgroups=1, stages=2, blocks=1, band=3)),
}
SLOW_CASES = {
    "four share K": ("fine", "float16", "float32", 9, 130, 1536, Tiles(8, k_warpgroups=4, stages=2, blocks=2)),
    "two by two": ("two steps", "bfloat16", "bfloat16", 33, 130, 512, Tiles(16, 2, 2, stages=2, blocks=2)),
    "wide": ("if4", "float16", "float16", 300, 128, 256, Tiles(256, 2, stages=3, blocks=1)),
    "one row": ("nvfp4", "bfloat16", "float32", 1, 8, 16, Tiles(8, stages=4, blocks=132)),
}

# On a GPU also with the tiles of the table, of which the interpreter would take long.
GPU_CASES = {
    "table, 1 row": ("if4", "bfloat16", "bfloat16", 1, 4096, 4096, None),
    "table, 7 rows": ("nvfp4", "float16", "float32", 7, 1000, 4096, None),
    "table, 13 rows": ("if4", "float16", "float16", 13, 520, 2048, None),
    "table, 64 rows": ("if4", "bfloat16", "float32", 64, 1024, 1024, None),
    "table, 203 rows": ("nvint4", "float16", "bfloat16", 203, 1000, 1000, None),
    "table, 1030 rows": ("if4", "float16", "float16", 1030, 4096, 512, None),
    "few rows, high tiles": ("if4", "float16", "float32", 5, 512, 512, Tiles(256, 2, stages=2)),
}
ALL_CASES = CASES | SLOW_CASES | GPU_CASES
KNOWS_CLUSTERS = hasattr(plgpu, "InterpretGPUParams")


def operands(case):
    name, dtype, _, m, n, k, _ = ALL_CASES[case]
    nibbles, scales = random_weights(n, k, seed=m)
    x = np.random.default_rng(n).standard_normal((m, k)).astype(dtype)
    return x, nibbles, scales, DECODINGS[name]


def run(case, how):
    _, _, result, _, n, _, cut = ALL_CASES[case]
    x, nibbles, scales, decoding = operands(case)
    packed = gpu_matmul.pack(jnp.asarray(nibbles), jnp.asarray(scales), decoding)
    settings = {"n": n, "k": x.shape[1], "decoding": decoding, "out_dtype": result, "tiles": cut, "interpret": how}
    return np.asarray(gpu_matmul.matmul(jnp.asarray(x), *packed, jnp.float32(0.375), **settings), np.float64)


def interpreted(folder: Path, cases) -> dict[str, np.ndarray]:
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    paths = {"PYTHONPATH": str(Path(gpu_matmul.__file__).parents[1])}
    environment = os.environ | paths | {"NPROC": "16", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, __file__, str(folder / "results.npz"), *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return dict(np.load(folder / "results.npz"))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    cases = [case for case in CASES if case != "a cluster" or KNOWS_CLUSTERS]
    return interpreted(tmp_path_factory.mktemp("interpreted"), cases)


@pytest.fixture(scope="module")
def slow_results(tmp_path_factory):
    return interpreted(tmp_path_factory.mktemp("interpreted"), SLOW_CASES)


def check(case, found):
    _, dtype, result, m, n, _, _ = ALL_CASES[case]
    x, nibbles, scales, decoding = operands(case)
    w = weights(nibbles, scales, decoding).astype(dtype).astype(np.float64)
    x = x.astype(np.float64)
    wanted = 0.375 * x @ w.T
    # A sum of K products in float32 in any order, factor, and the result's rounding.
    rounding = {"float32": 0, "float16": 2.0**-11, "bfloat16": 2.0**-8}[result]
    bound = 0.375 * (x.shape[1] + 2) * 2.0**-24 * (abs(x) @ abs(w).T) + rounding * abs(wanted)
    assert found.shape == (m, n)
    fits = abs(wanted) < (65504 if result == "float16" else np.inf)
    assert fits.mean() > 0.5
    assert (abs(found - wanted) <= bound)[fits].all(), abs(found - wanted)[fits].max()


@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernel_agrees_with_float64(case, results):
    if case not in results:
        pytest.skip("the interpreter of jax 0.10 knows no clusters")
    check(case, results[case])


@pytest.mark.gpu
@pytest.mark.parametrize("case", ALL_CASES)
def test_kernel_agrees_with_float64_on_a_gpu(case):
    if reason := gpu_matmul.supports(DECODINGS["if4"], jnp.float16, device_kind=jax.devices()[0].device_kind):
        pytest.skip(reason)
    check(case, run(case, False))


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_CASES)
def test_interpreted_kernel_agrees_with_float64_in_more_cases(case, slow_results):
    check(case, slow_results[case])


# What is refused, and what is lowered.


FEW, MANY = Tiles(8, 1, 4, stages=2), Tiles(128, 2, stages=3)


def lowered(dtype=jnp.float16, out_dtype=jnp.float16, decoding=DECODINGS["if4"], m=5, cut=FEW, **other):
    n, k = 256, 1024
    packed = jax.eval_shape(
        lambda a, b: gpu_matmul.pack(a, b, DECODINGS["if4"]),
        jax.ShapeDtypeStruct((n, k), jnp.uint8),
        jax.ShapeDtypeStruct((n, k // 16), jnp.uint8),
    )
    settings = {"n": n, "k": k, "decoding": decoding, "out_dtype": out_dtype, "tiles": cut} | other
    run = jax.jit(lambda *arguments: gpu_matmul.matmul(*arguments, **settings))
    x, factor = jax.ShapeDtypeStruct((m, 1024), dtype), jax.ShapeDtypeStruct((), jnp.float32)
    return run.trace(x, *packed, factor).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "m, height, rows", [(1, 8, 1), (8, 8, 8), (9, 8, 16), (1, 16, 16), (8, 256, 16), (203, 128, 208)]
)
def test_a_result_has_no_single_eight_of_rows_if_tiles_are_higher(m, height, rows):
    assert gpu_matmul._rows_of_result(m, Tiles(height)) == rows


@each_dtype
@pytest.mark.parametrize("cut", [FEW, MANY, None], ids=["few rows", "many rows", "of the table"])
def test_lowers_for_a_gpu_without_one(dtype, cut):
    assert "mosaic_gpu" in lowered(dtype, dtype, cut=cut)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"dtype": jnp.float32}, "x must be float16 or bfloat16"),
        ({"out_dtype": jnp.float8_e4m3fn}, "result must be"),
        ({"decoding": E8M0}, "blocks of 16"),
        ({"decoding": dataclasses.replace(E8M0, block=16)}, "scales must be e4m3, got e8m0"),
        ({"decoding": Decoding((E2M1,), (49,), "e4m3", 16)}, "65504"),
        ({"n": 300}, "packed in words"),
        ({"k": 272}, "packed in words"),
        ({"k": 1008}, r"x must be \[M, 1008\]"),
        ({"decoding": Decoding((INT4,), (37,), "e4m3", 16)}, "65504"),
        ({"decoding": Decoding(((0, 0.125, 0.25, 0.5, 0.75, 1, 1.5, 1.75),), (41,), "e4m3", 16)}, "exact in float16"),
        ({"m": 0}, "must have rows"),
        ({"cut": Tiles(8, 1, 3)}, "do not divide"),
        ({"cut": Tiles(256, 2, stages=4)}, "shared memory"),
    ],
)
def test_what_the_kernel_cannot_take_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        lowered(**wrong)


def test_a_factor_of_another_type_is_refused():
    nibbles, scales = random_weights(128, 256)
    packed = gpu_matmul.pack(jnp.asarray(nibbles), jnp.asarray(scales), DECODINGS["if4"])
    settings = {"n": 128, "k": 256, "decoding": DECODINGS["if4"], "out_dtype": jnp.float32, "tiles": Tiles(8)}
    for factor in (jnp.float16(1), jnp.ones(1)):
        with pytest.raises(ValueError, match="factor must be a float32 scalar"):
            gpu_matmul.matmul(jnp.ones((1, 256), jnp.float16), *packed, factor, **settings)


def test_packing_refuses_other_shapes():
    nibbles, scales = map(jnp.asarray, random_weights(64, 128))
    with pytest.raises(ValueError, match="packing needs nibbles"):
        gpu_matmul.pack(nibbles, scales[:, :4], DECODINGS["if4"])
    with pytest.raises(ValueError, match="nibbles uint8"):
        gpu_matmul.pack(nibbles.astype(jnp.int8), scales, DECODINGS["if4"])
    with pytest.raises(ValueError, match="blocks of 16"):
        gpu_matmul.pack(nibbles, scales, E8M0)


def test_devices_other_than_hopper_are_named():
    supports = gpu_matmul.supports
    for kind in ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB"):
        assert supports(DECODINGS["if4"], jnp.bfloat16, device_kind=kind) is None
    for kind in ("NVIDIA B200", "NVIDIA A100-SXM4-40GB", "TPU v6e", "cpu"):
        assert kind in supports(DECODINGS["if4"], jnp.bfloat16, device_kind=kind)


# The table of tiles.


def test_the_table_has_tiles_for_every_size_and_says_that_none_is_measured():
    table = tiles.read()
    assert {"H200", "H100"} <= set(table)
    assert all(entry.measured is None for rows in table.values() for entry in rows)
    for m, k, dtype in itertools.product((1, 8, 9, 16, 17, 33, 64, 65, 256, 8192), (256, 1024, 11008), (jnp.float16,)):
        for out_dtype in (jnp.float16, jnp.float32):
            cut = tiles.choose("NVIDIA H200", m, 4096, k, dtype, out_dtype)
            assert cut.misfit(4096, k, out_dtype) is None
            assert cut.m >= min(m, 64)


def test_the_table_survives_being_written_and_read(tmp_path):
    measured = {"microseconds": 3.5}
    table = {"H200": [Entry(Tiles(16, 1, 2), max_m=16, n=4096, k=4096, dtype="float16", measured=measured)]}
    (tmp_path / "tiles.json").write_text(tiles.dump(table))
    assert tiles.read(tmp_path / "tiles.json") == table
    assert tiles.FILE.read_text() == tiles.dump(tiles.read())


@pytest.mark.parametrize(
    "wrong", [{"m": 12}, {"m": 264}, {"m": 8, "stages": 1}, {"m": 8, "n_warpgroups": 5}, {"m": 8, "cluster": 9}]
)
def test_impossible_tiles_are_refused(wrong):
    with pytest.raises(ValueError, match="got"):
        Tiles(**wrong)


@pytest.mark.parametrize("m", [8, 64, 256, 8192])
@pytest.mark.parametrize("k", [256, 8192])
def test_candidates_fit_and_are_not_tried_twice(m, k):
    found = list(autotune.candidates(m, 4096, k, jnp.float16, 132))
    assert len(set(found)) == len(found) > 1
    assert all(cut.misfit(4096, k, jnp.float16) is None for cut in found)


def test_autotune_without_a_gpu_says_so_and_writes_nothing(tmp_path, capsys):
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    file = tmp_path / "tiles.json"
    assert autotune.main(["--out", str(file), "--device-kind", "H200"]) == 2
    assert "'H200'" in capsys.readouterr().err
    assert not file.exists()


def test_a_table_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "tiles.json"
    table = {"H200": [autotune.entry_of([(3.456, Tiles(8)), (4.0, Tiles(16))], 8, False, 64, 128, "float16", "H200")]}
    autotune.write(file, table)
    assert tiles.read(file) == table
    [entry] = table["H200"]
    assert entry.suits(8, 64, 128, jnp.float16)
    for other in ((9, 64, 128, jnp.float16), (8, 64, 256, jnp.float16), (8, 64, 128, jnp.bfloat16)):
        assert not entry.suits(*other)
    monkeypatch.setattr(tiles, "dump", lambda table: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        autotune.write(file, {})
    assert tiles.read(file) == table
    assert list(tmp_path.iterdir()) == [file]


if __name__ == "__main__":
    # From jax 0.11 on the interpreter finds races, and raises; memory is NaN until it is written.
    how = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan") if KNOWS_CLUSTERS else True
    np.savez(sys.argv[1], **{case: run(case, how) for case in sys.argv[2:]})
