"""A traced program as one flat list of equations: which of them makes a value, and which read it.

Called programs are written out, the body of a scan once. Other loops and branches stay single equations.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ifjax.models.equations import inner_jaxpr, is_literal, scan_counts

LAYER = "layer"  # the primitive that stands for one layer's part of what a scan runs over


class Node(NamedTuple):
    """One equation.

    Attributes:
        name: the primitive's name.
        params: its parameters.
        ins: numbers of its operands.
        outs: numbers of its results.
    """

    name: str
    params: Mapping[str, Any]
    ins: tuple[int, ...]
    outs: tuple[int, ...]


class Graph:
    """Values of a program by number.

    Attributes:
        nodes: all equations.
        shapes: shape of each value.
        maker: index in `nodes` of the equation that makes a value, for values that have one.
        readers: for each value, the (index in `nodes`, operand's position) pairs that read it.
        constants: literals and other scalars that the program states.
        kept: values that are results, or that a loop carries on.
        inputs: numbers of the program's inputs.
    """

    def __init__(self, program: Any):
        self.nodes: list[Node] = []
        self.shapes: list[tuple[int, ...]] = []
        self.maker: dict[int, int] = {}
        self.readers: list[list[tuple[int, int]]] = []
        self.constants: dict[int, Any] = {}
        self.kept: set[int] = set()
        self.inputs = [self._new(v) for v in program.jaxpr.invars]
        self.kept.update(self._inline(program, self.inputs))

    def _new(self, v: Any) -> int:
        self.shapes.append(tuple(getattr(v.aval, "shape", ())))
        self.readers.append([])
        return len(self.shapes) - 1

    def _literal(self, atom: Any) -> int:
        number = self._new(atom)
        if np.size(atom.val) == 1:
            self.constants[number] = atom.val
        return number

    def _add(self, name: str, params: Any, ins: list[int], outs: list[int]) -> None:
        at = len(self.nodes)
        self.nodes.append(Node(name, params, tuple(ins), tuple(outs)))
        for position, number in enumerate(ins):
            self.readers[number].append((at, position))
        for number in outs:
            self.maker[number] = at

    def _inline(self, program: Any, inputs: list[int]) -> list[int]:
        """Add a program's equations; return the numbers of its results."""
        jaxpr = program.jaxpr
        env = dict(zip(jaxpr.invars, inputs, strict=True)) | {v: self._new(v) for v in jaxpr.constvars}

        def number(atom):
            return self._literal(atom) if is_literal(atom) else env[atom]

        for eqn in jaxpr.eqns:
            ins, inner = [number(atom) for atom in eqn.invars], inner_jaxpr(eqn)
            if eqn.primitive.name == "scan":
                outs = self._scan(eqn, ins)
            elif inner is not None and all(
                self.shapes[i] == tuple(v.aval.shape) for i, v in zip(ins, inner.jaxpr.invars, strict=True)
            ):
                outs = self._inline(inner, ins)
            else:
                outs = [self._new(v) for v in eqn.outvars]
                self._add(eqn.primitive.name, eqn.params, ins, outs)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [number(atom) for atom in jaxpr.outvars]

    def _scan(self, eqn: Any, ins: list[int]) -> list[int]:
        body = eqn.params["jaxpr"]
        first, carried = scan_counts(eqn.params)
        lead = first + carried
        inner = ins[:first]
        for own, v, out in zip(ins[first:lead], body.jaxpr.invars[first:lead], body.jaxpr.outvars, strict=False):
            inner.append(own if out is v else self._new(v))
            self.kept.update(() if out is v else (own,))
        for own, v in zip(ins[lead:], body.jaxpr.invars[lead:], strict=True):
            inner.append(self._new(v))
            self._add(LAYER, {}, [own], inner[-1:])
        outs = self._inline(body, inner)
        self.kept.update(out for out, start in zip(outs[:carried], inner[first:lead], strict=True) if out != start)
        self.kept.update(outs[carried:])
        return [self._new(v) for v in eqn.outvars]
