from functools import cache, partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import models
from jaxtransfer.errors import InputError

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(loc=0.3, size=(8, 8, 8, 1)).astype(np.float32)
KEY = jax.random.key(0)
MAKERS = {
    "mlp": partial(models.mlp, 3, hidden=(8,)),
    "small": partial(models.small_cnn, 3, width=4),
    "conv4": partial(models.conv4, 3, width=4),
    "resnet": partial(models.cifar_resnet, 8, 3),
    "preact": partial(models.cifar_resnet, 8, 3, preactivation=True),
    "imagenet": partial(models.resnet, 18, 3),
    "vgg": partial(models.vgg, 11, 3),
    "wide": partial(models.wide_resnet, 10, 1, 3, dropout=0.3),
    "vit": partial(models.vit, 8, 1, 2, 3, patch=4, dropout=0.1),
}
NETS = {name: make() for name, make in MAKERS.items()}
TINY = ["mlp", "small", "wide", "vit"]


@cache
def variables_of(name):
    return NETS[name].init(KEY, IMAGES)


@pytest.mark.parametrize("name", [*TINY[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in TINY[2:])])
def test_training_updates_the_state_and_inference_does_not(name):
    model = NETS[name]
    variables = variables_of(name)
    before = {k: v for k, v in variables.items() if k != "params"}

    step = jax.jit(lambda v, x, k: model.apply(v, x, train=True, key=k))
    _, state = step(variables, IMAGES, KEY)
    assert jax.tree.structure(state) == jax.tree.structure(before)
    changed = jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), state, before))
    assert all(changed)
    again = step({"params": variables["params"], **state}, IMAGES, KEY)[1]
    assert jax.tree.map(lambda a: (a.shape, a.dtype), again) == jax.tree.map(lambda a: (a.shape, a.dtype), before)
    assert step._cache_size() == 1

    outputs, same = jax.jit(lambda v, x: model.apply(v, x, train=False, key=None))(variables, IMAGES)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), same, before))
    assert np.isfinite(outputs["logits"]).all()


def test_batch_statistics_follow_the_momentum():
    model, variables = NETS["small"], variables_of("small")
    _, state = jax.jit(lambda v, x: model.apply(v, x, train=True, key=None))(variables, IMAGES)
    conv = variables["params"]["stem_conv"]
    maps = nn.Conv(4, (3, 3), padding=((1, 1), (1, 1)), use_bias=False).apply({"params": conv}, IMAGES)
    norm = state["batch_stats"]["stem_norm"]
    np.testing.assert_allclose(norm["mean"], 0.1 * maps.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(norm["var"], 0.9 + 0.1 * maps.var((0, 1, 2)), atol=1e-5)


@pytest.mark.parametrize("name", NETS)
def test_low_precision_computes_low_and_keeps_float32(name):
    model = MAKERS[name](dtype=jnp.bfloat16)
    variables = jax.eval_shape(model.init, KEY, IMAGES)
    outputs, state = jax.eval_shape(lambda v, x: model.apply(v, x, train=True, key=KEY), variables, IMAGES)
    assert outputs["logits"].dtype == jnp.float32
    assert {o.dtype for k, o in outputs.items() if k != "logits"} == {jnp.dtype(jnp.bfloat16)}
    assert {a.dtype for a in jax.tree.leaves((variables, state))} == {jnp.dtype(jnp.float32)}


def test_double_precision_stays_and_the_state_keeps_its_type():
    with jax.enable_x64(True):
        model = models.small_cnn(3, width=4)
        images = IMAGES.astype(np.float64)
        variables = jax.eval_shape(model.init, KEY, images)
        outputs, state = jax.eval_shape(lambda v, x: model.apply(v, x, train=True, key=None), variables, images)
        assert outputs["logits"].dtype == jnp.float64
        assert state["batch_stats"] == variables["batch_stats"]


def test_axis_gives_the_statistics_of_the_global_batch():
    model, variables = NETS["small"], variables_of("small")

    def forward(images, axis):
        return model.apply(variables, images, train=True, key=None, axis=axis)

    whole, state = jax.jit(lambda x: forward(x, None))(IMAGES)
    halves = jnp.asarray(IMAGES).reshape(2, 4, 8, 8, 1)
    parts, states = jax.jit(jax.vmap(lambda x: forward(x, "devices"), axis_name="devices"))(halves)
    np.testing.assert_allclose(parts["logits"].reshape(8, 3), whole["logits"], atol=2e-5)
    for i in (0, 1):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=1e-5), states, state)


