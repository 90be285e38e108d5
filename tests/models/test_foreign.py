"""Models written in other ways fit through the same pair of functions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxtransfer as jt
from jaxtransfer.model import Model
from jaxtransfer.models import normalize

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x, train):
        return self.head(self.norm(x, use_running_average=not train))


def nnx_model():
    graph = nnx.graphdef(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))

    def init(key, inputs):
        _, params, state = nnx.split(Net(nnx.Rngs(params=key)), nnx.Param, ...)
        return {"params": nnx.to_pure_dict(params), "state": nnx.to_pure_dict(state)}

    def apply(variables, inputs, *, train, key):
        net = nnx.merge(graph, variables["params"], variables["state"])
        outputs = {"logits": net(inputs, train)}
        return outputs, {"state": nnx.to_pure_dict(nnx.split(net, nnx.Param, ...)[2])}

    return Model(init, apply, "nnx")


def haiku_style_model():
    """The pair of `hk.transform_with_state`: init(key, x) and apply(params, state, key, x, train)."""

    def net_init(key, x):
        return {"linear": {"w": jax.random.normal(key, (x.shape[-1], 3))}}, {"calls": jnp.zeros((), jnp.int32)}

    def net_apply(params, state, key, x, train):
        return x @ params["linear"]["w"], {"calls": state["calls"] + train}

    def init(key, inputs):
        params, state = net_init(key, inputs)
        return {"params": params, "haiku": state}

    def apply(variables, inputs, *, train, key):
        logits, state = net_apply(variables["params"], variables["haiku"], key, inputs, train)
        return {"logits": logits}, {"haiku": state}

    return Model(init, apply, "haiku")


def function_model():
    def init(key, inputs):
        return {"params": {"w": jax.random.normal(key, (inputs.shape[-1], 3))}}

    def apply(variables, inputs, *, train, key):
        return {"logits": inputs @ variables["params"]["w"]}, {}

    return Model(init, apply, "function")


def check(model):
    variables = model.init(KEY, X)

    @jax.jit
    def step(variables, x):
        def loss(params):
            outputs, state = model.apply(variables | {"params": params}, x, train=True, key=KEY)
            return (outputs["logits"] ** 2).mean(), state

        (value, state), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradients)
        return {"params": params, **state}, value

    first, before = step(variables, X)
    second, after = step(first, X)
    assert after < before
    assert jax.tree.structure(first) == jax.tree.structure(second) == jax.tree.structure(variables)
    assert step._cache_size() == 1
    outputs, state = normalize(model, 0.0, 1.0).inference().apply(first, X, train=True, key=None)
    assert outputs["logits"].shape == (6, 3)
    assert state == {k: v for k, v in first.items() if k != "params"}
    return variables, first


def test_nnx():
    before, after = check(nnx_model())
    statistics = [np.asarray(jax.tree.leaves(v["state"])[0]) for v in (before, after)]
    assert (statistics[0] != statistics[1]).any()


def test_haiku_style():
    assert check(haiku_style_model())[1]["haiku"]["calls"] == 1


def test_function():
    check(function_model())


WEIGHTS = np.ones((4, 3))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (nn.Dense(3), r"must return \{'params': ..., \*\*state\}; got a Dense"),
        ({"w": WEIGHTS}, r"must return \{'params': ..., \*\*state\}; got \['w'\]"),
        ({"params": nn.Dense(3)}, "the init of model 'mine': params is a Dense"),
        ({"params": {"body": {"net": nn.Dense(3)}}}, "params/body/net is a Dense"),
        ({"params": {"w": WEIGHTS.tolist()}}, "params/w/0/0 is a float"),
        ({"params": {"w": WEIGHTS.astype(np.int32)}}, r"floating-point type; .*params/w is int32\[4, 3\]"),
        ({"params": {"w": WEIGHTS, "key": jax.random.key(0)}}, r"floating-point type; .*params/key is key<fry>"),
        ({"params": {"w": WEIGHTS}, "stats": {"kind": "mean"}}, "stats/kind is a str"),
        ({"params": {"w": np.array([None])}}, "params/w is one of object"),
    ],
)
def test_what_an_init_must_not_return_is_refused_by_path(given, said):
    model = Model(lambda key, x: given, lambda variables, x, *, train, key: ({"logits": x}, {}), "mine")
    with pytest.raises(jt.InputError, match=said):
        jt.init(jt.classification(model), optax.sgd(0.1), KEY, {"image": X, "label": np.arange(6) % 3})


def test_numpy_weights_are_taken_in_the_precision_of_jax():
    model = Model(
        lambda key, x: {"params": {"w": WEIGHTS}, "calls": {"count": np.zeros((), int)}},
        lambda variables, x, *, train, key: ({"logits": x @ variables["params"]["w"]}, {"calls": variables["calls"]}),
    )
    state = jt.init(jt.classification(model), optax.sgd(0.1), KEY, {"image": X, "label": np.arange(6) % 3})
    assert state.params["model"]["w"].dtype == jnp.float32
    assert state.state["model"]["calls"]["count"].dtype == jnp.int32
