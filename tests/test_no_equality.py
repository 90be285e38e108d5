"""No derivative hangs on the equality of two computed numbers, which a compiled program may round differently.

`jnp.max` does, and up to JAX 0.10 `jnp.maximum`, `jnp.clip` and their like: pick by place (`losses._numerics.pick`) or
by `jnp.where`.
"""

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtransfer as jt
from tests import gradients
from tests.models import test_gradients as nets
from tests.train import test_contract as contract


def equalities(jaxpr):
    """The comparisons for equality of two computed floating arrays on which the outputs of a program depend."""
    needed = {v for v in jaxpr.outvars if isinstance(v, jax.extend.core.Var)}
    found = []
    for equation in reversed(jaxpr.eqns):
        if not needed.intersection(equation.outvars):
            continue
        inputs = [v for v in equation.invars if isinstance(v, jax.extend.core.Var)]
        needed.update(inputs)
        two = len(inputs) == 2 and inputs[0] is not inputs[1]  # x != x asks for NaN
        floating = all(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in inputs)
        if equation.primitive.name in ("eq", "ne") and two and floating:
            found.append(equation)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program):
            if _is_program(inner):
                found += equalities(getattr(inner, "jaxpr", inner))
    return found


def _is_program(value):
    return isinstance(value, jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr)


def of_gradient(loss, params):
    return equalities(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)


def test_a_maximum_is_found():
    x = jnp.ones((2, 3))
    assert of_gradient(lambda x: jnp.max(x), x)  # that of `maximum` and `clip` compares the operands in newer JAX
    assert not of_gradient(lambda x: jax.nn.logsumexp(x) + jax.nn.relu(x).sum() + jnp.sort(x)[0, 0], x)


SISTERS = {"resnet, small images", "vgg, batch norm", "cifar_resnet, preactivation"}  # of the same code as the others
SISTERS |= {"conv4 without norm", "conv4, strided"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SISTERS else ()) for name in nets.NETS]
)
def test_networks(name):
    build, shape = nets.NETS[name]
    batch = {"image": np.ones((4, *shape), np.float32), "label": np.arange(4, dtype=np.int32) % 2}
    objective = jt.classification(build())
    params, state = jax.eval_shape(lambda: objective.init(jax.random.key(0), batch))
    state = jax.tree.map(lambda like: np.ones(like.shape, like.dtype), state)
    assert not of_gradient(gradients.loss_of(objective, state, batch), params)


@pytest.mark.parametrize("name", contract.OBJECTIVES)
def test_objectives(name):
    rng = np.random.default_rng(1)
    data, model = contract.batches(rng, 1)[0], contract.normalised([])
    weights, _ = jax.eval_shape(lambda: jt.classification(model).init(contract.KEY, data))
    weights = jax.tree.map(lambda like: np.ones(like.shape, like.dtype), weights)
    objective = contract.OBJECTIVES[name](model, weights, rng)
    params, state = jax.eval_shape(lambda: objective.init(contract.KEY, data))
    state = jax.tree.map(lambda like: np.ones(like.shape, like.dtype), state)
    assert not of_gradient(gradients.loss_of(objective, state, data, contract.KEY), params)


LABELS, KEEP = np.arange(6, dtype=np.int32) % 2, np.ones(6, np.float32)
LOSSES = {
    "batch_hard": lambda x: jt.losses.mined_triplet(x, LABELS).sum(),
    "batch_all": lambda x: jt.losses.mined_triplet(x, LABELS, mining=jt.losses.batch_all).sum(),
    "semi_hard": lambda x: jt.losses.mined_triplet(x, LABELS, mining=jt.losses.semi_hard, squared=True).sum(),
    "triplet": lambda x: jt.losses.triplet(x, 2 * x, -x).sum(),
    "rkd_distance": lambda x: jt.losses.rkd_distance(x, 2 * x, mask=KEEP),
    "rkd_angle": lambda x: jt.losses.rkd_angle(x, 2 * x, mask=KEEP),
    "kd": lambda x: jt.losses.kd(x, 2 * x, temperature=2.0, standardize=True).sum(),
    "dkd": lambda x: jt.losses.dkd(x, 2 * x, LABELS).sum(),
    "dist": lambda x: jt.losses.dist(x, 2 * x),
    "cross_entropy": lambda x: jt.losses.cross_entropy(x, LABELS).sum(),
    "similarity_preserving": lambda x: jt.losses.similarity_preserving(x, 2 * x),
    "pkt": lambda x: jt.losses.pkt(x, 2 * x),
    "ridge_weights": lambda x: jt.meta.ridge_weights(x, x[:, :2], x[0, 0]).sum(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    assert not of_gradient(LOSSES[name], jnp.ones((6, 4)))
