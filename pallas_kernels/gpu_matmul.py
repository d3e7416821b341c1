"""x @ W.T on NVIDIA Hopper GPUs, with W in 4 bits until it is in registers.

    out[m, n] = factor * sum over k of x[m, k] * W[n, k]
    W[n, k]   = +-magnitudes[mode][code] * multipliers[mode] * scale(byte of block k // 16)

One warpgroup loads (TMA); the others decode and multiply. They convert nibbles to 16-bit floats by a look-up in two
registers (PRMT), multiply them by their scale, and pass them to the tensor cores from registers. wgmma computes out.T,
because only its left operand may be in registers. Blocks are persistent: each processes its share of the tiles, and the
loads of the next tile overlap with the write of a result. If x has few rows, several warpgroups split the K of one
tile, and their partial sums are added in shared memory, never in global memory.

Layout. A unit is 64 rows of W by 128 along K, which one warpgroup decodes: int32 words [N / 64, K / 128, 8, 128] of
eight codes each and scale words [N / 64, K / 128, 128] of four bytes each, 4.5 bits per weight. In each group of 64
along K, lane l of a warp holds block l % 4 of rows l // 4 and l // 4 + 8, so that 16 codes have one scale and one mode.
wgmma reads such a lane's codes as K 8j + 2 (l % 4) + b, for j < 8 and b < 2. Therefore x is reordered within each group
of 64, and W keeps its order.

Numerics. Sums are float32. `factor` multiplies them once, before the only rounding to the dtype of the result. With x
in float16 every weight is exact. With x in bfloat16 each weight is rounded once, to 8 significant bits, with a relative
error of at most 2^-8, and without error if it fits: weights of E2M1 and INT4 with one mode and multiplier 1 do; those
of IF4, with multipliers 7 and 6, may not. The values of a `TableDecoding` are rounded to the dtype of x before they are
multiplied by the scale, so its weights are rounded twice. A NaN byte turns the outputs of its row of W into NaN.

This module has not run on a GPU. It compiles without register spills, its instructions are emulated for all codes and
scale bytes, and in the interpreter the kernel agrees with float64.
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
from pallas_kernels.varying import as_result_of, results_of

GROUP = 64  # length along K that four lanes decode together, a block of 16 each
LOADER_REGISTERS = 40
HOPPER = ("H100", "H200", "H800", "H20", "GH200")


def supports(
    decoding: Decoding | TableDecoding, dtype: Any, *, m: int = 1, out_dtype: Any = None, device_kind: str | None = None
) -> str | None:
    """Return the reason why `matmul` cannot take x [m, K] of `dtype` and weights of `decoding`; None if it can.

    `device_kind` is that of `jax.Device`; None skips the check of the device.
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
    """Pack weights [N, K] to int32 words [N' / 64, K' / 128, 8, 128] and scale words [N' / 64, K' / 128, 128].

    N' and K' are N and K, padded with zeros to multiples of 128 and 256. The layout does not depend on the shape of x.

    Args:
        nibbles: uint8 [N, K], sign and magnitude, 0 to 15.
        scales: uint8 [N, K / 16], with K / 16 rounded up.
        decoding: the decoding of the weights; only its block matters here.

    Raises:
        ValueError: the shapes do not fit each other, a dtype is not uint8, or the block is not 16.
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

    # The axes are: unit, warp, row half, row, unit, group, lane's block, word, code. The transpose below puts them in
    # the order in which lanes read them.
    codes = nibbles.reshape(units[0], 4, 2, 8, units[1], 2, 4, 2, 8).astype(jnp.uint32)
    code_at, sign_at = _bits_of_codes(codes.shape)
    words = jnp.sum((codes & 7) << code_at | (codes >> 3) << sign_at, -1, dtype=jnp.uint32)
    words = lax.bitcast_convert_type(words.transpose(0, 4, 5, 1, 3, 6, 2, 7), jnp.int32)
    bytes_ = scales.reshape(units[0], 4, 2, 8, units[1], 2, 4).transpose(0, 4, 1, 3, 6, 2, 5)
    return words.reshape(*units, 8, 128), lax.bitcast_convert_type(bytes_.reshape(*units, 128, 4), jnp.int32)


def unpack(words: jax.Array, scale_words: jax.Array, n: int, k: int, decoding: Decoding) -> tuple[jax.Array, jax.Array]:
    """Invert `pack`: return nibbles uint8 [n, k] and scales uint8 [n, k / 16].

    Raises:
        ValueError: the words do not have the shapes of packed weights [n, k].
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
    """Return x @ W.T * factor, [M, n] of `out_dtype`, for weights W [n, k] packed by `pack`.

    Args:
        x: float16 or bfloat16 [M, k], with M > 0.
        words, scale_words: the arrays that `pack` returned.
        factor: a float32 scalar array.
        n, k: the shape of W before padding.
        decoding: the decoding of codes and scales.
        out_dtype: float16, bfloat16 or float32.
        tiles: the tiles of the kernel; by default from the table, for the first device, or an H200 if it is not there.
        interpret: True or `InterpretGPUParams`, to run without a GPU. On few processors set NPROC=16 before jax is
            imported, because the interpreter needs a thread for each warpgroup.

    Raises:
        ValueError: `supports` returns a reason, shapes or dtypes do not fit, or the tiles do not fit.
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
    args = words, scale_words, x, jnp.reshape(factor, 1)
    rows = x.shape[0] if interpret else _rows_of_result(m, tiles)
    (out,) = results_of(args, [jax.ShapeDtypeStruct((rows, high), out_dtype)])
    clusters = min(tiles.blocks, x.shape[0] // tiles.m * (high // tiles.n)) // tiles.cluster
    run = plgpu.kernel(
        functools.partial(_kernel, tiles=tiles, decoding=decoding),
        out_type=out,
        grid=(clusters,),
        grid_names=("cluster",),
        # Passed only if needed, because the interpreter of jax 0.10 does not support clusters.
        **({"cluster": (tiles.cluster,), "cluster_names": ("block",)} if tiles.cluster > 1 else {}),
        num_threads=tiles.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types={"memory": _memory(tiles, x.dtype, out.dtype, bool(interpret))},
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name="packed_matmul",
        interpret=_interpreter() if interpret is True else interpret or None,
    )
    return as_result_of(args, run(*args))[:m, :n]  # `plgpu.kernel` forgets the axes


def reference(x: jax.Array, nibbles: jax.Array, scales: jax.Array, factor: jax.Array, decoding: Decoding) -> jax.Array:
    """Compute `matmul` by jax.numpy from unpacked nibbles and scales: float32 [M, N]."""
    w = _weights(nibbles, scales, decoding).astype(x.dtype)
    return jnp.matmul(x, w.T, precision="highest", preferred_element_type=jnp.float32) * factor


# --- the kernel ------------------------------------------------------------------------------------------------------


class _Memory(NamedTuple):
    """The shared memory and barriers of a block; fields that the tiles do not need are None."""

    words: Any  # [stages, n_warpgroups, units of K, 8, 128]
    scales: Any  # [stages, n_warpgroups, units of K, 128]
    x: Any  # [stages, m, K]
    out: Any  # [n_warpgroups, slots, rows, 64]
    loaded: Any  # barrier: a step's operands are loaded
    used: Any  # barrier: all blocks of the cluster have multiplied a step's operands
    sums: Any  # partial sums, [n_warpgroups, k_warpgroups - 1, 64, m]
    summed: Any  # barrier: the partial sums of the other warpgroups are written
    taken: Any  # barrier: they have been read
    staged_w: Any  # for the interpreter only: decoded weights, [warpgroups, 64, 64]
    staged_x: Any  # for the interpreter only: x.T, [warpgroups, 64, m]


def _rows_of_result(m: int, tiles: Tiles) -> int:
    """Return the number of rows of the kernel's result for m rows of x.

    TMA does not write rows beyond the last one, so that the result needs no cropping; the interpreter writes them.
    Mosaic splits rows into groups of 8. If the result has a single group, whole or partial, Mosaic ignores the group's
    index. So if a tile has more than 8 rows, the result must have more than 8 rows too.
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
    """Run one block. Steps are numbered consecutively across tiles; step i uses slot i % stages of the memory."""
    steps = words.shape[1] * UNIT_K // tiles.k
    # A cluster processes tiles that are `cluster` times as wide; each of its blocks computes its part of them.
    tiles_m, tiles_n = x.shape[0] // tiles.m, words.shape[0] // tiles.n_warpgroups // tiles.cluster
    warpgroup = lax.axis_index("warpgroup")
    walk = plgpu.nd_loop((tiles_m * tiles_n,), collective_axes="cluster")

    def place(info):
        """Return the (m, n) index of the tile at this step of the walk.

        Bands of x are processed one after the other, and within a band tiles along x come first, so that concurrent
        blocks share both operands in the L2 cache.
        """
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
            # At its first step a computing warpgroup releases the slot of a step -1 that does not exist, so that it
            # does not have to test for the first step.
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
            free_slot(step)  # waits, so that no barrier has arrivals outstanding when the kernel ends

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
                            # Now only this product is in flight, so the previous step's operands are no longer needed.
                            plgpu.barrier_arrive(memory.used.at[lax.rem(step + tiles.stages - 1, tiles.stages)])

                total = acc[...]
                at_m, at_n = place(info)
                columns = pl.ds((at_n * tiles.n_warpgroups + in_n) * UNIT_N, UNIT_N)
                _write(total, factor, out.at[pl.ds(at_m * tiles.m, tiles.m), columns], memory, tiles, in_n, in_k)

        plgpu.wait_smem_to_gmem(0)


