"""Which arrays of a checkpoint make up quantized tensors, and in whose layout: by names, types and shapes alone."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ifjax.exchange.layouts import LAYOUTS, WEIGHTS, Declared, Layout, Spec

Specs = Mapping[str, Spec]

# Types that hold codes rather than values; 64 bits are positions.
_CODES = re.compile(r"[IU](8|16|32)|F8_.*|F4.*|F6.*")
# Last parts of names, in whole words, of what belongs to codes beside them.
_BESIDE = re.compile(
    r"(^|[._:/])(scales?|zeros?|zps?|biases|absmax|scb|inv|g_idx|codebooks?|centroids?|lut|shift|min|max|quant_map|"
    r"factors?|zero_points?|scale_2|shape)($|[._:/\d])", re.IGNORECASE,
)  # fmt: skip


class Found(NamedTuple):
    """A quantized tensor of a checkpoint.

    Attributes:
        layout: in which it is stored.
        layer: the layer's name.
        arrays: the names of its arrays, in the order of the layout's parts; None for one that is missing.
    """

    layout: Layout
    layer: str
    arrays: tuple[str | None, ...]

    @property
    def name(self) -> str:
        """The tensor's own name."""
        return self.layout.plain_name(self.layer)


class NearMiss(NamedTuple):
    """An array with the name of a layout's codes, and what keeps it from being one: at which check, and why."""

    layout: Layout
    name: str
    stage: int
    reason: str


def recognize(specs: Specs, layouts: Iterable[Layout] | None = None) -> list[Found]:
    """Return the quantized tensors among the arrays of a checkpoint, in the order of its names.

    Args:
        specs: of all arrays, by name.
        layouts: those to look for; all of `LAYOUTS` unless given.
    """
    return find(specs, LAYOUTS.values() if layouts is None else layouts)[0]


def find(specs: Specs, layouts: Iterable[Layout]) -> tuple[list[Found], list[NearMiss]]:
    """Return what `recognize` does, and names that are a layout's where types, shapes or other arrays are not."""
    found: dict[str, Found] = {}
    missed: dict[str, NearMiss] = {}
    for layout in layouts:
        for name in specs:
            layer = layout.parts[0].layer_of(name)
            if layer is None:
                continue
            arrays = tuple(part.of(layer) if part.of(layer) in specs else None for part in layout.parts)
            stage, reason = _fault_of(layout, arrays, specs)
            if reason is None:
                new = Found(layout, layer, arrays)
                if name not in found or _fullness(new) > _fullness(found[name]):
                    found[name] = new
            elif reason and (name not in missed or missed[name].stage < stage):
                missed[name] = NearMiss(layout, name, stage, reason)
    used = {name for f in found.values() for name in f.arrays}
    order = {name: i for i, name in enumerate(specs)}
    return (
        sorted(found.values(), key=lambda f: order[f.arrays[0] or ""]),
        [miss for name, miss in missed.items() if name not in used],
    )


def _fullness(found: Found) -> tuple[int, bool]:
    return sum(name is not None for name in found.arrays), found.layout.read is not None


def _fault_of(layout: Layout, arrays: tuple[str | None, ...], specs: Specs) -> tuple[int, str | None]:
    """Why these arrays are no tensor of a layout; "" if nothing but a common name speaks for it; None if they are.

    The number tells how near they are: which of the checks they fail.
    """
    parts = [(part, None if name is None else specs[name]) for part, name in zip(layout.parts, arrays, strict=True)]
    first, codes = parts[0]
    assert codes is not None
    own_name = first.name not in ("{}", "{}.weight", layout.plain)
    if first.dtypes and codes.dtype not in first.dtypes:
        return 0, f"needs {first.tail} of type {' or '.join(first.dtypes)}, got {codes.dtype}" if own_name else ""
    for part, spec in parts[1:]:
        if spec is not None and part.dtypes and spec.dtype not in part.dtypes:
            return 1, f"its {part.tail} is {spec.dtype}, and {layout.algorithm} has {' or '.join(part.dtypes)}"
    missing = [part for part, spec in parts if spec is None and not part.optional]
    if missing:
        alone = len(missing) == sum(not part.optional for part, _ in parts[1:])
        return 2, "" if first.name == "{}" and alone else f"{missing[0].tail} is missing beside it"
    given = tuple(spec for _, spec in parts)
    if layout.fits_specs(given):
        return 4, None
    shapes = " and ".join(f"{spec.dtype} {tuple(spec.shape)}" for spec in given[:2] if spec is not None)
    block = "factors of rows or blocks" if layout.floats else f"blocks of {layout.record.block}"
    return 3, f"{shapes} do not make {block}, as in {layout.algorithm}"


