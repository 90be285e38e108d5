import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import models
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model

KEY = jax.random.key(0)
BYTES = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def see(inputs):
    return {"logits": inputs}


def identity():
    def apply(variables, inputs, *, train, key):
        return see(inputs), {k: v for k, v in variables.items() if k != "params"}

    return Model(lambda key, inputs: {"params": {"seen": inputs}}, apply, "eye", ("seen",))


def test_bytes_and_floats_agree_with_the_formula():
    model = models.normalize(identity(), MEAN, STD)
    expected = (BYTES / 255.0 - np.array(MEAN)) / np.array(STD)
    for images in (BYTES, (BYTES / 255.0).astype(np.float32)):
        outputs, _ = model.apply({"params": {}}, images, train=False, key=None)
        assert outputs["logits"].dtype == jnp.float32
        np.testing.assert_allclose(outputs["logits"], expected, atol=1e-5)
        np.testing.assert_allclose(model.init(KEY, images)["params"]["seen"], expected, atol=1e-5)
    assert (model.name, model.stages) == ("eye", ("seen",))


def test_a_number_serves_all_channels_and_types_stay_wide():
    model = models.normalize(identity(), 0.5, 0.25)
    low, _ = model.apply({"params": {}}, jnp.full((1, 2, 2, 1), 0.75, jnp.bfloat16), train=False, key=None)
    assert low["logits"].dtype == jnp.float32
    np.testing.assert_allclose(low["logits"], np.ones((1, 2, 2, 1)))
    with jax.enable_x64(True):
        wide, _ = model.apply({"params": {}}, np.full((1, 2, 2, 3), 0.1), train=False, key=None)
        assert wide["logits"].dtype == jnp.float64
        np.testing.assert_allclose(wide["logits"], np.full((1, 2, 2, 3), -1.6), rtol=1e-14)


def test_one_model_gives_the_same_logits_for_both():
    model = models.normalize(models.mlp(3, hidden=(4,)), MEAN, STD)
    variables = model.init(KEY, BYTES)
    run = jax.jit(lambda v, x: model.apply(v, x, train=True, key=None)[0]["logits"])
    np.testing.assert_allclose(run(variables, BYTES), run(variables, np.float32(BYTES / 255.0)), atol=1e-4)


def test_wrong_statistics_and_images_are_refused():
    with pytest.raises(InputError, match="positive"):
        models.normalize(identity(), 0.5, [0.1, 0.0, 0.1])
    with pytest.raises(InputError, match="one per channel"):
        models.normalize(identity(), [[0.5]], 0.1)
    model = models.normalize(identity(), MEAN, STD)
    with pytest.raises(InputError, match="3 channels"):
        model.init(KEY, BYTES[..., :2])
    with pytest.raises(InputError, match="int32"):
        model.init(KEY, BYTES.astype(np.int32))


def test_inference_ignores_training():
    plain = models.conv4(3, width=2, name="probe")
    model = plain.inference()
    assert (model.name, model.stages) == (plain.name, plain.stages)
    images = np.float32(BYTES / 255.0)
    variables = model.init(KEY, images)
    trained, state = jax.jit(lambda *given: model.apply(*given, train=True, key=KEY))(variables, images)
    expected, _ = jax.jit(lambda *given: plain.apply(*given, train=False, key=None))(variables, images)
    np.testing.assert_array_equal(trained["logits"], expected["logits"])
    chex.assert_trees_all_equal(state, {"batch_stats": variables["batch_stats"]})


def test_the_axis_is_handed_on_only_when_set():
    seen = []

    def apply(variables, inputs, *, train, key, axis=None):
        seen.append(axis)
        return see(inputs), {}

    meets = Model(lambda key, inputs: {"params": {}}, apply)
    for model in (models.normalize(meets, 0.0, 1.0), meets.inference()):
        model.apply({"params": {}}, jnp.ones((1, 1, 1, 1)), train=True, key=None, axis="devices")
    assert seen == ["devices", None]  # in inference no examples meet
    identity().inference().apply({"params": {}}, jnp.ones((1, 1)), train=True, key=None)
