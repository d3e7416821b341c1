"""What the tests of exchange share: QTensors by their bytes, and comparisons of all bytes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import ifjax
from ifjax.arrays import Blocking

E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
LARGEST = {"nvfp4": 6 * 448, "fouroversix": 6 * 256, "nvfp4_static4": 4 * 448}
F8 = np.dtype(ml_dtypes.float8_e4m3fn)
TOOLS = ("compressed-tensors", "modelopt")  # the first two; the others have tests of their own


def tensor(fmt, shape=(6, 64), axis=-1, amax=3.0, seed=0, headroom=1.0, scales=None, dtype="float32", **changes):
    """A QTensor of random codes and scale bytes; nothing is compiled."""
    fmt = ifjax.get_format(fmt)
    rng = np.random.default_rng(seed)
    packed, blocks = list(shape), list(shape)
    packed[axis], blocks[axis] = -(-shape[axis] // fmt.block) * fmt.block * fmt.bits // 8, -(-shape[axis] // fmt.block)
    low, high = (60, 180) if fmt.scale.dtype == ml_dtypes.float8_e8m0fnu else (1, 0x7F)
    scales = rng.integers(low, high, blocks) if scales is None else np.broadcast_to(scales, blocks)
    q = ifjax.QTensor(
        codes=jnp.asarray(rng.integers(0, 256, packed, np.uint8)),
        scales=jnp.asarray(np.ascontiguousarray(scales).astype(np.uint8)),
        amax=jnp.float32(amax) if fmt.has_tensor_scale else None,
        blocking=Blocking(fmt, axis, shape[axis], np.dtype(dtype), headroom),
    )  # fmt: skip
    return q.replaced(**changes)


def bytes_of(array):
    array = np.asarray(array)
    return array.reshape(-1).view(np.uint8).reshape(*array.shape, -1).squeeze(-1) if array.ndim else array.tobytes()


def codes_in(packed):
    """The earlier code is in the low nibble."""
    packed = np.asarray(packed)
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


def assert_same_arrays(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].tobytes() == b[name].tobytes(), name


def assert_same(a, b):
    """QTensors with equal types and equal bytes."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def changed(arrays, **changes):
    return {name: array for name, array in (arrays | changes).items() if array is not None}
