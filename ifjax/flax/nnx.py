"""NNX: a variable that holds packed values and reads as an array, and where a model's matmul kernels are."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from flax import nnx
from flax.typing import MISSING
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from ifjax.qtensor import QTensor, shardings


class PackedParam(nnx.Variable):
    """A parameter that is kept packed: the raw value is a QTensor, and modules read the array that it stands for.

    Any NNX model applies on it as on an `nnx.Param`: `param[...]`, `get_value`, arithmetic and `jnp` functions decode,
    inside the program where they are traced. Only `get_raw_value()` gives the QTensor. Split, merge, state, jit, scan,
    vmap and eval_shape carry the packed bytes.

    It is a Variable but not a Param, because nothing can train it: `nnx.grad` and `nnx.Optimizer(wrt=nnx.Param)` see
    the parameters that are left, LoRA's among them. For the same reason name it beside Param wherever a filter means
    all weights: `nnx.state(model, (nnx.Param, PackedParam))`, `nnx.StateAxes({(nnx.Param, PackedParam): 0, ...})`.
    A gradient with respect to it is JAX's TypeError about uint8 inputs. That is also what `nnx.grad` says with
    `graph=False` or `graph_updates=False`, which ask for the gradient of everything: split the model then, and
    differentiate one part. Optimizer states of packed values are meaningless, and no error: leave them out of `wrt`.

    Leaves that are no arrays, as in trees of shardings, come back as they are; an abstract QTensor reads as a
    ShapeDtypeStruct. `nnx.to_pure_dict` decodes and `nnx.tabulate` counts decoded bytes: for the packed ones use
    `nnx.as_pure`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import ifjax
        >>> layer = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
        >>> layer.kernel = PackedParam.like(layer.kernel, ifjax.quantize(layer.kernel[...], "if4", axis=-2))
        >>> layer(jnp.ones((2, 64))).shape
        (2, 32)
        >>> layer.kernel.get_raw_value()
        QTensor(if4, 64x32 float32, axis=-2, 4.516 bits a value)
    """

    def __init__(self, value: QTensor, **metadata: Any):
        # Not through the base: it would partition every array of the QTensor as if it had all of its axes.
        place = metadata.pop("out_sharding", None)
        super().__init__(_checked(value), hijax=False, ref=False, **metadata)
        if place is not None:
            self.set_metadata(out_sharding=place)

    @classmethod
    def like(cls, param: nnx.Variable, q: QTensor) -> "PackedParam":
        """What takes the place of `param`: q, with the axis names and all other metadata of `param`.

        Raises:
            TypeError: q is no QTensor.
            ValueError: q has another shape.
        """
        if _checked(q).shape != param.shape:
            raise ValueError(f"the parameter has shape {param.shape}, the QTensor {q.shape}: quantize this parameter")
        # A packed value is never updated in place, so it needs neither a reference nor a variable of JAX's own.
        return cast(PackedParam, cls.from_metadata(q, param.get_metadata() | {"hijax": False, "ref": False}))

    def get_value(self, *, index: Any = ...) -> Float[Array, "..."]:
        """The decoded array in the original dtype, or what `index` picks of it."""
        q = self._raw_value
        if not isinstance(q, QTensor):  # a tree of something else, in which flax has put it here
            return q
        if isinstance(q.codes, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(q.shape, q.dtype)  # pyright: ignore[reportReturnType]
        if not all(isinstance(a, jax.Array | np.ndarray) for a in (q.codes, q.scales)):
            return q  # pyright: ignore[reportReturnType]
        value = q.dequantize()
        return value if index is ... else value[index]

    def set_value(self, value: QTensor, *, index: Any = ...) -> None:
        """Put another QTensor of this shape in its place.

        Raises:
            TypeError: an array, or an index.
            ValueError: another shape.
        """
        if index is not ...:
            raise TypeError("a PackedParam is set as a whole: decode it, change the array, and quantize that")
        value = _spread(self._raw_value, value)  # as nnx.eval_shape sets shardings
        if _checked(value).shape != self.shape:
            raise ValueError(f"the PackedParam has shape {self.shape}, the QTensor {value.shape}")
        self.set_raw_value(value)

    def set_raw_value(self, value: Any, **checks: bool) -> None:
        """As for every Variable, except that arrays are refused."""
        super().set_raw_value(_not_an_array(value), **checks)

    def update_from_state(self, variable_state: nnx.Variable) -> None:
        """As for every Variable, except that those that hold arrays are refused."""
        _not_an_array(variable_state.get_raw_value())
        super().update_from_state(variable_state)

    def copy(self, value: Any = MISSING, **updates: Any) -> nnx.Variable:
        """A copy, with another value if one is given. Specs and shardings are made to fit each of the arrays."""
        return super().copy(_not_an_array(_spread(self._raw_value, value)), **updates)

    replace = to_state = copy

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that it stands for."""
        return self._raw_value.shape

    def __getattr__(self, name: str) -> Any:
        metadata = object.__getattribute__(self, "_var_metadata")
        if name in metadata:
            return metadata[name]
        raw = object.__getattribute__(self, "_raw_value")
        if name in ("dtype", "ndim", "size") or not isinstance(raw, QTensor):
            return getattr(raw, name)
        # What modules ask of a parameter is asked of the array: `kernel.T`, `kernel.astype(...)`. Other names are not
        # worth decoding for.
        if name.startswith("_") or not hasattr(jax.Array, name):
            raise AttributeError(f"{type(self).__name__} has no {name!r}; its QTensor is param.get_raw_value()")
        return getattr(self.get_value(), name)

    def __nnx_repr__(self):
        # The bytes behind it, not the decoded numbers.
        for part in super().__nnx_repr__():
            is_value = getattr(part, "key", None) == "value"
            yield type(part)("value", self._raw_value) if is_value else part


