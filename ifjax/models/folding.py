"""Where a change of basis of a product's inputs can go instead: into the parameters that make these inputs.

    program -> graph -> from a weight to its product -> from the product's input back to parameters

Division of the input's channels passes through everything that is linear in the input, or that keeps each channel's
positive factor, such as a product with other data, a sum of two values that are both divided, or a ReLU. A rotation
needs the operations to treat all channels of a run alike. Every other reader of a value on the way must undo the change
as well: it is a product whose weights take the change, too, or it reads other channels.

Channels are tracked by labels: the label of a value is an int array that broadcasts to it and says which channel of the
input each entry belongs to; entries below zero are not changed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ifjax.arrays.shaping import reshape_groups
from ifjax.models.equations import ALIKE
from ifjax.models.graph import LAYER, Graph, Node
from ifjax.models.transforms import Transform

_SUMS = {"add", "add_any", "sub"}


class CannotFold(Exception):
    """The change has to be made at each call; the message says why."""


class Producer(NamedTuple):
    """A parameter that makes the inputs.

    Attributes:
        label: channel of each of its entries, as an array that broadcasts to it; below zero: unchanged.
        offset: constant that the program adds to the parameter before use, such as 1 in (1 + scale).
    """

    label: np.ndarray
    offset: float = 0.0


class Fold(NamedTuple):
    """What takes a change of basis in place of the product's inputs.

    Attributes:
        members: parameters, by path, of products of this input whose weights take the change.
        producers: parameters that make the input, by path.
    """

    members: tuple[str, ...]
    producers: Mapping[str, Producer]


class Folder:
    """Finds producers in one program.

    Args:
        program: a ClosedJaxpr whose first inputs are the parameters.
        paths: the parameters' paths, in this order.
        takes: a function of the paths of two parameters that read the same input and of the axis that the second one
            contracts. It raises CannotFold if the second one's weights cannot take the change of the first one's.
    """

    def __init__(self, program: Any, paths: Sequence[str], takes: Callable[[str, str, int], None]):
        self.graph, self.takes = Graph(program), takes
        self.parameters = dict(zip(self.graph.inputs, paths, strict=False))
        self.numbers = {path: number for number, path in self.parameters.items()}

    def find(self, path: str, axis: int, run: int | None = None) -> Fold:
        """Return what takes the change of the inputs that the parameter at a path multiplies along an axis.

        Args:
            path: the parameter's path.
            axis: its contracted axis whose channels are changed.
            run: length of the runs of channels that are rotated; None for a division of each channel.

        Raises:
            CannotFold: something else reads the inputs or what they are made of; no parameter makes them.
        """
        number, shape = self.numbers[path], self.graph.shapes[self.numbers[path]]
        channels = np.arange(shape[axis]).reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])
        x, label = self._input(number, channels)
        search = _Search(self, path, axis, run)
        found = search.back(x, label, None)
        if not found:
            raise CannotFold("no parameter makes its input")
        return Fold(tuple(search.members), {self.parameters[n]: producer for n, producer in found.items()})

    def _input(self, number: int, label: np.ndarray) -> tuple[int, np.ndarray]:
        """Return the other operand of a parameter's only product, and its label, given the parameter's."""
        while True:
            readers = self.graph.readers[number]
            if len(readers) != 1 or number in self.graph.kept:
                raise CannotFold("the program reads the weight more than once")
            at, position = readers[0]
            node = self.graph.nodes[at]
            if node.name == "dot_general":
                return node.ins[1 - position], across(self.graph, node, position, label)
            if len(node.outs) != 1:
                raise CannotFold("the program takes the weight apart")
            number, label = node.outs[0], forward(self.graph, node, label)


class _Search:
    """One walk from a product's input back to parameters."""

    def __init__(self, folder: Folder, path: str, axis: int, run: int | None):
        self.graph, self.folder, self.path, self.axis, self.run = folder.graph, folder, path, axis, run
        self.members: dict[str, None] = {}
        self._depth = 0

    def back(self, number: int, label: np.ndarray, reader: tuple[int, int] | None) -> dict[int, Producer]:
        """Return the parameters that change for this value to change; `reader` is the read that the walk comes from."""
        if (label < 0).all():
            return {}
        self._check_readers(number, label, reader)
        if number in self.folder.parameters:
            self._check_parameter(label)
            return {number: Producer(label)}
        at = self.graph.maker.get(number)
        if at is None:
            raise CannotFold("an input of the function, or a value that a loop carries, makes its input")
        self._depth += 1
        if self._depth > 500:
            raise CannotFold("no parameter is near")
        found = self._through(at, self.graph.nodes[at], number, label)
        self._depth -= 1
        return found

    def _through(self, at: int, node: Node, number: int, label: np.ndarray) -> dict[int, Producer]:
        graph, name = self.graph, node.name
        if name == "dot_general":
            return self._first(at, node, self._factors(node, label), label, self._factor)
        if name == "mul":
            return self._first(at, node, (0, 1), label, self._multiplied)
        if name == "div":
            return self._multiplied(at, node, 0, label)
        if name in _SUMS:
            return self._sum(at, node, label)
        if name == "max" and self.run is None and any(is_zero(graph, i) for i in node.ins):
            side = 1 if is_zero(graph, node.ins[0]) else 0
            return self.back(node.ins[side], label, (at, side))
        return self.back(node.ins[0], backward(graph, node, number, label), (at, 0))

    def _first(self, at, node, sides, label, walk) -> dict[int, Producer]:
        """Return what the first operand gives by which the walk ends in parameters."""
        reasons, depth = [], self._depth
        for side in sides:
            members = dict(self.members)
            try:
                return walk(at, node, side, label)
            except CannotFold as error:
                self.members, self._depth = members, depth
                reasons.append(error)
        raise reasons[-1]

    def _multiplied(self, at, node, side, label):
        if self.run is not None and not constant_along(self.graph, node.ins[1 - side], label):
            raise CannotFold(f"{node.name} treats the channels of a run unlike")
        return self.back(node.ins[side], label, (at, side))

    def _factors(self, node, label) -> list[int]:
        """Return the operands of a product that have all of the label's channels."""
        sides = [side for side in (0, 1) if all(label.shape[i] == 1 for i in self._free(node)[1 - side])]
        if not sides:
            raise CannotFold("its channels come from both operands of a product")
        return sides

    def _free(self, node) -> tuple[range, range]:
        """Return the axes of a product's result that each operand alone has."""
        (contracted, _), (batch, _) = node.params["dimension_numbers"]
        count, ndim = len(batch), len(self.graph.shapes[node.outs[0]])
        middle = len(self.graph.shapes[node.ins[0]]) - len(contracted)
        return range(count, middle), range(middle, ndim)

    def _factor(self, at, node, side, label):
        contracted, batch = node.params["dimension_numbers"]
        shape, count, own = self.graph.shapes[node.ins[side]], len(batch[0]), self._free(node)[side]
        free = [i for i in range(len(shape)) if i not in (*contracted[side], *batch[side])]
        if self.run is not None and any(not within(label, i, self.run) for i in range(count)):
            raise CannotFold("a run of channels lies across the batches of a product")
        places = dict(zip((*batch[side], *free), (*range(count), *own), strict=True))
        return self.back(
            node.ins[side],
            label.transpose([*places.values(), *[i for i in range(label.ndim) if i not in places.values()]])
            .reshape([label.shape[i] for i in places.values()] + [1] * len(contracted[side]))
            .transpose(np.argsort([*places, *contracted[side]])),
            (at, side),
        )

    def _sum(self, at, node, label):
        found: dict[int, Producer] = {}
        for side in (0, 1):
            offset = constant_of(self.graph, node.ins[side])
            if offset is not None and self.run is None:
                if offset == 0:
                    continue
                (number, producer), *more = self.back(node.ins[1 - side], label, (at, 1 - side)).items()
                if more or producer.offset or node.name == "sub" or not self._only_moved(node.ins[1 - side]):
                    raise CannotFold(f"{node.name} with a constant")
                return {number: producer._replace(offset=float(offset))}
        for side in (0, 1):
            if is_zero(self.graph, node.ins[side]):
                continue
            for number, producer in self.back(node.ins[side], label, (at, side)).items():
                if number in found:
                    raise CannotFold("a parameter enters it twice")
                found[number] = producer
        return found

    def _only_moved(self, number: int) -> bool:
        """Return whether a value is a parameter, rearranged at most."""
        while number not in self.folder.parameters:
            at = self.graph.maker.get(number)
            if at is None or not moves(self.graph.nodes[at]):
                return False
            number = self.graph.nodes[at].ins[0]
        return True

    def _check_readers(self, number: int, label: np.ndarray, reader: tuple[int, int] | None) -> None:
        if number in self.graph.kept:
            raise CannotFold("its input is a result of the function, or a loop carries it on")
        for other in self.graph.readers[number]:
            if other != reader and not self._undoes(other, label):
                raise CannotFold(f"{self.graph.nodes[other[0]].name} reads the input, or what it is made of, too")

    def _undoes(self, reader: tuple[int, int], label: np.ndarray) -> bool:
        """Return whether a reader of changed entries multiplies them by weights that take the change."""
        at, position = reader
        node = self.graph.nodes[at]
        if node.name == "dot_general":
            number, label = node.ins[1 - position], across(self.graph, node, position, label)
            while number not in self.folder.parameters:
                at = self.graph.maker.get(number, -1)
                if at < 0 or not moves(self.graph.nodes[at]) or len(self.graph.readers[number]) > 1:
                    return False
                label, number = backward(self.graph, self.graph.nodes[at], number, label), self.graph.nodes[at].ins[0]
            return self._joins(self.folder.parameters[number], number, label)
        if not moves(node):
            return False
        for out in node.outs:
            moved = forward(self.graph, node, label, node.outs.index(out))
            if (moved < 0).all():
                continue
            if out in self.graph.kept or not all(self._undoes(r, moved) for r in self.graph.readers[out]):
                return False
        return True

    def _joins(self, path: str, number: int, label: np.ndarray) -> bool:
        shape = self.graph.shapes[number]
        own = [i for i in range(len(shape)) if label.shape[i] > 1]
        if len(own) != 1 or not np.array_equal(label.reshape(-1), np.arange(label.size)):
            return False
        if len(self.graph.readers[number]) != 1 or number in self.graph.kept:
            return False
        if path != self.path:
            self.folder.takes(self.path, path, own[0] - len(shape))
        elif own[0] != self.axis % len(shape):
            return False
        self.members[path] = None
        return True

    def _check_parameter(self, label: np.ndarray) -> None:
        count = self.graph.shapes[self.folder.numbers[self.path]][self.axis]
        if self.run is not None and not np.array_equal(np.sort(label[label >= 0]), np.arange(count)):
            raise CannotFold("a parameter has only a part of the channels, or repeats them")