def companions(specs: Specs) -> dict[str, str]:
    """Return why arrays are not weights by themselves but parts of quantized tensors, by their names.

    They are recognized by the names of `LAYOUTS`, or by a neighbour. Beside codes, of an integer or FP8 type and with
    two axes or more, everything that is named as scales, zeros and the like belongs to the codes; and so does,
    directly in the module of the codes, whatever is named otherwise than weights are.
    """
    reasons = {}
    for found in recognize(specs):
        reasons |= {name: f"part of a tensor that is quantized already ({found.layout.name})"
                    for name in found.arrays if name is not None}  # fmt: skip
    layers: dict[str, list[str]] = {}
    for name, spec in specs.items():
        if len(spec.shape) > 1 and _CODES.fullmatch(spec.dtype):
            layers.setdefault(_module(name), []).append(name)
    for name in specs:
        parents = [name[:i] for i, letter in enumerate(name) if letter in "._:/"]
        of = next((code for p in reversed(parents) for code in layers.get(p.rstrip("._:/"), ()) if code != name), None)
        of = of or next((p for p in parents if p in specs and _CODES.fullmatch(specs[p].dtype)), None)
        of = of or next((code for code in layers.get("", ()) if code != name and not _module(name)), None)
        if of is None or name in reasons:
            continue
        if _BESIDE.search(name[_common(name, of) :]) or _is_beside(name, of, specs):
            reasons[name] = f"it stands beside {of}, which is {specs[of].dtype} and quantized already"
            reasons.setdefault(of, f"its type {specs[of].dtype} and {name} beside it tell that it is quantized already")
    return reasons


def _module(name: str) -> str:
    return name[: max(name.rfind("."), name.rfind("/"), 0)]


def _is_beside(name: str, codes: str, specs: Specs) -> bool:
    """Whether a matrix has no weight's name, and stands in a module whose codes have none of a mask or of positions."""
    module, last = _module(name), re.split("[./]", name)[-1]
    of = re.findall("[a-z]+", re.split("[./]", codes)[-1].lower())
    return (
        bool(module) and module == _module(codes) and len(specs[name].shape) > 1 and last not in (*WEIGHTS, "bias")
        and not set(of) & {"mask", "masks", "bias", "index", "indices", "ids", "position", "positions"}
    )  # fmt: skip


def _common(name: str, other: str) -> int:
    """Where the last parts of two names begin."""
    module = _module(other)
    return len(module) if name.startswith(module) else 0


def declared(config: Mapping[str, Any]) -> tuple[tuple[Layout, ...], Declared]:
    """Return the layouts that a `quantization_config` declares (for ModelOpt also hf_quant_config.json).

    Raises:
        ValueError: it declares something else than a known layout.
    """
    found: dict[Layout, Declared] = {}
    try:
        for layout in LAYOUTS.values():
            if layout.declares is not None and (says := layout.declares(layout, config)) is not None:
                found[layout] = says
        inner = config.get("quantization", config)
        method = config.get("quant_method") or ("modelopt" if "quant_algo" in inner else None)
        algorithm = inner.get("quant_algo") or inner.get("format") or inner.get("mode")
    except (AttributeError, TypeError) as error:
        raise ValueError(f"not a quantization_config, nor an hf_quant_config.json: {config!r:.200}") from error
    if not found:
        known = ", ".join(lay.name for lay in LAYOUTS.values() if lay.declares is not None)
        raise ValueError(
            f"quantization by {method!r} in {algorithm!r} is not known here, only {known}: others give the same names "
            "and bytes another meaning"
        )
    return tuple(found), Declared(next((says.fmt for says in found.values() if says.fmt), None))