class Kernel(NamedTuple):
    """A parameter of an NNX model, seen by the module that multiplies with it.

    Attributes:
        parameter: its '/'-joined path in `nnx.state(model)`.
        path: that of its module; "" is the model itself.
        module: the module's class.
        axes: the contraction axes, negative so that they hold in stacked layers too; () where there are none, None
            where no module tells them (a parameter that a model multiplies with by itself).
        reason: why it cannot be quantized, or None.
    """

    parameter: str
    path: str
    module: str
    axes: tuple[int, ...] | None
    reason: str | None = None


def kernels_of(model: nnx.Module) -> list[Kernel]:
    """One record for each parameter of an NNX model, in the order of `nnx.state`; a shared one is found once.

    Contraction axes follow from the modules' own fields; subclasses count as what they derive from. Variables that are
    neither Param nor PackedParam (statistics, caches, random states) are no parameters. Abstract models, as from
    `nnx.eval_shape`, will do.

    Raises:
        TypeError: `model` is no NNX module.

    Example:
        >>> from flax import nnx
        >>> for kernel in kernels_of(nnx.LinearGeneral((2, 8), 4, axis=(-2, -1), rngs=nnx.Rngs(0))):
        ...     print(kernel.parameter, kernel.module, kernel.axes, kernel.reason)
        bias LinearGeneral () a bias is added
        kernel LinearGeneral (-3, -2) None
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"kernels_of needs an nnx.Module, got {type(model).__name__}: of a split model, write "
            "kernels_of(nnx.merge(graphdef, state))"
        )
    return list(_kernels(model))


def _kernels(model: nnx.Module) -> Iterator[Kernel]:
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if not isinstance(variable, nnx.Param | PackedParam):
            continue
        above = list(_modules_above(model, path))
        depth, module = above[-1]
        name = "/".join(map(str, path[depth:]))
        rewriter = next((m for _, m in above if isinstance(m, nnx.SpectralNorm | nnx.WeightNorm)), None)
        axes, reason = _contraction(module, name)
        if isinstance(variable, PackedParam):
            reason = "it is packed already"
        elif axes and rewriter is not None:
            reason = f"{type(rewriter).__name__} rewrites it at every call"
        parameter, owner = ("/".join(map(str, part)) for part in (path, path[:depth]))
        yield Kernel(parameter, owner, type(module).__name__, axes, reason)


def _modules_above(model: nnx.Module, path: tuple[Any, ...]) -> Iterator[tuple[int, nnx.Module]]:
    """The modules on the way to a variable and how deep they lie; lists and dictionaries of modules are none."""
    yield 0, model
    node = model
    for depth, key in enumerate(path[:-1], start=1):
        node = _child(node, key)
        if isinstance(node, nnx.Module) and not isinstance(node, nnx.List | nnx.Dict):
            yield depth, node


def _child(node: Any, key: Any) -> Any:
    return getattr(node, key) if isinstance(key, str) and hasattr(node, key) else node[key]


_NO_MATMUL = (
    nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.InstanceNorm, nnx.WeightNorm, nnx.SpectralNorm,
    nnx.PReLU,
)  # fmt: skip
_WITH_KERNEL = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv, nnx.ConvTranspose)


def _contraction(module: nnx.Module, name: str) -> tuple[tuple[int, ...] | None, str | None]:
    """The contraction axes of the module's parameter of this name, and what speaks against it."""
    if isinstance(module, _NO_MATMUL):
        return (), f"{type(module).__name__} has no matmul"
    if isinstance(module, nnx.LoRA) and name in ("lora_a", "lora_b"):
        return (-2,), "LoRA's factors are there to be trained"
    if isinstance(module, nnx.Embed) and name == "embedding":
        return (-1,), None
    if isinstance(module, _WITH_KERNEL):
        if name == "bias":
            return (), "a bias is added"
        if name == "kernel":
            return _of_kernel(module)
    return None, None