def _write(total, factor, out, memory: _Memory, tiles: Tiles, in_n, in_k):
    """Add the partial sums of the warpgroups that split K, and write them to out [m, 64], a few rows at a time."""
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
    """Return the registers of a computing thread after the loading warpgroup has released most of its own.

    A block starts with equal shares, in multiples of 8, of the multiprocessor's 65536 registers, with at most 240 per
    thread. A request for more registers than are free would wait forever.
    """
    share = min(65536 // (128 * (warpgroups + 1)) // 8 * 8, 240)
    return min((share * (warpgroups + 1) - LOADER_REGISTERS) // warpgroups // 8 * 8, 240)


# --- operations with a separate path for the interpreter -------------------------------------------------------------
# The interpreter does not support PTX, register layouts, wgmma with an operand in registers, copies to several blocks
# or (in jax 0.10) transposed memory.


def _multiply(acc, memory: _Memory, slot, in_n, unit, group, decoding, warpgroup):
    """Add W @ x.T over one group (64 along K) of a unit to acc [64, m]; on return the previous product is complete."""
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
    """Copy an operand that all blocks of a cluster need; each loads a part for all, in the interpreter all of it."""
    if tiles.cluster > 1 and memory.staged_w is None:
        plgpu.copy_gmem_to_smem(source, target, loaded, collective_axes="block")
    else:
        plgpu.copy_gmem_to_smem(source, target, loaded)


def _load(memory: _Memory, ref, layout):
    if memory.staged_w is not None:
        return ref[...]
    # jax 0.10 requires an index argument.
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
    """Return a function that decodes words [4, 128] and scale words [128] to W [64, 64] in wgmma's register layout."""
    import jax.experimental.mosaic.gpu as mgpu

    utils: Any = mgpu.utils
    ir, llvm, vector = utils.ir, utils.llvm, utils.vector  # the bindings of jaxlib that Mosaic itself uses

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
    """Emit the instructions that decode a lane's 32 weights of a group: a block of 16 in each of its two rows.

    Args:
        emit: `emit(instruction, *operands)` issues a PTX instruction on 32-bit registers and constants and returns the
            register of its result. Tests pass a function that computes the result.
        words: words[h][w] holds codes 8w to 8w + 7 of row h.
        scales: the register whose byte 2h + group is row h's scale.
        group: which half of the unit's 128 along K, 0 or 1.

    Returns:
        pairs[j][h]: registers that hold weights 2j (lower half) and 2j + 1 (upper half) of row h as floats of `dtype`.
    """
    if isinstance(decoding, TableDecoding):
        return _decode_lane_by_table(emit, words, scales, group, decoding, dtype)
    half = jnp.dtype(dtype) == jnp.float16
    suffix, shift, mask, bias = ("f16x2", 1, 0x3F803F80, 8) if half else ("bf16x2", 4, 0x07F007F0, 120)
    two_modes = len(decoding.magnitudes) == 2

    def bits(number):  # numbers must be exact in both dtypes
        code = struct.pack("<e", number) if half else struct.pack("<f", number)[2:]
        return int.from_bytes(code, "little")

    def twice(number):
        return bits(number) * 0x10001

    def constant(number):
        return emit("mov.b32", twice(number))

    def multiply(a, b):
        return emit(f"mul.rn.{suffix}", a, b)

    # The lower half holds row 0's scale byte twice, the upper half row 1's. Shifted to the exponent and mantissa of the
    # dtype, a byte reads as |scale| up to the difference of the exponent biases; subnormals read as subnormals.
    byte = emit("prmt.b32", scales, scales, 0x1100 * (2 + group) + 0x11 * group)
    mode = emit("prmt.b32", byte, byte, 0xBB99)  # bit 7, repeated 16 times
    scale = emit("and.b32", emit("shr.u32", byte, shift), mask)
    if not two_modes:
        scale = emit("lop3.b32", scale, byte, 0x80008000, 0xF8)  # a | b & c inserts the sign
    scale = multiply(scale, constant(2.0**bias))
    # E4M3's NaN reads as 480 here. Times `beyond` it is infinite, while 448, the largest scale, is not. The fma
    # multiplies this by 0, which adds NaN for NaN and 0 for other scales.
    beyond = constant(140.0 if half else 1.125 * 2.0**119)
    first, second = twice(decoding.multipliers[0]), twice(decoding.multipliers[-1])
    multiplier = emit("lop3.b32", mode, second, first, 0xCA) if two_modes else emit("mov.b32", first)  # a ? b : c
    scale = emit(f"fma.rn.{suffix}", multiply(scale, beyond), constant(0.0), multiply(scale, multiplier))

    pairs = [[None, None] for _ in range(8)]
    for h, own in enumerate((0x1010, 0x3232)):  # fill both halves from row h's half
        scale_h = emit("prmt.b32", scale, scale, own)
        mode_h = emit("prmt.b32", mode, mode, own)

        def table(at, mode_h=mode_h):
            """Return two registers that hold one byte (bits from `at`) of each magnitude of the block's mode."""
            entries = [bytes(bits(m) >> at & 0xFF for m in magnitudes) for magnitudes in decoding.magnitudes]
            entries = [struct.unpack("<2I", entry) for entry in entries]
            if two_modes:
                return [emit("lop3.b32", mode_h, b, a, 0xCA) for a, b in zip(*entries, strict=True)]
            return [emit("mov.b32", a) for a in entries[0]]

        upper = table(8)
        lower = [] if half else table(0)  # zeros in float16, because magnitudes have three significant bits
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
    """Emit the instructions of `decode_lane` for a table of sixteen values, rounded to `dtype` before scaling.

    A value has two bytes and a table two halves, so four codes take four look-ups. Bit 3 of each code, which the layout
    stores as a sign, selects the half.
    """
    half = jnp.dtype(dtype) == jnp.float16
    suffix, shift, bias = ("f16x2", 1, 15) if half else ("bf16x2", 4, 127)
    mask = 0x10001 * ((2**decoding.bits - 1) << (8 - shift))
    code = struct.Struct("<e" if half else "<f")

    def bits(number):  # rounded to nearest, ties to even
        if half:
            return int.from_bytes(code.pack(number), "little")
        whole = int.from_bytes(code.pack(number), "little")
        return (whole + 0x7FFF + (whole >> 16 & 1)) >> 16

    def constant(number):
        return emit("mov.b32", bits(number) * 0x10001)

    def multiply(a, b):
        return emit(f"mul.rn.{suffix}", a, b)

    byte = emit("prmt.b32", scales, scales, 0x1100 * (2 + group) + 0x11 * group)  # as in `decode_lane`
    masks = []  # for each bit of the mode, lowest first: all ones in a row's half where it is set
    for bit in range(decoding.bits, 8)[: (len(decoding.values) - 1).bit_length()]:
        top = emit("shl.b32", byte, 7 - bit) if bit < 7 else byte
        masks.append(emit("prmt.b32", top, top, 0xBB99))
    scale = multiply(emit("and.b32", emit("shr.u32", byte, shift), mask), constant(2.0 ** (bias - decoding.bias)))
    if decoding.nan is not None:
        # The NaN byte reads as a number above the largest scale. Times `beyond` it is infinite, and times 0 NaN.
        end = 65504.0 if half else float(jnp.finfo(jnp.bfloat16).max)
        beyond = constant(end / (decoding.largest + decoding.unit_at_top / 2))
        scale = emit(f"fma.rn.{suffix}", multiply(scale, beyond), constant(0.0), scale)

    pairs = [[None, None] for _ in range(8)]
    for h, own in enumerate((0x1010, 0x3232)):
        scale_h = emit("prmt.b32", scale, scale, own)
        masks_h = [emit("prmt.b32", m, m, own) for m in masks]

        def table(at, masks_h=masks_h):
            """Return four registers that hold one byte (bits from `at`) of each value of the block's mode."""
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
    """Return the weights by their formula, exact, as float32 [N, K]."""
    if isinstance(decoding, TableDecoding):
        return _table_weights(nibbles, scales, decoding)
    k, two_modes = nibbles.shape[1], len(decoding.magnitudes) == 2
    scale = lax.bitcast_convert_type(scales & 127 if two_modes else scales, jnp.float8_e4m3fn).astype(jnp.float32)
    scale, mode = (jnp.repeat(array, 16, axis=1)[:, :k] for array in (scale, scales >> 7))
    weights = jnp.zeros(nibbles.shape, jnp.float32)
    for i, (magnitudes, multiplier) in enumerate(zip(decoding.magnitudes, decoding.multipliers, strict=True)):
        for code, magnitude in enumerate(magnitudes):  # a kernel may not contain constant arrays
            here = (nibbles & 7 == code) & (mode == i) if two_modes else nibbles & 7 == code
            weights = jnp.where(here, magnitude * multiplier, weights)
    return jnp.where(nibbles > 7, -weights, weights) * scale


def _table_weights(nibbles, scales, decoding):
    """Return the weights of a `TableDecoding` by their formula, rounded once, as float32 [N, K]."""
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
    """Return whether all weights at all scales fit float16's 11 significant bits; E4M3 scales have four."""
    weights = [m * f for ms, f in zip(decoding.magnitudes, decoding.multipliers, strict=True) for m in ms]
    return all(math.frexp(weight * scale)[0] * 2**11 % 1 == 0 for weight in weights for scale in range(8, 16))


# --- layout ----------------------------------------------------------------------------------------------------------


def _bits_of_codes(shape):
    """Return for codes 0 to 7, along the last axis, the first bit of the magnitude and the bit of the sign in a word.

    Magnitudes are selectors of PRMT, four in 16 bits. Signs use the bits that selectors leave free. The signs of codes
    0 to 3 are at the top bits of the four bytes that PRMT returns for these codes; those of codes 4 to 7 are four bits
    lower.
    """
    i = lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
    return 4 * i, 8 * (i % 4) + 7 - 4 * (i // 4)


def _unpacked(words, scale_words):
    """Return the nibbles and scale bytes of whole units."""
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
