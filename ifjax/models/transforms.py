"""Changes of basis of a product: smoothing scales and rotations, applied to weights once and to inputs at each call.

x w = (x / s) R  R^T (s w) for scales s of the input channels and an orthogonal R. The product is the same, but its
operands have fewer outliers and lose less in 4 bits.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ifjax.arrays.smoothing import awq_scales, smooth_scales
from ifjax.models.rules import Rule
from ifjax.numerics.hadamard import hadamard, inverse_hadamard
from ifjax.numerics.rotations import greedy_rotation


class Inputs(NamedTuple):
    """Calibration data about a product's inputs.

    Attributes:
        largest: largest magnitude of each channel, float32 [K].
        rows: sample rows, float32 [rows, K].
    """

    largest: np.ndarray
    rows: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transform:
    """A change of basis along one contracted axis of length k: scales first, then a rotation of runs. A pytree.

    Attributes:
        scale: one scale per channel; inputs are divided by it, weights multiplied. None for no scaling.
        rotation: orthogonal matrix [n, n] for runs of n values, where n divides k; None for none.
        hadamard: run length of `ifjax.hadamard` with its fixed signs; 0 for none.
    """

    scale: Float[Array, " k"] | None = None
    rotation: Float[Array, "n n"] | None = None
    hadamard: int = dataclasses.field(default=0, metadata={"static": True})

    def inputs(self, x: Any, axis: int) -> Any:
        """Return inputs x in the new basis along an axis."""
        if jnp.iscomplexobj(x):
            return lax.complex(self.inputs(jnp.real(x), axis), self.inputs(jnp.imag(x), axis))
        y = jnp.asarray(x, jnp.float32)
        if self.scale is not None:
            y = y / self._along(self.scale, y, axis)
        return self._rotated(y, axis).astype(x.dtype)

    def weights(self, w: Any, axis: int) -> Any:
        """Return weights w in the new basis along an axis."""
        y = jnp.asarray(w, jnp.float32)
        if self.scale is not None:
            y = y * self._along(self.scale, y, axis)
        return self._rotated(y, axis).astype(w.dtype)

    def undone(self, w: Any, axis: int) -> Any:
        """Return transformed weights in their original basis."""
        y = jnp.asarray(w, jnp.float32)
        if self.hadamard:
            y = inverse_hadamard(y, axis=axis, size=self.hadamard)
        if self.rotation is not None:
            y = _by_runs(y, axis, self.rotation.T)
        if self.scale is not None:
            y = y / self._along(self.scale, y, axis)
        return y.astype(w.dtype)

    def hessian(self, h: Any) -> Any:
        """Return the Hessian of the transformed inputs, from that of the original ones, [K, K].

        K is the product of all contracted lengths; the transformed axis is the last of them.
        """
        k = len(h) if self.scale is None else len(self.scale)
        wide = jnp.asarray(h, jnp.float32).reshape(len(h) // k, k, len(h) // k, k)
        return self.inputs(self.inputs(wide, 1), 3).reshape(h.shape)

    def parts(self) -> tuple["Transform | None", "Transform | None"]:
        """Return the scaling and the rotation, each None if there is none."""
        turns = self.rotation is not None or self.hadamard
        return None if self.scale is None else Transform(self.scale), \
            dataclasses.replace(self, scale=None) if turns else None

    def _rotated(self, y, axis):
        if self.rotation is not None:
            y = _by_runs(y, axis, self.rotation)
        return hadamard(y, axis=axis, size=self.hadamard) if self.hadamard else y

    @staticmethod
    def _along(scale, y, axis):
        return scale.reshape([-1 if i == axis % y.ndim else 1 for i in range(y.ndim)])


def transform_of(
    rule: Rule, w: Any, axis: int, axes: tuple[int, ...], inputs: Inputs | None, others: Sequence[Any] = ()
) -> Transform | None:
    """Return the change of basis that a rule asks for, for weights with blocks along `axis` of the contracted `axes`.

    Returns None if the rule has neither smooth nor rotate. `others` are weights [K, N] of the same inputs, which share
    the change.

    Raises:
        ValueError: a calibration is missing; the length of runs does not divide that of the axis; blocks do not lie
            along the last contracted axis.
    """
    if rule.smooth is None and rule.rotate is None:
        return None
    axis, k = axis % w.ndim - w.ndim, w.shape[axis]
    wanted = f"smooth={rule.smooth!r}" if rule.smooth is not None else f"rotate={rule.rotate!r}"
    n = rule.rotation_run(k)
    if n is not None and k % n:
        raise ValueError(f"rotate={rule.rotate!r} turns runs of {n}, which do not divide its contraction of {k}")
    if axes and axis != axes[-1]:
        raise ValueError(f"{wanted} needs blocks along the last contracted axis {axes[-1]}, and they lie along {axis}")
    if rule.needs_inputs and inputs is None:
        raise ValueError(f"{wanted} needs calibration=ifjax.calibrate(...) with these rules that has seen this module")
    scale, rotation = None, None
    columns = jnp.concatenate([columns_of(w, axis), *others], 1)
    rows = None if inputs is None else np.asarray(inputs.rows).reshape(-1, k)
    run = 0 if n is None or rule.rotate == "greedy" else n
    if rule.smooth == "awq":
        assert rows is not None and rule.weights is not None
        scale = awq_scales(rows, columns, rule.weights, act_fmt=rule.activations, rotate=run).scales
    elif rule.smooth is not None:
        assert inputs is not None
        largest = np.asarray(inputs.largest).reshape(-1, k).max(0)
        scale = smooth_scales(largest, jnp.abs(columns).max(1), float(rule.smooth))
    if rule.rotate == "greedy":
        assert rows is not None and n is not None
        moved = rows if scale is None else rows / np.asarray(scale)
        rotation = jnp.asarray(greedy_rotation(moved, n).rotation, jnp.float32)
    return Transform(scale, rotation, run)


def columns_of(w: Any, axis: int) -> Float[Array, "k n"]:
    """Return weights as a float32 matrix [k, n] with the axis of length k first."""
    return jnp.moveaxis(jnp.asarray(w, jnp.float32), axis, 0).reshape(w.shape[axis], -1)


def _by_runs(y, axis, rotation):
    """Return y with each run along an axis multiplied by the rotation."""
    n, axis = len(rotation), axis % y.ndim
    runs = jnp.moveaxis(y, axis, -1)
    shape = runs.shape
    runs = jnp.matmul(runs.reshape(*shape[:-1], shape[-1] // n, n), rotation, precision="highest")
    return jnp.moveaxis(runs.reshape(shape), -1, axis)