def _of_kernel(module: Any) -> tuple[tuple[int, ...] | None, str | None]:
    if isinstance(module, nnx.LinearGeneral):  # [*batch, *in, *out]
        after = len(module.out_features)
        return tuple(range(-after - len(module.in_features), -after)), None
    if isinstance(module, nnx.Einsum):
        return _of_einsum(module.einsum_str, len(module.kernel_shape))
    if isinstance(module, nnx.ConvTranspose) and module.transpose_kernel:  # [*window, out, in]
        return (-1,), None
    return (-2,), None  # [in, out] and [*window, in, out]


def _of_einsum(equation: str | None, ndim: int) -> tuple[tuple[int, ...] | None, str | None]:
    if equation is None:
        return None, "its einsum_str comes with each call"
    inputs, kernel, result = equation.replace(" ", "").replace("->", ",").split(",")
    before, _, after = kernel.partition("...")
    # Axes of an ellipsis are never contracted: jnp.einsum keeps them in the result.
    letters = [*before, *[None] * (ndim - len(before) - len(after)), *after]
    summed = [letter for letter in letters if letter is not None and letter in inputs and letter not in result]
    if len(set(summed)) < len(summed):
        return (), f"{equation!r} takes a diagonal of it"
    if not summed:
        return (), f"{equation!r} contracts none of its axes"
    return tuple(letters.index(letter) - ndim for letter in summed), None


def _spread(q: Any, value: Any) -> Any:
    """What flax puts in a variable's place and is meant for its one array, made to fit the arrays of q."""
    if isinstance(q, QTensor):
        if isinstance(value, PartitionSpec):
            amax = None if q.amax is None else PartitionSpec(*value[: q.amax.ndim])
            return dataclasses.replace(q, codes=value, scales=value, amax=amax)
        if isinstance(value, jax.ShapeDtypeStruct) and value.sharding is not None:
            return jax.tree.map(_abstract, q, shardings(q, value.sharding))
    return value


def _abstract(a: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)


def _checked(q: Any) -> QTensor:
    if not isinstance(q, QTensor):
        raise TypeError(
            f"a PackedParam holds a QTensor, got {type(q).__name__}: make one with ifjax.quantize, along the "
            "contraction axis of the parameter (axis=-2 for [in, out])"
        )
    return q


def _not_an_array(value: Any) -> Any:
    return _checked(value) if isinstance(value, jax.Array | np.ndarray) else value
