"""The one reader of all layouts: tensors in."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jax.typing import ArrayLike, DTypeLike

from ifjax.arrays import DTYPES, QTensor
from ifjax.exchange.blocks import qtensor_of
from ifjax.exchange.layouts import (
    LAYOUTS,
    Blocks,
    Floats,
    Layout,
    Spec,
    decodes_as,
    known_tools,
    layouts_of,
    swapped_nibbles,
)
from ifjax.exchange.recognize import Found, Specs, declared, find
from ifjax.formats import Format, get_format
from ifjax.numerics.byte_order import native

Nibbles = Literal["low_first", "high_first"]


class Reading(NamedTuple):
    """How tensors are read; see `import_tensors`."""

    fmt: Format | None
    nibbles: Nibbles | None
    axis: int
    dtype: np.dtype
    headroom: float
    decode: bool


class Tensors(NamedTuple):
    """What `survey` found among the arrays of a checkpoint: quantized tensors, and the names of all other arrays."""

    found: list[Found]
    rest: list[str]


def import_tensors(
    tensors: Mapping[str, ArrayLike],
    tool: str | Mapping[str, Any] | None = None,
    *,
    fmt: str | Format | None = None,
    nibbles: Nibbles | None = None,
    axis: Literal[-1, -2] = -1,
    dtype: DTypeLike = "float32",
    headroom: float = 1.0,
    decode: bool = False,
) -> dict[str, QTensor | np.ndarray]:
    """Return QTensors, under NAME.weight, of all quantized tensors among `tensors`, and the other arrays as they are.

    Codes and scale bytes come through bit for bit, and so does the fouroversix package's amax. The amax of other tools'
    tensors is the float32 whose factor is the stored one: exporting what was imported gives the stored bytes again.
    For one factor in ten there is no such number; then it is the nearest. A scale byte that is NaN over a block of
    zeros, which is 0 / 0 of the tool that wrote it, is read as 0.

    Args:
        tensors: numpy or jax arrays by name, scales as ml_dtypes' float8 types or, for MX, as uint8.
        tool: one of `ifjax.exchange.TOOLS`, or the model's `quantization_config`. None: by the names, if they decide
            it.
        fmt: the format to read them as: that of the layout unless stated. The fouroversix package's tensors do not say
            theirs, so without its configuration it is needed: "fouroversix" for nvfp4 with an adaptive rule (its
            default), "nvfp4" for static_6, "nvfp4_static4", "if4", and so on.
        nibbles: where the earlier code of a byte lies, if not as the tool declares it.
        axis: -1 for [.., out, in] as stored; -2 for the transposed matrix [.., in, out] with blocks along -2, a Flax
            kernel.
        dtype: what the QTensors stand for, and what is decoded.
        headroom: 16/17 for tensors that the fouroversix package rounded "stochastic_unbiased".
        decode: whether tensors in FP8 with scales become floats. Else their arrays stay as they are.

    Raises:
        ValueError: the layout is unknown, or cannot be decided by what is there; shapes, types or padding contradict
            it; scales with signs in a format without; arrays that belong to a weight and that nothing reads.

    Example:
        >>> import jax.numpy as jnp
        >>> import ifjax
        >>> from ifjax import exchange
        >>> q = ifjax.quantize(jnp.ones((8, 64)), "fouroversix")
        >>> arrays, config = exchange.export_tensors({"up.weight": q}, "modelopt")
        >>> exchange.import_tensors(arrays, config, axis=-2)
        {'up.weight': QTensor(nvfp4, 64x8 float32, axis=-2, 4.562 bits a value)}
    """
    arrays = {name: native(np.asarray(array)) for name, array in tensors.items()}
    specs = {name: Spec.of(array) for name, array in arrays.items()}
    layouts, how = choose(specs, tool, fmt=fmt, nibbles=nibbles, axis=axis, dtype=dtype, headroom=headroom,
                          decode=decode)  # fmt: skip
    tensors_ = survey(specs, layouts)
    return dict(read_all(tensors_, arrays.__getitem__, how))


def choose(specs: Specs, tool: str | Mapping[str, Any] | None, **settings: Any) -> tuple[tuple[Layout, ...], Reading]:
    """Return the layouts to look for, and how to read them; arguments and errors as for `import_tensors`."""
    fmt, nibbles, axis = settings.get("fmt"), settings.get("nibbles"), settings.get("axis", -1)
    if isinstance(tool, Mapping):
        layouts, says = declared(tool)
        fmt = says.fmt if fmt is None else fmt
    else:
        layouts = _layouts_by_names(specs, nibbles) if tool is None else layouts_of(tool)
    if nibbles not in (None, "low_first", "high_first"):
        raise ValueError(f"nibbles must be 'low_first', 'high_first' or None, got {nibbles!r}")
    if axis not in (-1, -2):
        raise ValueError(f"axis must be -1 ([out, in], as stored) or -2 (the transposed matrix), got {axis}")
    dtype = np.dtype(settings.get("dtype", "float32"))
    if dtype.name not in DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    if fmt is not None:
        fmt = get_format(fmt)
        fits = [_reads_as(layout, fmt) for layout in layouts]
        if not any(fits):
            names = ", ".join(lay.name for lay in layouts)
            raise ValueError(f"{names} cannot be read as {fmt.name}: leave out fmt")
        layouts = tuple(lay for _, lay in sorted(zip(fits, layouts, strict=True), key=lambda pair: not pair[0]))
    return layouts, Reading(fmt, nibbles, axis, dtype, settings.get("headroom", 1.0), settings.get("decode", False))


def survey(specs: Specs, layouts: Sequence[Layout]) -> Tensors:
    """Return the tensors in these layouts and the rest, from what headers say.

    Raises:
        ValueError: arrays that look like the layouts' and are not, or that change what a weight means.
    """
    found, missed = find(specs, layouts)
    for miss in missed:
        raise ValueError(f"{miss.name}: {miss.reason}")
    used = {name for f in found for name in f.arrays if name is not None}
    tails = {part.tail for layout in layouts for part in layout.parts if part.name.startswith("{}.")} - {"weight"}
    read = {f.name for f in found}
    for name in specs:
        layer, _, tail = name.rpartition(".")
        beside = tail.startswith("weight_") and (f"{layer}.weight" if layer else "weight") in read
        # Zero points, orders of columns, scales of inputs that were folded in, scales of weights in other formats.
        if name not in used and (beside or tail in tails or tail == "pre_quant_scale"):
            tool = layouts[0].tool
            raise ValueError(
                f"{name} changes what its layer's weight means, and is not known beside it: {tool} has stored another "
                f"format there than {', '.join(dict.fromkeys(lay.algorithm for lay in layouts))}; decode it there"
            )
    rest = [name for name in specs if name not in used]
    if twice := read & set(rest):
        raise ValueError(f"{sorted(twice)} are there both packed and unpacked: remove one of the two")
    return Tensors(found, rest)


def read_all(
    tensors: Tensors, array: Callable[[str], np.ndarray], how: Reading
) -> Iterator[tuple[str, QTensor | np.ndarray]]:
    """Yield all tensors of a checkpoint by their names, the quantized ones first."""
    for found in tensors.found:
        value = read(found, array, how)
        if isinstance(value, QTensor):
            yield found.name, value
        elif how.decode:
            yield found.name, whole(value, how)
        else:
            check_kept(found)
            yield from ((name, array(name)) for name in found.arrays if name is not None)
    yield from ((name, array(name)) for name in tensors.rest)


def check_kept(found: Found) -> None:
    """Raise if a tensor that is read as floats cannot stay as it is."""
    if found.layout.container != "safetensors":
        raise ValueError(
            f"{found.name} is {found.layout.algorithm}, which has no format here: decode=True makes floats of it"
        )


def read(found: Found, array: Callable[[str], np.ndarray], how: Reading) -> QTensor | Floats:
    """Return a quantized tensor of a checkpoint, from the functions that read its arrays.

    Raises:
        ValueError: what is wrong with it, with its name.
    """
    with named(found):
        value, fmt = as_stored(found, array, how)
        if isinstance(value, Floats):
            return value
        assert fmt is not None
        return qtensor_of(value, found.layout, fmt, how.axis, how.dtype, how.headroom)


@contextlib.contextmanager
def named(found: Found) -> Iterator[None]:
    """Put a tensor's name before errors."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{found.arrays[0]}: {error}") from error


