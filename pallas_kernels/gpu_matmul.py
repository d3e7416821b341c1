"""x @ W.T on NVIDIA Hopper, where W stays in 4 bits until it is in registers.

    out[m, n] = factor * sum over k of x[m, k] * W[n, k]
    W[n, k]   = +-magnitudes[mode][code] * multipliers[mode] * scale(byte of block k // 16)

One warpgroup loads (TMA), the others decode and multiply: nibbles become 16-bit floats by a look-up in two registers
(PRMT), are multiplied with their scale, and feed the tensor cores from registers (wgmma, which computes out.T, so that
W is the operand that may lie in registers). Blocks are persistent: each walks its share of the tiles, and the loads of
the next tile go on while a result is written. Few rows of x leave most warpgroups without rows of W of their own;
these share K, and their sums meet in shared memory, never in global memory.

Layout. A unit is 64 rows of W by 128 K, as one warpgroup decodes it: int32 words [N / 64, K / 128, 8, 128] of eight
codes each and scale words [N / 64, K / 128, 128] of four bytes each; 4.5 bits a weight. Of every 64 K, lane l of a warp
has block l % 4 of rows l // 4 and l // 4 + 8, hence one scale and one mode for 16 codes. To wgmma such a lane's codes
are K 8j + 2 (l % 4) + b, for j < 8 and b < 2; so x is reordered within every 64 K, and W keeps its order.

Numerics. Sums are float32; factor multiplies them once, before the one rounding to the type of the result. With x in
float16 every weight is exact. With x in bfloat16 a weight is rounded once, to 8 bits, an error of at most 2^-8 of it,
and has none where it fits: E2M1 and INT4 of one mode and multiplier 1 do, IF4, with its multipliers 7 and 6, may not.
The values of a `TableDecoding` are rounded to the type of x before they meet the scale, so its weights twice.
A NaN byte makes NaN of the outputs of its row of W.

Nothing here has run on a GPU yet. It compiles for one without spilling registers, its instructions are emulated for all
codes and scale bytes, and the kernel agrees with float64 in the interpreter.
"""

import functools
import inspect
import itertools
import math
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.decoding import Decoding, TableDecoding
from pallas_kernels.tiles import UNIT_K, UNIT_N, Tiles, choose, padded

GROUP = 64  # K that four lanes share, a block of 16 each
LOADER_REGISTERS = 40
HOPPER = ("H100", "H200", "H800", "H20", "GH200")


def supports(
    decoding: Decoding | TableDecoding, dtype: Any, *, m: int = 1, out_dtype: Any = None, device_kind: str | None = None
) -> str | None:
    """Why `matmul` cannot take x [m, K] of `dtype` and weights of `decoding`; None if it can.

    `device_kind` is what `jax.Device.device_kind` says; None asks about no device.
    """
    if jnp.dtype(dtype) not in (jnp.float16, jnp.bfloat16):
        return f"x must be float16 or bfloat16 for the tensor cores, got {jnp.dtype(dtype).name}"
    if jnp.dtype(out_dtype or dtype) not in (jnp.float16, jnp.bfloat16, jnp.float32):
        return f"the result must be float16, bfloat16 or float32, got {jnp.dtype(out_dtype).name}"
    if m < 1:
        return f"x must have rows, got {m}"
    if decoding.block != 16:
        return f"a lane decodes blocks of 16 weights, got blocks of {decoding.block}"
    if isinstance(decoding, TableDecoding):
        largest = decoding.largest * max(abs(v) for row in decoding.values for v in row)
        if decoding.mantissa != 3 or decoding.exponent > 4 or largest > 65504:
            return f"values * scale must be within float16, with scales of at most E4M3: got {decoding}"
        if decoding.nan not in (None, 2**decoding.bits - 1):
            return f"the scale that means NaN must be the one after the largest: got {decoding}"
    elif reason := _refusal_of_magnitudes(decoding):
        return reason
    if device_kind is not None and not any(name in device_kind for name in HOPPER):
        return f"the kernel is for NVIDIA Hopper (H100, H200), got {device_kind}"
    return None


def _refusal_of_magnitudes(decoding: Decoding) -> str | None:
    if decoding.scale != "e4m3":
        return f"scales must be e4m3, got {decoding.scale}: float16 does not have its range"
    largest = 448 * max(m[-1] * abs(f) for m, f in zip(decoding.magnitudes, decoding.multipliers, strict=True))
    if largest > 65504 or not _fit_float16(decoding):
        return f"magnitude * multiplier * scale must be exact in float16, which ends at 65504: got {decoding}"
    return None


