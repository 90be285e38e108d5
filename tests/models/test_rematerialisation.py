"""Blocks that are computed anew in the backward pass: the same network, in less memory."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.models.linear_inputs import linear_inputs

KEY = jax.random.key(5)
NETS = {
    "vit": (lambda **more: jt.models.vit(8, 2, 2, 3, patch=4, dropout=0.3, **more), (8, 8, 3)),
    "text": (
        lambda **more: jt.models.text_encoder(
            3, width=8, depth=2, heads=2, vocabulary=11, positions=6, dropout=0.3, **more
        ),
        (6,),
    ),
    "resnet": (lambda **more: jt.models.resnet18(3, small_images=True, **more), (8, 8, 3)),
    "cifar": (lambda **more: jt.models.cifar_resnet(8, 3, **more), (8, 8, 3)),
    "preactivated": (lambda **more: jt.models.cifar_resnet(8, 3, preactivation=True, **more), (8, 8, 3)),
    "wide": (lambda **more: jt.models.wide_resnet(10, 1, 3, dropout=0.3, **more), (8, 8, 3)),
}
SLOW = ("resnet", "text", "preactivated", "wide")


def inputs_of(shape, rows=4):
    rng = np.random.default_rng(1)
    whole = len(shape) == 1
    return rng.integers(1, 11, (rows, *shape)).astype(np.int32) if whole else rng.normal(size=(rows, *shape)) * 1.0


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in NETS])
def test_outputs_state_draws_and_gradients_are_those_of_the_network_that_keeps_its_blocks(name):
    build, shape = NETS[name]
    plain, again = build(), build(remat=True)
    x = jnp.asarray(inputs_of(shape))
    variables, same = (jax.jit(model.init)(KEY, x) for model in (plain, again))
    assert jt.tree.leaves_by_path(variables).keys() == jt.tree.leaves_by_path(same).keys()
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (variables, same)), strict=True))

    def computed(model):
        @jax.jit
        def both(params):
            def loss(params):
                outputs, state = model.apply({**variables, "params": params}, x, train=True, key=KEY)
                return jnp.sum(outputs["logits"] ** 2), (outputs, state)

            return jax.value_and_grad(loss, has_aux=True)(params)

        traced = both.trace(variables["params"])
        return traced.lower().compile()(variables["params"]), traced.jaxpr

    (values, program), (others, anew) = computed(plain), computed(again)
    assert "prevent_cse" in str(anew)
    assert "prevent_cse" not in str(program)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(values[1]))  # the key's bias has no gradient at all
    for path, leaf in jt.tree.leaves_by_path(values).items():
        got = jt.tree.leaves_by_path(others)[path]
        np.testing.assert_allclose(got, leaf, rtol=1e-4, atol=2e-6 * largest, err_msg=path)


@pytest.mark.slow
def test_a_deep_transformer_keeps_a_tenth_for_the_backward_pass():
    """Traced: XLA on a CPU computes the blocks once in spite of it, so the compiled program tells nothing there."""

    def kept(remat):
        net = jt.models.vit(16, 6, 2, 3, patch=2, remat=remat)
        x = jax.ShapeDtypeStruct((8, 16, 16, 1), np.float32)
        params = jax.eval_shape(lambda x: net.init(KEY, x), x)["params"]

        def backward(params, x):
            return jax.vjp(lambda p: net.apply({"params": p}, x, train=True, key=None)[0]["logits"], params)[1]

        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(backward, params, x)))

    assert 0 < kept(True) < 0.1 * kept(False)


@pytest.mark.slow
def test_frozen_and_gradually_unfrozen_blocks_stay_as_without():
    x, rng = inputs_of((8, 8, 3), 6), np.random.default_rng(2)
    batch = {"image": x.astype(np.float32), "label": rng.integers(0, 3, 6)}

    def trained(remat):
        net = jt.models.cifar_resnet(8, 3, remat=remat)
        optimizer = jt.optim.gradual_unfreeze(optax.sgd(0.1), net.stages, every=1)
        objective = jt.classification(net)
        state, step = jt.init(objective, optimizer, KEY, batch), jt.train_step(objective, optimizer)
        for _ in range(2):
            state, _ = step(state, batch)
        return state.params, state.state

    plain, again = trained(False), trained(True)
    for path, leaf in jt.tree.leaves_by_path(plain).items():
        got = jt.tree.leaves_by_path(again)[path]
        np.testing.assert_allclose(got, leaf, rtol=1e-4, atol=1e-5, err_msg=path)


@pytest.mark.slow
def test_the_inputs_of_linear_layers_are_told_also_of_blocks_that_are_computed_anew():
    seen = []
    for remat in (False, True):
        net = jt.models.vit(8, 2, 2, 3, patch=4, remat=remat)
        x = jnp.asarray(inputs_of((8, 8, 3)))
        variables = net.init(KEY, x)
        seen.append(
            jax.jit(lambda v, net=net, x=x: linear_inputs(net).apply(v, x, train=False, key=None)[0])(variables)
        )
    assert seen[0].keys() == seen[1].keys()
    assert any("fc2" in path for path in seen[0])
    for path, rows in seen[0].items():
        np.testing.assert_allclose(seen[1][path], rows, rtol=1e-5, atol=1e-5)


def test_every_constructor_hands_the_option_on_and_notes_it():
    made = [
        build
        for name in dir(jt.models)
        if callable(build := getattr(jt.models, name))
        and "remat" in getattr(inspect.signature(build), "parameters", ())
    ]
    assert len(made) >= 16
    options = {"text_encoder": {"width": 8, "depth": 1, "heads": 2}}
    places = {"vit": (8, 1, 2, 3), "resnet": (18, 3), "cifar_resnet": (8, 3), "wide_resnet": (10, 1, 3)}
    for build in made:
        model = build(*places.get(build.__name__, (3,)), remat=True, **options.get(build.__name__, {}))
        assert model.recipe.arguments["remat"] is True, build.__name__