def as_stored(
    found: Found, array: Callable[[str], np.ndarray], how: Reading
) -> tuple[Blocks, Format] | tuple[Floats, None]:
    """Return what `read` checks and makes a QTensor of, [.., out, in] as stored, and its format."""
    arrays = [None if name is None else array(name) for name in found.arrays]
    fmt = record_of(found.layout, how)
    if how.nibbles == "high_first" and fmt is not None and fmt.bits == 4 and arrays[0] is not None:
        arrays[0] = swapped_nibbles(arrays[0])
    assert found.layout.read is not None
    value = found.layout.read(fmt, *arrays)
    if isinstance(value, Floats):
        return value, None
    assert fmt is not None
    return value, fmt


def record_of(layout: Layout, how: Reading) -> Format | None:
    """Return the format that a layout's tensors are read as; None for those that are read as floats.

    Raises:
        ValueError: nothing says it.
    """
    if layout.floats:
        return None
    if how.fmt is not None and _reads_as(layout, how.fmt):
        return how.fmt
    if layout.fmt is None:
        raise ValueError(
            f"{layout.tool}'s tensors do not say their format: state fmt=, such as 'fouroversix' for NVFP4 with an "
            "adaptive scale rule, 'nvfp4' or 'if4'"
        )
    return layout.record


def _reads_as(layout: Layout, fmt: Format) -> bool:
    return not layout.floats and (layout.fmt is None or decodes_as(fmt, layout.record))


def whole(floats: Floats, how: Reading) -> np.ndarray:
    """Return all values of `Floats` as an array, the last two axes exchanged for axis -2."""
    *batch, rows, columns = floats.shape
    values = floats.rows(0, int(np.prod(batch)) * rows).reshape(*batch, rows, columns).astype(how.dtype)
    return values if how.axis == -1 else np.ascontiguousarray(values.swapaxes(-1, -2))


def _layouts_by_names(specs: Specs, nibbles: Nibbles | None) -> tuple[Layout, ...]:
    readable = [layout for layout in LAYOUTS.values() if layout.read is not None]
    found, _ = find(specs, readable)
    sure = [f.layout for f in found if f.layout.doubt is None]
    if nibbles is not None:
        sure = sure or [f.layout for f in found]
    if sure:
        return layouts_of(sure[0].tool)
    if found:
        raise ValueError(found[0].layout.doubt)
    raise ValueError(
        "the names are of no layout that is known here, so what the bytes mean cannot be decided: state tool=, one of "
        f"{', '.join(map(repr, known_tools()))}"
    )
