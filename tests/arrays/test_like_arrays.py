"""What a model may do with a packed leaf as if it were an array: it works, or says what to write instead."""

import operator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ifjax

FAQ = " ".join((Path(__file__).resolve().parents[2] / "docs" / "faq.md").read_text().split())
REMEDY = r"packed. Write q.dequantize\(\) for its values, `x @ q` .* ifjax.quantized\(fn\)"


@pytest.fixture(scope="module")
def q():
    return ifjax.quantize(jnp.ones((32, 32)), "mxfp4")


@pytest.mark.parametrize("other", [2, 0.5, np.float32(1), np.ones(32), jnp.ones(32)], ids=lambda a: type(a).__name__)
def test_operators_tell_the_remedy_from_both_sides(q, other):
    for f in (operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, divmod, operator.lt,
              operator.le, operator.gt, operator.ge, operator.eq, operator.ne):  # fmt: skip
        for args in ((q, other), (other, q)):
            with pytest.raises(TypeError, match=REMEDY):
                f(*args)


def test_functions_of_one_argument_tell_the_remedy(q):
    for f in (operator.neg, operator.pos, abs, operator.invert, float, int):
        with pytest.raises(TypeError, match=REMEDY):
            f(q)


def test_methods_of_arrays_tell_the_remedy(q):
    for name in ("sum", "mean", "max", "dot", "flatten", "ravel", "squeeze", "argmax", "std"):
        with pytest.raises(AttributeError, match=f"has no {name}: it is {REMEDY}"):
            getattr(q, name)
        assert not hasattr(q, name)
    with pytest.raises(AttributeError, match="'QTensor' object has no attribute 'nonsense'"):
        q.nonsense  # noqa: B018
    with pytest.raises(AttributeError, match="a QTensor of str has no shape"):
        q.replaced(codes="specs").shape  # noqa: B018


def test_equality_of_qtensors_is_identity(q):
    other = q.replaced()
    assert q == q and q != other and q != "packed" and q is not None
    assert len({q, other}) == 2


def test_the_faq_has_the_words_of_jax():
    """For what JAX refuses before any code of ours runs, people search for its words."""
    one_amax: Any = ifjax.quantize(jnp.ones((3, 32)), "if4")
    for f in (lambda: jnp.mean(one_amax), lambda: jnp.matmul(jnp.ones((2, 3)), one_amax)):
        with pytest.raises(TypeError) as error:
            f()
        words = "requires ndarray or scalar arguments, got <class 'ifjax.arrays.qtensor.QTensor'>"
        assert words in str(error.value) and words in FAQ
    with pytest.raises(IndexError) as error:
        jax.lax.scan(lambda carry, w: (carry, w.dequantize()), 0, one_amax)
    assert str(error.value) == "tuple index out of range" and '"tuple index out of range"' in FAQ
    with pytest.raises(ValueError) as error:
        jax.vmap(lambda w: w.dequantize())(one_amax)
    assert "its rank should be at least 1" in str(error.value) and '"its rank should be at least 1"' in FAQ
    one_each = ifjax.quantize(jnp.ones((3, 32)), "if4", amax_axes=(0,))  # the FAQ's cure
    np.testing.assert_array_equal(jax.vmap(lambda w: w.dequantize())(one_each), one_each.dequantize())


CHANGED = {"cast": lambda a: a.astype(jnp.bfloat16), "half": lambda a: 0.5 * a, "average": lambda a: 0.9 * a + 0.1 * a}


@pytest.mark.parametrize("change", CHANGED)
def test_a_tree_map_that_makes_floats_of_bytes_is_refused_on_use(q, change):
    with jax.numpy_dtype_promotion("standard"):
        packed = jax.tree.map(CHANGED[change], {"w": q})["w"]
    x = jnp.ones((2, 32))
    for use in (packed.dequantize, lambda: x @ packed, lambda: packed @ x.T, packed[0].dequantize,
                packed.unpacked_codes, packed.headers):  # fmt: skip
        with pytest.raises(TypeError, match=r"something has made .* of a QTensor's codes"):
            use()


def test_a_tree_map_that_stops_at_qtensors_is_refused_at_once(q):
    with pytest.raises(TypeError, match=REMEDY):
        jax.tree.map(lambda a: a * 2, {"w": q}, is_leaf=lambda a: isinstance(a, ifjax.QTensor))


@pytest.mark.parametrize("change", [jnp.transpose, jnp.ravel, lambda a: a[:8], lambda a: a.reshape(2, -1)])
def test_a_tree_map_that_gives_arrays_other_shapes_is_refused_on_use(change):
    q = ifjax.quantize(jnp.ones((32, 32)), "mxfp4", axis=0)
    packed = jax.tree.map(change, {"w": q})["w"]
    for use in (packed.dequantize, lambda: jnp.ones((2, 32)) @ packed):
        with pytest.raises(ValueError, match="do not go together"):
            use()
