"""Partition of kernels among devices: XLA divides the arrays of a jitted program, and each device runs on its part.

XLA would gather sharded arrays for a kernel, whose inside it does not see. A sharding rule tells it which axes of
operands and results correspond, and which pieces must stay whole: blocks, squares, and runs that are rotated.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The pieces of matrices [L, R, C] that devices may hold: whole blocks of whole matrices' rows or columns.

    Attributes:
        shape: (L, R, C).
        axis: the blocked axis, -1 or -2.
        block: the number of values of a block.
        run: the number of values along the blocked axis that must be on one device, a multiple of `block`.
        is_square: whether `block` rows or columns across must be on one device, too.
    """

    shape: tuple[int, ...]
    axis: int
    block: int
    run: int
    is_square: bool = False

    def along(self, width: int) -> str:
        """Return the factors of a blocked axis with `width` entries a block."""
        if not _has_parts(self.shape[self.axis], self.run):
            return f"whole{width}"
        size = self.run // self.block * width
        return "m" if size == 1 else f"(m run{size})"

    @property
    def across(self) -> str:
        """The factors of the other axis."""
        if not self.is_square:
            return "n"
        has_parts = _has_parts(self.shape[-3 - self.axis], self.block)
        return f"(n run{self.block}s)" if has_parts else "wholes"

    def axes(self, width: int) -> tuple[str, str]:
        """Return the factors of the last two axes of an array with `width` entries a block along the blocked axis."""
        across, along = self.across, self.along(width)
        return (across, along) if self.axis == -1 else (along, across)

    def matrix(self, width: int) -> str:
        """Return the factors of an array [L, R, C] with `width` entries a block along the blocked axis."""
        return " ".join(("l", *self.axes(width)))

    def shared(self, a: Any) -> str:
        """Return the factors of an array [L, ...] with numbers of each matrix, or [1, ...] with those of all."""
        first, *rest = (f"whole{n}x" for n in a.shape)
        return " ".join(("l" if a.shape[0] == self.shape[0] else first, *rest))

    @property
    def sizes(self) -> dict[str, int]:
        """The number of runs along the blocked axis, and of squares across."""
        sizes = {"m": self.shape[self.axis] // self.run}
        return sizes | ({"n": self.shape[-3 - self.axis] // self.block} if self.is_square else {})


def partitioned(
    run: Callable[..., Sequence[jax.Array]], args: Sequence[jax.Array], ins: Sequence[str], outs: Sequence[str],
    sizes: dict[str, int],
) -> list[jax.Array]:  # fmt: skip
    """Return run(*args), which each device computes from its parts of the arrays.

    Args:
        run: a function that returns a sequence of arrays; of parts it returns the parts of the results.
        ins, outs: the factors of each operand and result, as in `custom_partitioning`'s rules. The first factor of an
            axis may be divided, unless its name begins with "whole". The first operand's sharding decides.
        sizes: the sizes of "m" and "n", where they are the first of several factors.

    Libtpu does not let custom calls be partitioned (jax-ml/jax#38196), so on TPUs the first operand's sharding must be
    part of its type.
    """
    names = list(dict.fromkeys(re.findall(r"\w+", " ".join([*ins, *outs]))))
    alone = re.sub(r"\([^)]*\)", "", " ".join([*ins, *outs])).split()  # a whole axis each, whose size is known
    known = sizes | {name: int(re.sub(r"\D", "", name)) for name in names if name.startswith("run")}

    def local(*args):
        return tuple(run(*args))

    def specs(mesh, spec, texts):
        """Return the PartitionSpecs of arrays, given that of the first operand."""
        held = {}
        for name, on in zip(_first_factors(ins[0]), spec, strict=True):
            parts = math.prod(mesh.shape[axis] for axis in (on if isinstance(on, tuple) else (on,)) if axis is not None)
            if not name.startswith("whole") and known.get(name, 0) % parts == 0:
                held[name] = on
        return tuple(PartitionSpec(*map(held.get, _first_factors(text))) for text in texts)

    def partition(mesh, operands, results):
        if mesh.empty:  # the compiler's own division, which follows the rule
            return mesh, local, *(jax.tree.map(lambda a: a.sharding, each) for each in (results, operands))
        spec = operands[0].sharding.spec
        both = (tuple(NamedSharding(mesh, s) for s in specs(mesh, spec, texts)) for texts in (outs, ins))
        return mesh, local, *both

    if has_known_parts(args[0]):
        mesh, spec = jax.typeof(args[0]).sharding.mesh, jax.typeof(args[0]).sharding.spec
        of_args, of_results = (specs(mesh, spec, texts) for texts in (ins, outs))
        args = [jax.reshard(a, s) for a, s in zip(args, of_args, strict=True)]
        return list(jax.shard_map(local, in_specs=of_args, out_specs=of_results, check_vma=False)(*args))
    call = custom_partitioning(local)
    call.def_partition(
        partition=partition,
        sharding_rule=f"{', '.join(ins)} -> {', '.join(outs)}",
        need_replication_factors=tuple(name for name in names if name.startswith(("run", "whole"))),
        **{name: size for name, size in known.items() if name in names and name not in alone},  # pyright: ignore
    )
    return list(call(*args))


def everywhere(run: Callable[..., Any], *args: jax.Array) -> Any:
    """Return run(*args), which each device computes from whole arrays if their sharding is part of their type."""
    if not has_known_parts(args[0]):
        return run(*args)
    whole = PartitionSpec()
    args = tuple(jax.reshard(a, whole) for a in args)
    return jax.shard_map(run, in_specs=whole, out_specs=whole, check_vma=False)(*args)


def has_known_parts(a: Any) -> bool:
    """Return whether an array's sharding is part of its type, over all axes of a mesh."""
    types = jax.typeof(a).sharding.mesh.axis_types
    return bool(types) and all(each == AxisType.Explicit for each in types)


def _has_parts(length, run):
    return length % run == 0 and length > run


def _first_factors(text):
    """Return the first factor of each axis."""
    return re.sub(r"\((\w+)[^)]*\)", r"\1", text).split()
