"""Quantization of activations before a product, with a straight-through gradient."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ifjax.arrays import QTensor, quantize
from ifjax.arrays.encoders import encodes_on_cpu
from ifjax.arrays.quantize import Multiples, operand_in_multiples, straight_through
from ifjax.codec import Encoding
from ifjax.codec.headers import is_amax
from ifjax.models.sites import blocked_axis
from ifjax.products.dot_general import no_gradient, zeros_of


def quantized_activation(
    x: jax.Array, axes: tuple[int, ...], how: Encoding, act_amax: str, amax: float | None, layers: Sequence[int] = (),
    *, in_multiples: bool = False,
) -> Any:  # fmt: skip
    """Quantize x along one of its contracted axes, with the amax that `act_amax` selects; return a QTensor.

    Args:
        x: the activations.
        axes: contracted axes of x, negative and in the kernel's order.
        how: encoding of x.
        act_amax: as in `Rule`.
        amax: static amax; None takes that of x.
        layers: batch axes along which the weights have separate amaxes; x gets separate ones, too.
        in_multiples: return Multiples, which are not packed, of a float32 x with one amax or none, if XLA encodes it
            for a CPU.
    """
    x = jnp.asarray(x)
    axis = blocked_axis(axes, x.shape, how.fmt.block)
    has_one = not how.fmt.has_tensor_scale or (act_amax != "token" and (amax is not None or not layers))
    if in_multiples and has_one and x.dtype == np.float32 and encodes_on_cpu():
        given = None if amax is None or not how.fmt.has_tensor_scale else jnp.float32(amax)
        wants = {"wants_codes": False, "wants_values": True}
        return operand_in_multiples(jax.lax.stop_gradient(x), how, axis=axis, key=None, amax=given, **wants)
    if not how.fmt.has_tensor_scale:
        return quantize(x, how, axis=axis)
    if act_amax != "token":
        if amax is None:
            return quantize(x, how, axis=axis, amax_axes=layers)
        return quantize(x, how, axis=axis, amax=jnp.float32(amax))
    contracted = {a % x.ndim for a in axes}
    return quantize(x, how, axis=axis, amax_axes=[a for a in range(x.ndim) if a not in contracted])


def rounded(x: jax.Array, q: Any) -> jax.Array:
    """Return q dequantized with the gradient of x, if q is a QTensor; return an array unchanged."""
    return straight_through(x, q.dequantize(), None) if isinstance(q, QTensor) else q


def multiplied(x: jax.Array, q: Any, w: Any, product: Callable[[Any, Any], jax.Array]) -> jax.Array:
    """Return product(q, w), where q is x or stands for it; product must be linear in x.

    If q is a QTensor or Multiples of x, x has the gradient, straight through.
    """
    if not isinstance(q, QTensor | Multiples):
        return product(q, w)
    x = jnp.asarray(x)
    kind, kinds = jax.typeof(x), jax.tree.map(jax.typeof, q)

    @jax.custom_vjp
    def multiply(x, q, w):
        return product(q, w)

    def forward(x, q, w):
        return multiply(x, q, w), w

    def backward(w, g):
        _, pull = jax.vjp(lambda x: product(x, w), zeros_of(kind))
        return *pull(g), no_gradient(kinds), no_gradient(w)

    multiply.defvjp(forward, backward)
    return multiply(x, q, w)


def without_gradient(kernel: jax.Array, path: str) -> jax.Array:
    """Return the kernel unchanged; differentiating it raises ValueError."""

    @jax.custom_jvp
    def same(kernel):
        return kernel

    @same.defjvp
    def refuse(primals, tangents):
        raise ValueError(
            f"{path!r}: a kernel that is quantized on the fly has no gradient. To train, give the rule a recipe, such "
            "as 'weight_only_qat'; else differentiate other arguments only"
        )

    return same(kernel)


def static_amax(amax: Any, name: str) -> float | None:
    """Return the calibrated amax of a value; None, with a warning, if it is 0 or not finite and so of no use.

    Raises:
        ValueError: there is no calibration, or it has no amax of this name.
    """
    if amax is None or name not in amax:
        raise ValueError(
            f"act_amax='static' needs the amax of {name!r} from calibration=ifjax.calibrate(...)"
            + ("" if amax is None else ", which has none: the calibrated function did not call the module, or no "
               "result of it depended on the module")
        )
    if not is_amax(amax[name]):
        warnings.warn(
            f"the calibrated amax of {name!r} is {amax[name]}, which fits no other inputs, so that of the inputs at "
            "hand is used: calibrate on batches that reach it, or use act_amax='tensor'",
            stacklevel=2,
        )
        return None
    return amax[name]
