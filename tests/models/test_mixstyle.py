"""MixStyle: styles of examples are mixed in training, alike on all devices; inference and weights are the model's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt

KEY = jax.random.key(4)


class Net(nn.Module):
    """Maps by one layer, then another whose input shows what became of them."""

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        maps = nn.Conv(3, (2, 2), name="stem")(x)
        seen = nn.Dense(3, name="body", use_bias=False, kernel_init=nn.initializers.ones_init())(maps)
        features = seen.mean((1, 2))
        return {"maps": maps, "seen": seen, "features": features, "logits": nn.Dense(4, name="head")(features**2)}


@pytest.fixture
def made(rng):
    net = jt.models.linen(Net(), stages=("stem", "body", "head"))
    images = rng.normal(size=(6, 4, 5, 2)).astype(np.float32)
    return net, net.init(KEY, images), images


def trained(model, variables, images, key=KEY):
    return jax.jit(lambda v, x, k: model.apply(v, x, train=True, key=k)[0])(variables, images, key)


def styles(maps):
    maps = np.asarray(maps, np.float64).reshape(len(maps), -1, maps.shape[-1])
    return maps.mean(1), maps.std(1, ddof=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "domains", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_each_style_is_between_two_examples(made, domains):
    """The first layer's output is whitened and wears a mixture of its own style and of one other example's."""
    net, variables, images = made
    model = jt.models.mixstyle(net, after="stem", probability=1.0, alpha=0.8, domains=domains)
    plain = net.apply(variables, images, train=False, key=None)[0]["maps"]
    found = trained(model, variables, images)["maps"]
    (mean, spread), (new_mean, new_spread) = styles(plain), styles(found)
    white = (np.asarray(plain) - mean[:, None, None]) / spread[:, None, None]
    np.testing.assert_allclose(found, white * new_spread[:, None, None] + new_mean[:, None, None], rtol=1e-3, atol=1e-4)
    partners = []
    for row in range(6):
        fits = []
        for other in range(6):
            away = np.concatenate([mean[other] - mean[row], spread[other] - spread[row]])
            moved = np.concatenate([new_mean[row] - mean[row], new_spread[row] - spread[row]])
            share = moved @ away / max(away @ away, 1e-12)
            if np.allclose(moved, share * away, atol=1e-4) and -1e-4 <= share <= 1 + 1e-4:
                fits.append(other)
        assert fits
        partners.append(fits)
    if domains > 1:
        for row, fits in enumerate(partners):
            moved = np.abs(new_mean[row] - mean[row]).max() > 1e-3
            assert not moved or any(other % domains != row % domains for other in fits)


def test_partners_are_a_permutation_and_of_another_domain():
    from jaxtransfer.models.mixstyle import _Styles

    for domains in (1, 3):
        own = _Styles(KEY, ("stem",), 1.0, 0.1, domains, 1e-6, None)
        partners = jax.jit(jax.vmap(lambda key, own=own: own.partners(key, 12)))(jax.random.split(KEY, 20))
        for row in np.asarray(partners):
            np.testing.assert_array_equal(np.sort(row), np.arange(12))
            assert domains == 1 or np.all(row % domains != np.arange(12) % domains)
        assert len({tuple(row) for row in np.asarray(partners)}) > 10


def test_inference_and_weights_are_the_models(made):
    net, variables, images = made
    model = jt.models.mixstyle(net, after="stem")
    got, want = (one.apply(variables, images, train=False, key=None)[0] for one in (model, net))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    fresh = model.init(KEY, images)
    jax.tree.map(np.testing.assert_array_equal, fresh["params"], variables["params"])


@pytest.mark.slow
def test_probability_and_keys(made):
    """0 never mixes; between, some steps do; each key draws anew."""
    net, variables, images = made
    plain = net.apply(variables, images, train=False, key=None)[0]["maps"]
    never = jt.models.mixstyle(net, after="stem", probability=0.0)
    np.testing.assert_allclose(trained(never, variables, images)["maps"], plain, atol=1e-5)
    often = jt.models.mixstyle(net, after="stem", probability=0.5, alpha=1.0)
    run = jax.jit(jax.vmap(lambda key: often.apply(variables, images, train=True, key=key)[0]["maps"]))
    moved = np.abs(np.asarray(run(jax.random.split(KEY, 40))) - np.asarray(plain)).max((1, 2, 3, 4)) > 1e-3
    assert 8 < moved.sum() < 32


@pytest.mark.slow
def test_no_gradient_flows_through_the_styles(made):
    """With all statistics held, the output is linear in the maps: its slope is the new spread over the old."""
    from jaxtransfer.models.mixstyle import _Styles

    own = _Styles(KEY, ("stem",), 1.0, 0.5, 1, 1e-6, None)
    maps = jnp.asarray(np.random.default_rng(3).normal(size=(4, 3, 3, 2)), jnp.float32)
    slope = jax.jit(jax.grad(lambda x: jnp.sum(own.mixed(x, "stem"))))(maps)
    ratio = styles(jax.jit(lambda x: own.mixed(x, "stem"))(maps))[1] / styles(maps)[1]
    np.testing.assert_allclose(slope, np.broadcast_to(ratio[:, None, None], maps.shape), rtol=1e-3)


@pytest.mark.slow
def test_constant_maps_and_a_single_pixel_stay_finite():
    from jaxtransfer.models.mixstyle import _Styles

    own = _Styles(KEY, ("stem",), 1.0, 0.5, 1, 1e-6, None)
    for maps in (jnp.full((4, 3, 3, 2), 2.0), jnp.ones((4, 1, 1, 2))):
        value, slope = jax.jit(jax.value_and_grad(lambda x: jnp.sum(own.mixed(x, "stem") ** 2)))(maps)
        assert np.isfinite(value)
        assert np.all(np.isfinite(slope))


@pytest.mark.slow
def test_the_same_on_any_devices(mesh_of, rng):
    net = jt.models.linen(Net(), stages=("stem", "body", "head"))
    model = jt.models.mixstyle(net, after="stem", probability=0.9, alpha=0.6, domains=2)
    names = ("a", "b")
    objective = jt.together(sum(jt.classification(model).on(name) for name in names))
    data = [
        {
            name: {"image": rng.normal(size=(8, 4, 5, 2)).astype(np.float32), "label": rng.integers(0, 4, 8)}
            for name in names
        }
        for _ in range(3)
    ]
    ended = []
    for place in ({}, {"mesh": mesh_of(4)}, {"mesh": mesh_of(4), "mode": "pmap"}):
        optimizer = optax.sgd(0.1)
        state, step = jt.init(objective, optimizer, KEY, data[0]), jt.train_step(objective, optimizer, **place)
        for batch in data:
            state, _ = step(state, batch)
        ended.append(jax.tree.map(np.array, state.params))
    for other in ended[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), other, ended[0])


def test_a_model_of_the_zoo_and_its_recipe():
    net = jt.models.normalize(jt.models.cifar_resnet(8, 3), 0.5, 0.25)
    model = jt.models.mixstyle(net, after=("stage1_block1", "stage2_block1"))
    assert model.recipe is not None
    assert model.shares_key
    images = jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.uint8)
    variables = jax.eval_shape(model.init, KEY, images)
    outputs = jax.eval_shape(lambda v, x: model.apply(v, x, train=True, key=KEY)[0], variables, images)
    assert outputs["logits"].shape == (4, 3)


def test_refusals(made):
    net, variables, images = made
    for how, message in (
        ({"probability": 1.5}, "probability must be"),
        ({"alpha": 0}, "alpha > 0"),
        ({"domains": 0}, "domains >= 1"),
        ({"epsilon": 0}, "epsilon > 0"),
    ):
        with pytest.raises(jt.InputError, match=message):
            jt.models.mixstyle(net, after="stem", **how)
    for how, key, message in (
        ({"after": "stem"}, None, "pass a key"),
        ({"after": "trunk"}, KEY, "it has stem, body, head"),
        ({"after": "head"}, KEY, "mixes maps"),
        ({"after": "stem", "domains": 4}, KEY, "don't divide"),
    ):
        with pytest.raises(jt.InputError, match=message):
            jt.models.mixstyle(net, **how).apply(variables, images, train=True, key=key)