def pack(nibbles: jax.Array, scales: jax.Array, decoding: Decoding) -> tuple[jax.Array, jax.Array]:
    """Words int32 [N' / 64, K' / 128, 8, 128] and scale words int32 [N' / 64, K' / 128, 128] of weights [N, K].

    N' and K' are N and K with zeros up to multiples of 128 and 256. The layout is the same for every shape of x.

    Args:
        nibbles: uint8 [N, K], sign and magnitude, 0 to 15.
        scales: uint8 [N, K / 16], K / 16 rounded up.
        decoding: what they mean; here only its block matters.

    Raises:
        ValueError: shapes do not fit each other, dtypes are others, or blocks are not of 16.
    """
    if decoding.block != 16:
        raise ValueError(f"packing needs blocks of 16 weights, got {decoding.block}")
    n, k = nibbles.shape
    if nibbles.dtype != jnp.uint8 or scales.dtype != jnp.uint8 or scales.shape != (n, -(-k // 16)):
        raise ValueError(
            "packing needs nibbles uint8 [N, K] and scales uint8 [N, K / 16], got "
            f"{nibbles.dtype}{list(nibbles.shape)} and {scales.dtype}{list(scales.shape)}"
        )
    high, wide = padded(n, k)
    nibbles = jnp.pad(nibbles, ((0, high - n), (0, wide - k)))
    scales = jnp.pad(scales, ((0, high - n), (0, wide // 16 - scales.shape[1])))
    units = high // UNIT_N, wide // UNIT_K

    # Axes: unit, warp, row half, row, unit, group, lane's block, word, code; from then on as lanes read them.
    codes = nibbles.reshape(units[0], 4, 2, 8, units[1], 2, 4, 2, 8).astype(jnp.uint32)
    code_at, sign_at = _bits_of_codes(codes.shape)
    words = jnp.sum((codes & 7) << code_at | (codes >> 3) << sign_at, -1, dtype=jnp.uint32)
    words = lax.bitcast_convert_type(words.transpose(0, 4, 5, 1, 3, 6, 2, 7), jnp.int32)
    bytes_ = scales.reshape(units[0], 4, 2, 8, units[1], 2, 4).transpose(0, 4, 1, 3, 6, 2, 5)
    return words.reshape(*units, 8, 128), lax.bitcast_convert_type(bytes_.reshape(*units, 128, 4), jnp.int32)


def unpack(words: jax.Array, scale_words: jax.Array, n: int, k: int, decoding: Decoding) -> tuple[jax.Array, jax.Array]:
    """The nibbles uint8 [n, k] and scales uint8 [n, k / 16] that `pack` was given.

    Raises:
        ValueError: the words are not those of weights [n, k].
    """
    _check_packed(words, scale_words, n, k, decoding)
    nibbles, scales = _unpacked(words, scale_words)
    return nibbles[:n, :k], scales[:n, : -(-k // 16)]


def matmul(
    x: jax.Array,
    words: jax.Array,
    scale_words: jax.Array,
    factor: jax.Array,
    *,
    n: int,
    k: int,
    decoding: Decoding,
    out_dtype: Any,
    tiles: Tiles | None = None,
    interpret: Any = False,
) -> jax.Array:
    """x @ W.T * factor, [M, n] of `out_dtype`, for the weights W [n, k] that `pack` made words of.

    Args:
        x: float16 or bfloat16 [M, k]; any M above 0.
        words, scale_words: what `pack` returned.
        factor: float32, a scalar array.
        n, k: the shape of W before it was padded.
        decoding: of the codes and scales.
        out_dtype: float16, bfloat16 or float32.
        tiles: how to cut the work; by default from the table, for the first device or else an H200.
        interpret: True or `InterpretGPUParams`, to run it where no GPU is; on few processors set NPROC=16 before jax is
            imported, as the interpreter wants a thread for each warpgroup.

    Raises:
        ValueError: `supports` has a reason, shapes or dtypes do not agree, or the tiles do not fit.
    """
    if reason := supports(decoding, x.dtype, m=x.shape[0], out_dtype=out_dtype):
        raise ValueError(reason)
    _check_packed(words, scale_words, n, k, decoding)
    if x.ndim != 2 or x.shape[1] != k:
        raise ValueError(f"x must be [M, {k}], as the weights are [{n}, {k}]: got {list(x.shape)}")
    if jnp.shape(factor) != () or jnp.result_type(factor) != jnp.float32:
        raise ValueError(f"factor must be a float32 scalar, got {jnp.result_type(factor)}{list(jnp.shape(factor))}")
    if tiles is None:
        tiles = choose(jax.devices()[0].device_kind, x.shape[0], n, k, x.dtype, out_dtype)
    if reason := tiles.misfit(n, k, out_dtype):
        raise ValueError(reason)

    m, (high, wide) = x.shape[0], padded(n, k)
    x = jnp.pad(x, ((0, -m % tiles.m), (0, wide - k)))
    x = x.reshape(-1, wide // GROUP, 4, 8, 2).swapaxes(2, 3).reshape(-1, wide)
    out = jax.ShapeDtypeStruct((x.shape[0] if interpret else _rows_of_result(m, tiles), high), out_dtype)
    clusters = min(tiles.blocks, x.shape[0] // tiles.m * (high // tiles.n)) // tiles.cluster
    run = plgpu.kernel(
        functools.partial(_kernel, tiles=tiles, decoding=decoding),
        out_type=out,
        grid=(clusters,),
        grid_names=("cluster",),
        # Only where needed: the interpreter of jax 0.10 knows no clusters.
        **({"cluster": (tiles.cluster,), "cluster_names": ("block",)} if tiles.cluster > 1 else {}),
        num_threads=tiles.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types={"memory": _memory(tiles, x.dtype, out.dtype, bool(interpret))},
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name="packed_matmul",
        interpret=_interpreter() if interpret is True else interpret or None,
    )
    return run(words, scale_words, x, jnp.reshape(factor, 1))[:m, :n]


def reference(x: jax.Array, nibbles: jax.Array, scales: jax.Array, factor: jax.Array, decoding: Decoding) -> jax.Array:
    """What `matmul` computes, in float32 [M, N] and by jax.numpy, of what `pack` takes."""
    w = _weights(nibbles, scales, decoding).astype(x.dtype)
    return jnp.matmul(x, w.T, precision="highest", preferred_element_type=jnp.float32) * factor


# --- the kernel ------------------------------------------------------------------------------------------------------


class _Memory(NamedTuple):
    """Shared memory and barriers of a block. Whatever is not there is None."""

    words: Any  # [stages, 64 rows each, units of K, 8, 128]
    scales: Any  # [stages, 64 rows each, units of K, 128]
    x: Any  # [stages, m, K]
    out: Any  # [n_warpgroups, slots, rows, 64]
    loaded: Any  # a step's operands are there
    used: Any  # a step's operands have been multiplied, by all blocks of a cluster
    sums: Any  # [n_warpgroups, k_warpgroups - 1, 64, m]
    summed: Any  # the sums of the others are there
    taken: Any  # and have been read
    staged_w: Any  # for the interpreter: [warpgroups, 64, 64] decoded weights, [warpgroups, 64, m] x.T
    staged_x: Any


def _rows_of_result(m: int, tiles: Tiles) -> int:
    """Rows of the kernel's result for m rows of x.

    TMA leaves out what lies beyond the last row, so that nothing need be cropped; the interpreter does not. Mosaic cuts
    rows into eights and takes a single eight, whole or not, to be all there is, without looking at its index: if a
    tile has more rows than eight there must be more in the result.
    """
    if m < 8 and tiles.m == 8:
        return m
    return max(-(-m // 8) * 8, min(tiles.m, 16))


def _memory(tiles: Tiles, dtype, out_dtype, interpret):
    across, along, shared = tiles.n_warpgroups, tiles.k // UNIT_K, tiles.k_warpgroups - 1
    together = tiles.cluster > 1 and not interpret
    barrier = functools.partial(plgpu.ClusterBarrier, collective_axes=("block",)) if together else plgpu.Barrier
    swizzle = plgpu.SwizzleTransform(128)
    return _Memory(
        words=plgpu.SMEM((tiles.stages, across, along, 8, 128), jnp.int32),
        scales=plgpu.SMEM((tiles.stages, across, along, 128), jnp.int32),
        x=plgpu.SMEM((tiles.stages, tiles.m, tiles.k), dtype, transforms=(plgpu.TilingTransform((8, 64)), swizzle)),
        out=plgpu.SMEM(
            (across, *reversed(tiles.written(out_dtype)), UNIT_N),
            out_dtype,
            transforms=(plgpu.TilingTransform((8, 128 // out_dtype.itemsize)), swizzle),
        ),
        loaded=plgpu.Barrier(num_arrivals=3, num_barriers=tiles.stages),
        used=barrier(num_arrivals=tiles.warpgroups, num_barriers=tiles.stages),
        sums=plgpu.SMEM((across, shared, UNIT_N, tiles.m), jnp.float32) if shared else None,
        summed=plgpu.Barrier(num_arrivals=shared, num_barriers=across) if shared else None,
        taken=plgpu.Barrier(num_barriers=across) if shared else None,
        staged_w=plgpu.SMEM((tiles.warpgroups, UNIT_N, GROUP), dtype) if interpret else None,
        staged_x=plgpu.SMEM((tiles.warpgroups, GROUP, tiles.m), dtype) if interpret else None,
    )


def _kernel(words, scales, x, factor, out, *, tiles: Tiles, decoding: Decoding, memory: _Memory):
    """One block. Its steps are counted on from tile to tile, and step i uses slot i % stages of the memory."""
    steps = words.shape[1] * UNIT_K // tiles.k
    # A cluster walks over tiles that are as much wider; each of its blocks takes its part of them.
    tiles_m, tiles_n = x.shape[0] // tiles.m, words.shape[0] // tiles.n_warpgroups // tiles.cluster
    warpgroup = lax.axis_index("warpgroup")
    walk = plgpu.nd_loop((tiles_m * tiles_n,), collective_axes="cluster")

    def place(info):
        """Which tile it is this time. Bands of x one after the other, in a band x first: a wave shares both in L2."""
        (index,) = info.index
        band = lax.div(index, tiles.band * tiles_n)
        height = lax.min(tiles.band, tiles_m - band * tiles.band)
        index = lax.rem(index, tiles.band * tiles_n)
        in_cluster = lax.axis_index("block") if tiles.cluster > 1 else 0
        return band * tiles.band + lax.rem(index, height), lax.div(index, height) * tiles.cluster + in_cluster

    @pl.when(warpgroup == tiles.warpgroups)
    def load():
        plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

        def free_slot(step):
            slot = lax.rem(step, tiles.stages)
            # At its first step a computing warpgroup gives back a slot -1, so that it need not ask which step it is at.
            pl.when(step >= tiles.stages - 1)(lambda: plgpu.barrier_wait(memory.used.at[slot]))
            return slot

        @walk
        def _(info):
            at_m, at_n = place(info)
            rows, across = pl.ds(at_m * tiles.m, tiles.m), pl.ds(at_n * tiles.n_warpgroups, tiles.n_warpgroups)

            @pl.loop(0, steps)
            def _(i):
                slot = free_slot(info.local_index * steps + i)
                along = pl.ds(i * (tiles.k // UNIT_K), tiles.k // UNIT_K)
                loaded = memory.loaded.at[slot]
                plgpu.copy_gmem_to_smem(words.at[across, along], memory.words.at[slot], loaded)
                plgpu.copy_gmem_to_smem(scales.at[across, along], memory.scales.at[slot], loaded)
                _copy_to_all(memory, tiles, x.at[rows, pl.ds(i * tiles.k, tiles.k)], memory.x.at[slot], loaded)

        walked = lax.div(tiles_m * tiles_n - 1 - lax.axis_index("cluster"), lax.axis_size("cluster")) + 1

        @pl.loop(walked * steps, walked * steps + tiles.stages - 1)
        def _(step):
            free_slot(step)  # leaves no barrier behind with arrivals to come

    @pl.when(warpgroup < tiles.warpgroups)
    def compute():
        plgpu.set_max_registers(_registers(tiles.warpgroups), action="increase")
        in_n, in_k = lax.rem(warpgroup, tiles.n_warpgroups), lax.div(warpgroup, tiles.n_warpgroups)

        @walk
        def _(info):
            @functools.partial(pl.run_scoped, acc=plgpu.WGMMAAccumulatorRef((UNIT_N, tiles.m), jnp.float32))
            def _(acc):
                @pl.loop(0, steps)
                def _(i):
                    step = info.local_index * steps + i
                    slot = lax.rem(step, tiles.stages)
                    plgpu.barrier_wait(memory.loaded.at[slot])
                    for u, group in itertools.product(range(tiles.k_units), range(2)):
                        _multiply(acc, memory, slot, in_n, in_k * tiles.k_units + u, group, decoding, warpgroup)
                        if u == group == 0:
                            # Now only this product is in flight: of the step before nothing is needed any more.
                            plgpu.barrier_arrive(memory.used.at[lax.rem(step + tiles.stages - 1, tiles.stages)])

                total = acc[...]
                at_m, at_n = place(info)
                columns = pl.ds((at_n * tiles.n_warpgroups + in_n) * UNIT_N, UNIT_N)
                _write(total, factor, out.at[pl.ds(at_m * tiles.m, tiles.m), columns], memory, tiles, in_n, in_k)

        plgpu.wait_smem_to_gmem(0)


def _write(total, factor, out, memory: _Memory, tiles: Tiles, in_n, in_k):
    """Adds the sums of the warpgroups that shared K, and writes them to out [m, 64], a few rows at a time."""
    if tiles.k_warpgroups > 1:

        @pl.when(in_k > 0)
        def _():
            memory.sums[in_n, in_k - 1] = total
            plgpu.barrier_arrive(memory.summed.at[in_n])
            plgpu.barrier_wait(memory.taken.at[in_n])

    @pl.when(in_k == 0)
    def _():
        result = total
        if tiles.k_warpgroups > 1:
            plgpu.barrier_wait(memory.summed.at[in_n])
            for other in range(tiles.k_warpgroups - 1):
                result += _load(memory, memory.sums.at[in_n, other], plgpu.Layout.WGMMA)
            plgpu.barrier_arrive(memory.taken.at[in_n])
        result = (result * factor[0]).astype(out.dtype)
        rows, slots = tiles.written(out.dtype)
        for i in range(tiles.m // rows):
            plgpu.wait_smem_to_gmem(slots - 1 if i else 0, wait_read_only=True)
            part = memory.out.at[in_n, i % slots]
            _store_transposed(memory, part, result[:, i * rows : (i + 1) * rows])
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(part, out.at[pl.ds(i * rows, rows)])


def _registers(warpgroups: int) -> int:
    """Registers of a computing thread once the loading warpgroup has given up most of its own.

    A block starts with equal shares, in eights, of the 65536 that a multiprocessor has; 240 and more are one thread's
    limit. To ask for more than is left over would be to wait for ever.
    """
    share = min(65536 // (128 * (warpgroups + 1)) // 8 * 8, 240)
    return min((share * (warpgroups + 1) - LOADER_REGISTERS) // warpgroups // 8 * 8, 240)


# --- what the interpreter does in its own way ------------------------------------------------------------------------
# It knows neither PTX, nor layouts of registers, nor wgmma with an operand in registers, nor copies to several blocks,
# nor (0.10) transposed memory.


def _multiply(acc, memory: _Memory, slot, in_n, unit, group, decoding, warpgroup):
    """acc [64, m] += W @ x.T over 64 K, one group of a unit; the product before it is then complete."""
    words, scales = memory.words.at[slot, in_n, unit], memory.scales.at[slot, in_n, unit]
    x = memory.x.at[slot, :, pl.ds(unit * UNIT_K + group * GROUP, GROUP)]
    if memory.staged_w is None:
        codes = _load(memory, words.at[pl.ds(4 * group, 4)], plgpu.Layout.WG_STRIDED((4, 128), 4))
        scales = _load(memory, scales, plgpu.Layout.WG_STRIDED((128,), 1))
        plgpu.wgmma(acc, _decoder(decoding, x.dtype, group)(codes, scales), x.T)
        plgpu.wgmma_wait(1)
        return
    w = _weights(*_unpacked(words[...][None, None], scales[...][None, None]), decoding)
    w = w.reshape(UNIT_N, UNIT_K // GROUP, 4, 8, 2)[:, group].swapaxes(1, 2)
    memory.staged_w[warpgroup] = w.reshape(UNIT_N, GROUP).astype(x.dtype)
    memory.staged_x[warpgroup] = x[...].T
    plgpu.commit_smem()
    plgpu.wgmma(acc, memory.staged_w.at[warpgroup], memory.staged_x.at[warpgroup])
    plgpu.wgmma_wait(0)


def _copy_to_all(memory: _Memory, tiles: Tiles, source, target, loaded):
    """Copies what all blocks of a cluster need, each block a part of it for all; in the interpreter each all of it."""
    if tiles.cluster > 1 and memory.staged_w is None:
        plgpu.copy_gmem_to_smem(source, target, loaded, collective_axes="block")
    else:
        plgpu.copy_gmem_to_smem(source, target, loaded)


def _load(memory: _Memory, ref, layout):
    if memory.staged_w is not None:
        return ref[...]
    # jax 0.10 wants an index.
    return plgpu.load(ref, *[()] * ("idx" in inspect.signature(plgpu.load).parameters), layout=layout)


def _store_transposed(memory: _Memory, target, values):
    if memory.staged_w is not None:
        target[...] = values.T
    else:
        target.T[...] = plgpu.layout_cast(values, plgpu.Layout.WGMMA_TRANSPOSED)


def _interpreter():
    parameters = getattr(plgpu, "InterpretGPUParams", None)
    if parameters is None:  # jax 0.10
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams as parameters

    return parameters()


# --- decoding --------------------------------------------------------------------------------------------------------


def _decoder(decoding: Decoding, dtype, group: int) -> Callable[..., Any]:
    """Decodes 64 K of a unit: words [4, 128] and scale words [128] to W [64, 64], in registers as wgmma reads them."""
    import jax.experimental.mosaic.gpu as mgpu

    utils: Any = mgpu.utils
    ir, llvm, vector = utils.ir, utils.llvm, utils.vector  # jaxlib's, as the rest of Mosaic has them

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WG_STRIDED((4, 128), 4), plgpu.Layout.WG_STRIDED((128,), 1)),
        return_type=plgpu.ShapeDtypeStruct((UNIT_N, GROUP), dtype, layout=plgpu.Layout.WGMMA),
    )
    def decode(_, words, scales):
        def emit(instruction, *operands):
            registers = [operand for operand in operands if not isinstance(operand, int)]
            numbers = iter(range(1, len(registers) + 1))
            text = ", ".join(hex(o) if isinstance(o, int) else f"${next(numbers)}" for o in operands)
            constraints = ",".join(["=r"] + ["r"] * len(registers))
            word = ir.IntegerType.get_signless(32)
            return llvm.inline_asm(word, registers, f"{instruction} $0, {text};", constraints, asm_dialect=0)

        [codes], [scale] = words.registers.flat, scales.registers.flat
        codes = [[vector.extract(codes, [], [2 * h + w]) for w in range(2)] for h in range(2)]
        scale = vector.extract(scale, [], [0]) if isinstance(scale.type, ir.VectorType) else scale
        pairs = decode_lane(emit, codes, scale, group, decoding, dtype)
        two = ir.VectorType.get((2,), utils.dtype_to_ir_type(jnp.dtype(dtype)))
        registers = type(words.registers)((8, 2), object)
        for j, h in itertools.product(range(8), range(2)):
            registers[j, h] = utils.bitcast(pairs[j][h], two)
        registers = registers.reshape(mgpu.WGMMA_LAYOUT.registers_shape((UNIT_N, GROUP)))
        return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)

    return decode


def decode_lane(emit, words, scales, group: int, decoding: Decoding, dtype):
    """The instructions that decode a lane's 32 weights of 64 K: a block of 16 in each of its two rows.

    Args:
        emit: `emit(instruction, *operands)` issues a PTX instruction on 32-bit registers and constants, and returns
            the register of its result; or, in a test, computes it.
        words: words[h][w], codes 8w to 8w + 7 of row h.
        scales: the register whose byte 2h + group is row h's scale.
        group: which half of the unit's 128 K.

    Returns:
        pairs[j][h]: registers with codes 2j (lower half) and 2j + 1 (upper half) of row h as floats of `dtype`.
    """
    if isinstance(decoding, TableDecoding):
        return _decode_lane_by_table(emit, words, scales, group, decoding, dtype)
    half = jnp.dtype(dtype) == jnp.float16
    suffix, shift, mask, bias = ("f16x2", 1, 0x3F803F80, 8) if half else ("bf16x2", 4, 0x07F007F0, 120)
    two_modes = len(decoding.magnitudes) == 2

    def bits(number):  # of numbers that both types hold exactly
        code = struct.pack("<e", number) if half else struct.pack("<f", number)[2:]
        return int.from_bytes(code, "little")

    def twice(number):
        return bits(number) * 0x10001

    def constant(number):
        return emit("mov.b32", twice(number))

    def multiply(a, b):
        return emit(f"mul.rn.{suffix}", a, b)

    # Row 0's scale byte twice in the lower half, row 1's in the upper. Shifted to where exponent and mantissa of the
    # dtype are, it is |scale|, but for the difference of the biases; subnormal ones are subnormal here as well.
    byte = emit("prmt.b32", scales, scales, 0x1100 * (2 + group) + 0x11 * group)
    mode = emit("prmt.b32", byte, byte, 0xBB99)  # bit 7, sixteen times
    scale = emit("and.b32", emit("shr.u32", byte, shift), mask)
    if not two_modes:
        scale = emit("lop3.b32", scale, byte, 0x80008000, 0xF8)  # a | b & c: the sign
    scale = multiply(scale, constant(2.0**bias))
    # E4M3's NaN now reads as 480. Times `beyond` it is infinite, where 448 is not, and times 0 then NaN.
    beyond = constant(140.0 if half else 1.125 * 2.0**119)
    first, second = twice(decoding.multipliers[0]), twice(decoding.multipliers[-1])
    multiplier = emit("lop3.b32", mode, second, first, 0xCA) if two_modes else emit("mov.b32", first)  # a ? b : c
    scale = emit(f"fma.rn.{suffix}", multiply(scale, beyond), constant(0.0), multiply(scale, multiplier))

    pairs = [[None, None] for _ in range(8)]
    for h, own in enumerate((0x1010, 0x3232)):  # both halves of the result from row h's half
        scale_h = emit("prmt.b32", scale, scale, own)
        mode_h = emit("prmt.b32", mode, mode, own)

        def table(at, mode_h=mode_h):
            """Two registers with one byte each of the eight magnitudes, as the mode of this block has them."""
            entries = [bytes(bits(m) >> at & 0xFF for m in magnitudes) for magnitudes in decoding.magnitudes]
            entries = [struct.unpack("<2I", entry) for entry in entries]
            if two_modes:
                return [emit("lop3.b32", mode_h, b, a, 0xCA) for a, b in zip(*entries, strict=True)]
            return [emit("mov.b32", a) for a in entries[0]]

        upper = table(8)
        lower = [] if half else table(0)  # in float16 all zeros: a magnitude has three significant bits
        for w, word in enumerate(words[h]):
            codes = emit("and.b32", word, 0x77777777)
            for q in range(2):  # four codes at a time
                selector = emit("shr.u32", codes, 16) if q else codes
                signs = emit("shl.b32", word, 4) if q else word
                high = emit("lop3.b32", emit("prmt.b32", *upper, selector), signs, 0x80808080, 0xF8)
                if half:
                    floats = emit("prmt.b32", high, 0, 0x1404), emit("prmt.b32", high, 0, 0x3424)
                else:
                    low = emit("prmt.b32", *lower, selector)
                    floats = emit("prmt.b32", low, high, 0x5140), emit("prmt.b32", low, high, 0x7362)
                for p, pair in enumerate(floats):
                    pairs[4 * w + 2 * q + p][h] = multiply(pair, scale_h)
    return pairs


def _decode_lane_by_table(emit, words, scales, group: int, decoding: TableDecoding, dtype):
    """The same for tables of any sixteen values, which are rounded to `dtype` before they meet the scale.

    A value has two bytes and a table two halves, so that four codes take four look-ups; bit 3 of each code, where the
    layout has signs, chooses between the halves.
    """
    half = jnp.dtype(dtype) == jnp.float16
    suffix, shift, bias = ("f16x2", 1, 15) if half else ("bf16x2", 4, 127)
    mask = 0x10001 * ((2**decoding.bits - 1) << (8 - shift))
    code = struct.Struct("<e" if half else "<f")

    def bits(number):  # rounded to even
        if half:
            return int.from_bytes(code.pack(number), "little")
        whole = int.from_bytes(code.pack(number), "little")
        return (whole + 0x7FFF + (whole >> 16 & 1)) >> 16

    def constant(number):
        return emit("mov.b32", bits(number) * 0x10001)

    def multiply(a, b):
        return emit(f"mul.rn.{suffix}", a, b)

    byte = emit("prmt.b32", scales, scales, 0x1100 * (2 + group) + 0x11 * group)  # as in `decode_lane`
    masks = []  # of each bit of the mode, lowest first, all bits of a row's half
    for bit in range(decoding.bits, 8)[: (len(decoding.values) - 1).bit_length()]:
        top = emit("shl.b32", byte, 7 - bit) if bit < 7 else byte
        masks.append(emit("prmt.b32", top, top, 0xBB99))
    scale = multiply(emit("and.b32", emit("shr.u32", byte, shift), mask), constant(2.0 ** (bias - decoding.bias)))
    if decoding.nan is not None:
        # It reads as a number beyond the largest, whose product with this is infinite, and times 0 NaN.
        end = 65504.0 if half else float(jnp.finfo(jnp.bfloat16).max)
        beyond = constant(end / (decoding.largest + decoding.unit_at_top / 2))
        scale = emit(f"fma.rn.{suffix}", multiply(scale, beyond), constant(0.0), scale)

    pairs = [[None, None] for _ in range(8)]
    for h, own in enumerate((0x1010, 0x3232)):
        scale_h = emit("prmt.b32", scale, scale, own)
        masks_h = [emit("prmt.b32", m, m, own) for m in masks]

        def table(at, masks_h=masks_h):
            """Four registers with one byte each of the sixteen values, as the mode of this block has them."""
            rows = [struct.unpack("<4I", bytes(bits(v) >> at & 0xFF for v in row)) for row in decoding.values]
            rows += rows[-1:] * (2 ** len(masks_h) - len(rows))
            registers = []
            for words in zip(*rows, strict=True):
                options: list = [emit("mov.b32", words[0])] if len(words) == 1 else list(words)
                for m in masks_h:
                    both = zip(options[::2], options[1::2], strict=True)
                    options = [emit("lop3.b32", m, b, a, 0xCA) for a, b in both]
                registers += options
            return registers

        low, high = table(0), table(8)
        for w, word in enumerate(words[h]):
            codes = emit("and.b32", word, 0x77777777)
            for q in range(2):  # four codes at a time
                selector = emit("shr.u32", codes, 16) if q else codes
                signs = emit("shl.b32", word, 4) if q else word
                is_upper = emit("prmt.b32", signs, signs, 0xBA98)
                bytes_ = []
                for plane in (low, high):
                    first, second = (emit("prmt.b32", *part, selector) for part in (plane[:2], plane[2:]))
                    bytes_.append(emit("lop3.b32", is_upper, second, first, 0xCA))
                floats = emit("prmt.b32", *bytes_, 0x5140), emit("prmt.b32", *bytes_, 0x7362)
                for p, pair in enumerate(floats):
                    pairs[4 * w + 2 * q + p][h] = multiply(pair, scale_h)
    return pairs


def _weights(nibbles, scales, decoding):
    """The weights by their formula, float32 [N, K], exact."""
    if isinstance(decoding, TableDecoding):
        return _table_weights(nibbles, scales, decoding)
    k, two_modes = nibbles.shape[1], len(decoding.magnitudes) == 2
    scale = lax.bitcast_convert_type(scales & 127 if two_modes else scales, jnp.float8_e4m3fn).astype(jnp.float32)
    scale, mode = (jnp.repeat(array, 16, axis=1)[:, :k] for array in (scale, scales >> 7))
    weights = jnp.zeros(nibbles.shape, jnp.float32)
    for i, (magnitudes, multiplier) in enumerate(zip(decoding.magnitudes, decoding.multipliers, strict=True)):
        for code, magnitude in enumerate(magnitudes):  # no array of magnitudes: a kernel may not hold constants
            here = (nibbles & 7 == code) & (mode == i) if two_modes else nibbles & 7 == code
            weights = jnp.where(here, magnitude * multiplier, weights)
    return jnp.where(nibbles > 7, -weights, weights) * scale


def _table_weights(nibbles, scales, decoding):
    """The weights by their formula, float32 [N, K], rounded once."""
    scale, mode = (
        jnp.repeat(array, 16, axis=1)[:, : nibbles.shape[1]] for array in decoding.scales(scales.astype(jnp.int32))
    )
    values = jnp.zeros(nibbles.shape, jnp.float32)
    for i, row in enumerate(decoding.values):
        for code, value in enumerate(row):
            here = nibbles == code if len(decoding.values) == 1 else (nibbles == code) & (mode == i)
            values = jnp.where(here, value, values)
    return values * scale


def _fit_float16(decoding):
    """Whether all weights of all scales are exact in float16: 11 bits, of which an E4M3 scale has four."""
    weights = [m * f for ms, f in zip(decoding.magnitudes, decoding.multipliers, strict=True) for m in ms]
    return all(math.frexp(weight * scale)[0] * 2**11 % 1 == 0 for weight in weights for scale in range(8, 16))


# --- layout ----------------------------------------------------------------------------------------------------------


def _bits_of_codes(shape):
    """Where codes 0 to 7, the last axis, lie in a word: the first bit of the magnitude, and the bit of the sign.

    Magnitudes are selectors of PRMT, four in 16 bits. Signs are in the bits that selectors leave free: those of codes 0
    to 3 where the four bytes that PRMT yields for them have their top bits, those of codes 4 to 7 four bits lower.
    """
    i = lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
    return 4 * i, 8 * (i % 4) + 7 - 4 * (i // 4)


def _unpacked(words, scale_words):
    """Nibbles and scale bytes of whole units."""
    units = scale_words.shape[:2]
    lanes = lax.bitcast_convert_type(words, jnp.uint32).reshape(*units, 2, 4, 8, 4, 2, 2, 1)
    code_at, sign_at = _bits_of_codes((*lanes.shape[:-1], 8))
    codes = (lanes >> code_at & 7 | (lanes >> sign_at & 1) << 3).astype(jnp.uint8)
    codes = codes.transpose(0, 3, 6, 4, 1, 2, 5, 7, 8).reshape(units[0] * UNIT_N, units[1] * UNIT_K)
    bytes_ = lax.bitcast_convert_type(scale_words, jnp.uint8).reshape(*units, 4, 8, 4, 2, 2)
    return codes, bytes_.transpose(0, 2, 5, 3, 1, 6, 4).reshape(units[0] * UNIT_N, units[1] * UNIT_K // 16)


def _check_packed(words, scale_words, n, k, decoding):
    high, wide = padded(n, k)
    shape = (high // UNIT_N, wide // UNIT_K, 8, 128)
    if words.shape != shape or scale_words.shape != (*shape[:2], 128) or decoding.block != 16:
        raise ValueError(
            f"weights [{n}, {k}] in blocks of 16 are packed in words {shape} and scale words {(*shape[:2], 128)}, got "
            f"{words.shape} and {scale_words.shape} in blocks of {decoding.block}: n and k are those before padding"
        )