def test_a_module_without_the_field_is_refused_under_an_axis():
    class Bare(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            return {"logits": nn.BatchNorm(use_running_average=not train)(nn.Dense(2)(x))}

    model = models.linen(Bare())
    x = jnp.ones((2, 3))
    variables = model.init(KEY, x)
    with pytest.raises(InputError, match="no field `axis`"):
        model.apply(variables, x, train=True, key=None, axis="devices")
    model.apply(variables, x, train=False, key=None, axis="devices")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (nn.Dense, r"got the class Dense; make one: Dense\(...\)"),
        (lambda x: x, "got a function; jt.Model takes plain functions"),
        ({"params": {}}, "got a dict"),
        (None, "got a NoneType"),
    ],
)
def test_what_is_no_module_is_refused(given, told):
    with pytest.raises(InputError, match=f"model 'net': expected a module of flax.linen, {told}"):
        models.linen(given, name="net")


def test_a_bare_linen_module_is_a_model():
    model = models.linen(nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]), name="user")
    variables = model.init(KEY, jnp.ones((3, 5)))
    outputs, state = model.apply(variables, jnp.ones((3, 5)), train=True, key=None)
    assert outputs["logits"].shape == (3, 2)
    assert state == {}
    assert model.name == "user"


def test_init_needs_only_shapes_and_gives_what_linen_gives():
    module = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)])
    x = np.ones((3, 5), np.float64)  # float32 as JAX sees it
    ours = models.linen(module).init(KEY, jax.ShapeDtypeStruct((3, 5), jnp.float32))
    chex.assert_trees_all_equal(ours, models.linen(module).init(KEY, x))
    chex.assert_trees_all_equal(ours, module.init(KEY, jnp.asarray(x, jnp.float32)))
    traced = jax.eval_shape(models.linen(module).init, KEY, jnp.ones((3, 5)))
    assert jax.tree.structure(traced) == jax.tree.structure(ours)


def test_init_from_data():
    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x / self.param("scale", lambda key: jnp.abs(x).max())

    model = models.linen(Scaled())
    assert model.init(KEY, 3 * jnp.ones((2, 2)))["params"]["scale"] == 3
    assert jax.eval_shape(model.init, KEY, jnp.ones((2, 2)))["params"]["scale"].shape == ()
    with pytest.raises(InputError, match="initialises from data: give its init arrays"):
        model.init(KEY, jax.ShapeDtypeStruct((2, 2), jnp.float32))


def test_layers_in_a_loop_start_from_shapes():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(x.shape[-1])(x), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            loop = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return loop()(x, None)[0]

    model, x = models.linen(Stack()), jnp.ones((2, 4))
    chex.assert_trees_all_equal(model.init(KEY, jax.ShapeDtypeStruct(x.shape, x.dtype)), model.init(KEY, x))
    assert model.init(KEY, x)["params"]["ScanLayer_0"]["Dense_0"]["kernel"].shape == (3, 4, 4)


def test_dropout_draws_from_the_key():
    model, variables = NETS["vit"], variables_of("vit")
    run = jax.jit(lambda k: model.apply(variables, IMAGES, train=True, key=k)[0]["logits"])
    one, same, other = (run(jax.random.key(k)) for k in (1, 1, 2))
    assert (one == same).all()
    assert (one != other).any()
    with pytest.raises(InputError, match="pass a key"):
        model.apply(variables, IMAGES, train=True, key=None)


@pytest.mark.parametrize("name", NETS)
def test_wrong_inputs_name_what_was_expected(name):
    model = NETS[name]
    variables = jax.eval_shape(model.init, KEY, IMAGES)

    def run(shape):
        jax.eval_shape(lambda v, x: model.apply(v, x, train=False, key=None), variables, jnp.zeros(shape))

    with pytest.raises(InputError, match=r"inputs of shape \(2, 8, 8, 3\) don't fit the weights") as error:
        run((2, 8, 8, 3))
    assert "\n" not in str(error.value)
    if name == "mlp":
        with pytest.raises(InputError, match=r"expected a batch .*got shape \(8,\)"):
            run((8,))
    else:
        with pytest.raises(InputError, match=r"expected a batch of images .*got shape \(8, 8, 1\)"):
            run((8, 8, 1))
        with pytest.raises(InputError, match="expected a batch of images"):
            run((2, 0, 8, 1))


def test_foreign_variables_are_refused():
    model = NETS["small"]
    with pytest.raises(InputError, match="not those of model"):
        model.apply({"params": {}}, IMAGES, train=False, key=None)
    with pytest.raises(InputError, match="not those of model"):
        model.apply({"params": variables_of("small")["params"]}, IMAGES, train=False, key=None)


def test_vit_wants_whole_patches_and_its_own_size():
    model = NETS["vit"]
    with pytest.raises(InputError, match="4×4 patches"):
        model.init(KEY, jnp.zeros((1, 8, 10, 1)))
    variables = jax.eval_shape(model.init, KEY, IMAGES)
    with pytest.raises(InputError, match="stem_position"):
        jax.eval_shape(lambda v: model.apply(v, jnp.zeros((1, 12, 12, 1)), train=False, key=None), variables)
