"""SmoothQuant and AWQ: per-channel scales that move magnitude between activations and weights.

x w = (x / s) (s w) for any s > 0, one for each input channel.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ifjax.arrays.quantize import fake_quantize, quantize
from ifjax.codec import Encoding
from ifjax.formats import Format
from ifjax.numerics.hadamard import hadamard


def smooth_scales(
    x_max: Float[ArrayLike, " k"], w_max: Float[ArrayLike, " k"], alpha: float = 0.5
) -> Float[Array, " k"]:
    """Return SmoothQuant's scales, x_max^alpha / w_max^(1 - alpha) for each input channel, float32 [k].

    Args:
        x_max: largest magnitude of each input channel of the activations.
        w_max: largest magnitude of each input channel of the weights, over all outputs.
        alpha: share of the activations' spread that moves to the weights, in [0, 1]. 0.5 in SmoothQuant, 0.6 in
            DuQuant++.

    Raises:
        ValueError: alpha is not in [0, 1].

    Source: arXiv 2211.10438.

    Example:
        >>> import jax.numpy as jnp
        >>> from ifjax.arrays.smoothing import smooth_scales
        >>> print(smooth_scales(jnp.array([16.0, 1]), jnp.array([1.0, 1])))
        [4. 1.]
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    x, w = (jnp.maximum(jnp.asarray(a, jnp.float32), 1e-5) for a in (x_max, w_max))
    return jnp.maximum(x**alpha / w ** (1 - alpha), 1e-5)


class Awq(NamedTuple):
    """Result of `awq_scales`.

    Attributes:
        scales: scale of each input channel, float32 [k].
        index: the chosen exponent, in units of 1/20.
        losses: mean squared error of the product for each of the 20 exponents.
    """

    scales: Array
    index: int
    losses: np.ndarray


def awq_scales(
    x: Float[ArrayLike, "rows k"],
    w: Float[ArrayLike, "k n"],
    fmt: str | Format | Encoding = "if4",
    *,
    x_mean: Float[ArrayLike, " k"] | None = None,
    act_fmt: str | Format | Encoding | None = None,
    rotate: int = 0,
) -> Awq:
    """Return AWQ's scales: the power of the activations' mean magnitudes that gives the least error of the product.

    Args:
        x: input rows on which the error of the product is measured.
        w: the weights, quantized along k.
        fmt: the format of the weights, as for `ifjax.quantize`.
        x_mean: mean magnitude of each input channel; by default that of x.
        act_fmt: the format of the inputs; None, as in AWQ, leaves them in floats.
        rotate: run length of the `ifjax.hadamard` that follows the scales; 0 for none.

    Source: arXiv 2306.00978. `act_fmt` and `rotate` are ours: scales that serve weights alone can spread the inputs
    so far that 4 bits lose them.

    Example:
        >>> import jax
        >>> from ifjax.arrays.smoothing import awq_scales
        >>> x, w = jax.random.normal(jax.random.key(0), (2, 32, 32))
        >>> awq_scales(x, w, "nvfp4").losses.shape
        (20,)
    """
    x, w = (jnp.asarray(a, jnp.float32) for a in (x, w))
    magnitudes = jnp.abs(x).mean(0) if x_mean is None else jnp.asarray(x_mean, jnp.float32)
    exact = jnp.matmul(x, w, precision="highest")

    @jax.jit
    def tried(exponent):
        s = jnp.maximum(magnitudes**exponent, 1e-4)
        s = s / jnp.sqrt(s.max() * s.min())
        inputs, weights = x / s[None], w * s[:, None]
        if rotate:
            inputs, weights = hadamard(inputs, size=rotate), hadamard(weights, axis=0, size=rotate)
        if act_fmt is not None:
            inputs = fake_quantize(inputs, act_fmt)
        rounded = quantize(weights, fmt, axis=0).dequantize()
        return s, ((jnp.matmul(inputs, rounded, precision="highest") - exact) ** 2).mean()

    scales, losses = zip(*(tried(jnp.float32(i / 20)) for i in range(20)), strict=True)
    losses = np.asarray(losses, np.float64)
    best = int(losses.argmin())
    return Awq(scales[best], best, losses)
