"""Rules that exclude: what is inside counts as forgotten only where the rule does not match it."""

import jax.numpy as jnp
import pytest

import ifjax

PARAMS = {"d": {"kernel": jnp.ones((32, 32)), "bias": jnp.ones(32)}}


def model(params, x):
    return x @ params["d"]["kernel"] + params["d"]["bias"][None]


def test_all_else_may_stay_where_it_could_not_be_quantized_anyway():
    rules = [ifjax.Rule("d/kernel", "mxfp4"), ifjax.Rule(".*", None)]
    packed, _ = ifjax.quantize_params(PARAMS, rules, model=model, sample=jnp.ones((2, 32)))
    assert isinstance(packed["d"]["kernel"], ifjax.QTensor)


def test_a_module_that_is_excluded_without_its_kernel_is_told():
    rules = [ifjax.Rule("d/bias|d", None), ifjax.Rule(".*", "mxfp4")]
    linen = pytest.importorskip("flax.linen")

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            return Inner(name="d")(x)

    class Inner(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(32)(x)

    params = {"params": {"d": {"Dense_0": {"kernel": jnp.ones((32, 32)), "bias": jnp.ones(32)}}}}
    with pytest.raises(ValueError, match="but not what is inside: 'd/Dense_0' would be quantized"):
        ifjax.quantize_params(params, rules, model=Model(), sample=jnp.ones((2, 32)))


def test_a_lifted_transformation_that_initializes_by_itself_is_left_with_the_reason():
    linen = pytest.importorskip("flax.linen")
    import jax

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.map_variables(linen.Dense, "params", lambda v: jax.tree.map(lambda a: -a, v), init=True)(32)(x)
            return linen.Dense(32, name="out")(x)

    model, x = Model(), jnp.ones((2, 32))
    params = model.init(jax.random.key(0), x)
    packed, report = ifjax.quantize_params(params, "mxfp4", model=model, sample=x)
    reasons = {entry.path: entry.reason for entry in report.entries}
    assert reasons["out/kernel"] is None and "rewritten" in reasons["Map_variablesDense_0/kernel"]
    assert model.apply(packed, x).shape == (2, 32)