_MOVES = {"transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "slice", "split", LAYER}


def moves(node: Node) -> bool:
    """Return whether an equation only rearranges its one operand, as floats."""
    if node.name == "convert_element_type" and not jnp.issubdtype(node.params["new_dtype"], jnp.floating):
        return False
    return (node.name in ALIKE or node.name in _MOVES) and len(node.ins) == 1


def across(graph: Graph, node: Node, position: int, label: np.ndarray) -> np.ndarray:
    """Return the label of a product's other operand, given that of the operand at a position.

    Raises:
        CannotFold: channels lie along axes that the product does not contract.
    """
    contracted, _ = node.params["dimension_numbers"]
    own, other = contracted[position], contracted[1 - position]
    if any(label.shape[i] > 1 for i in range(label.ndim) if i not in own):
        raise CannotFold("the product does not contract its channels")
    ndim = len(graph.shapes[node.ins[1 - position]])
    made = label.transpose([*own, *[i for i in range(label.ndim) if i not in own]])
    made = made.reshape([label.shape[i] for i in own] + [1] * (ndim - len(other)))
    return made.transpose(np.argsort([*other, *[i for i in range(ndim) if i not in other]]))


def forward(graph: Graph, node: Node, label: np.ndarray, out: int = 0) -> np.ndarray:
    """Return the label of a result of an equation that rearranges its first operand, given the operand's.

    Raises:
        CannotFold: the equation does more.
    """
    name, old, new = node.name, graph.shapes[node.ins[0]], graph.shapes[node.outs[out]]
    if not moves(node):
        raise CannotFold(f"{name} comes between")
    if name in ALIKE:
        return label
    if name == LAYER and label.shape[0] == 1:
        return label[0]
    if name == "transpose":
        return label.transpose(node.params["permutation"])
    if name in ("reshape", "squeeze", "expand_dims"):
        return _regrouped(label, old, new)
    if name in ("slice", "split"):
        parts = zip(label.shape, _slices(graph, node, out), strict=True)
        return label[tuple(slice(None) if n == 1 else part for n, part in parts)]
    if name == "broadcast_in_dim":
        shape = [1] * len(new)
        for i, j in enumerate(node.params["broadcast_dimensions"]):
            shape[j] = label.shape[i]
        return label.reshape(shape)
    raise CannotFold(f"{name} comes between")


def backward(graph: Graph, node: Node, number: int, label: np.ndarray) -> np.ndarray:
    """Return the label of an equation's first operand, given that of a result which rearranges it.

    Raises:
        CannotFold: the equation does more, or repeats channels.
    """
    name, new = node.name, graph.shapes[number]
    old = graph.shapes[node.ins[0]] if node.ins else ()
    if not moves(node) and name != "neg":
        raise CannotFold(f"{name} comes between")
    if name in ALIKE or name == "neg":
        return label
    if name == LAYER:
        return label[None]
    if name == "transpose":
        return label.transpose(np.argsort(node.params["permutation"]))
    if name in ("reshape", "squeeze", "expand_dims"):
        return _regrouped(label, new, old)
    if name in ("slice", "split"):
        slices = _slices(graph, node, node.outs.index(number))
        cut = [s != slice(0, n, 1) for s, n in zip(slices, old, strict=True)]
        wide = np.full([n if c else m for n, c, m in zip(old, cut, label.shape, strict=True)], -1)
        wide[tuple(s if c else slice(None) for s, c in zip(slices, cut, strict=True))] = label
        return wide
    if name == "broadcast_in_dim":
        places = node.params["broadcast_dimensions"]
        for j in range(len(new)):
            repeated = j not in places or old[places.index(j)] != new[j]
            if repeated and label.shape[j] > 1:
                if (label != label.take([0], j)).any():
                    raise CannotFold("one value is repeated for several channels")
                label = label.take([0], j)
        return label.reshape([label.shape[j] for j in places])
    raise CannotFold(f"{name} comes between")


def _slices(graph: Graph, node: Node, out: int) -> list[slice]:
    """Return the parts of the operand's axes that the result of a slice or split has."""
    params, old = node.params, graph.shapes[node.ins[0]]
    if node.name == "slice":
        strides = params["strides"] or [1] * len(old)
        return [slice(*ends) for ends in zip(params["start_indices"], params["limit_indices"], strides, strict=True)]
    start = int(sum(params["sizes"][:out]))
    return [slice(start, start + int(params["sizes"][out]), 1) if i == params["axis"] else slice(0, n, 1)
            for i, n in enumerate(old)]  # fmt: skip


def _regrouped(label: np.ndarray, old: Sequence[int], new: Sequence[int]) -> np.ndarray:
    """Return the label after a reshape."""
    groups = reshape_groups(old, new)
    if groups is None:
        raise CannotFold("its input is empty")
    source, target = list(label.shape), [1] * len(new)
    for before, after in groups:
        if any(label.shape[i] > 1 for i in before):
            for i in before:
                source[i] = old[i]
            for j in after:
                target[j] = new[j]
    return np.broadcast_to(label, source).reshape(target)


def within(label: np.ndarray, axis: int, run: int) -> bool:
    """Return whether each run of channels lies at one place of an axis."""
    if label.shape[axis] == 1:
        return True
    runs = np.where(label < 0, -1, label // run)
    places = np.arange(runs.shape[axis]).reshape([-1 if i == axis else 1 for i in range(runs.ndim)])
    places = np.broadcast_to(places, runs.shape)
    kept = runs >= 0
    first = np.full(runs.max() + 1, runs.shape[axis])
    np.minimum.at(first, runs[kept], places[kept])
    return bool((places[kept] == first[runs[kept]]).all())


def constant_of(graph: Graph, number: int) -> Any:
    """Return the scalar that a value repeats, if the program states it; None otherwise."""
    while number not in graph.constants:
        at = graph.maker.get(number)
        if at is None or graph.nodes[at].name not in (*ALIKE, "broadcast_in_dim", "reshape"):
            return None
        number = graph.nodes[at].ins[0]
    return graph.constants[number]


def is_zero(graph: Graph, number: int) -> bool:
    """Return whether the program states that a value is zero."""
    constant = constant_of(graph, number)
    return constant is not None and bool(np.all(np.asarray(constant) == 0))


def constant_along(graph: Graph, number: int, label: np.ndarray) -> bool:
    """Return whether a value is the same for all channels of a label."""
    axes = [i for i in range(label.ndim) if label.shape[i] > 1]
    if constant_of(graph, number) is not None or all(graph.shapes[number][i] == 1 for i in axes):
        return True
    at = graph.maker.get(number)
    if at is None:
        return False
    node = graph.nodes[at]
    if node.name != "broadcast_in_dim":
        return node.name in ALIKE and constant_along(graph, node.ins[0], label)
    places, old = node.params["broadcast_dimensions"], graph.shapes[node.ins[0]]
    return all(i not in places or old[places.index(i)] == 1 for i in axes)


def divided(w: Any, producer: Producer, scale: Any) -> jax.Array:
    """Return a producer's parameter with its channels divided by scales [k]."""
    label = producer.label
    factor = jnp.where(label < 0, 1.0, jnp.asarray(scale, jnp.float32)[np.maximum(label, 0)])
    whole = jnp.asarray(w, jnp.float32) + producer.offset
    return (whole / factor - producer.offset).astype(w.dtype)


def turned(w: Any, producer: Producer, rotation: Transform) -> jax.Array:
    """Return a producer's parameter with its channels rotated, as `rotation.inputs` rotates the inputs."""
    label, w = producer.label, jnp.asarray(w)
    own = [i for i in range(w.ndim) if label.shape[i] > 1]
    order = [*(i for i in range(w.ndim) if i not in own), *own]
    moved, channels = w.transpose(order), label.transpose(order).reshape(-1)
    places = np.argsort(channels, stable=True)[(channels < 0).sum() :]
    flat = moved.reshape(*moved.shape[: w.ndim - len(own)], -1)
    flat = flat.at[..., places].set(rotation.inputs(flat[..., places], -1))
    return flat.reshape(moved.shape).transpose(np.argsort(order))
