"""Networks as programs: any batch size, by JAX alone, what the model gives."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxtransfer as jt

pytest.importorskip("flatbuffers")

SERVE = Path(__file__).parents[2] / "experiments" / "serve.py"
NET = jt.models.normalize(jt.models.mlp(3, hidden=(4,)), 0.3, 0.4)
SHAPE = (4, 4, 1)


def drawn(model, shape, seed=0):
    """Variables of random values, without running its initialisation."""
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), image)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: np.abs(rng.normal(size=leaf.shape)).astype(leaf.dtype) / 4, dict(shapes))


def photos(count, shape=SHAPE, seed=1):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


@functools.cache
def variables():
    return drawn(NET, SHAPE)


def reference(images):
    """The perceptron's probabilities, by hand."""
    params = variables()["params"]
    x = (images.astype(np.float64) / 255 - 0.3).reshape(len(images), -1) / 0.4
    hidden = [name for name in params if name != "head"]
    for name in [*hidden, "head"]:
        x = x @ params[name]["kernel"].astype(np.float64) + params[name]["bias"]
        x = x if name == "head" else np.maximum(x, 0)
    powers = np.exp(x - x.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def served(folder, images):
    program = export.deserialize(bytearray((folder / "program.jax").read_bytes()))
    return jax.jit(program.call)(dict(np.load(folder / "weights.npz")), images)


def test_a_program_gives_probabilities_of_images_as_they_are(tmp_path):
    written = jt.export_program((NET, variables()), tmp_path / "net", image_shape=SHAPE)
    assert str(written).startswith(
        f"{tmp_path / 'net'}: uint8[batch,4,4,1] to probabilities float32[batch,3] on cpu, cuda, tpu"
    )
    for count in (1, 5):
        found = served(tmp_path / "net", photos(count))
        assert found.keys() == {"probabilities"}
        np.testing.assert_allclose(found["probabilities"], reference(photos(count)), rtol=1e-5, atol=1e-6)
    program = export.deserialize(bytearray((tmp_path / "net" / "program.jax").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    about = json.loads((tmp_path / "net" / "about.json").read_text())
    assert about["inputs"] == {"shape": ["batch", 4, 4, 1], "dtype": "uint8"}
    assert about["outputs"] == {"probabilities": {"shape": ["batch", 3], "dtype": "float32"}}
    assert (about["network"]["model"], about["network"]["mean"]) == ("mlp", [0.3])


def test_its_weights_stay_beside_it(tmp_path):
    """Others of the same network take their place."""
    jt.export_program((NET, variables()), tmp_path / "net", image_shape=SHAPE, platforms=["cpu"])
    other = {path: leaf * 0 for path, leaf in np.load(tmp_path / "net" / "weights.npz").items()}
    program = export.deserialize(bytearray((tmp_path / "net" / "program.jax").read_bytes()))
    np.testing.assert_allclose(program.call(other, photos(2))["probabilities"], np.full((2, 3), 1 / 3), rtol=1e-6)
    again = jt.load_pretrained(
        tmp_path / "net" / "weights.npz", NET, inputs=jax.ShapeDtypeStruct((1, *SHAPE), jnp.float32)
    )
    jax.tree.map(np.testing.assert_array_equal, again.variables, variables())


def test_normalised_images_and_other_outputs(tmp_path):
    jt.export_program(
        *((NET, variables()), tmp_path / "net"),
        **{"image_shape": SHAPE, "platforms": ["cpu"], "normalize": False, "outputs": ["logits", "features"]},
    )
    images = photos(3)
    found = served(tmp_path / "net", ((images / 255 - 0.3) / 0.4).astype(np.float32))
    outputs, _ = NET.apply(variables(), images, train=False, key=None)
    assert list(found) == ["features", "logits"]
    for name, value in found.items():
        np.testing.assert_allclose(value, outputs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_networks_of_other_things_than_images(tmp_path):
    model, one = jt.models.text_encoder(3, width=8, depth=1, heads=2, vocabulary=9, positions=6), np.int32
    tokens = np.array([[2, 5, 7, 3, 0], [2, 8, 3, 0, 0]], np.int32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), jax.ShapeDtypeStruct((1, 5), one))
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), dict(shapes))
    like = jax.ShapeDtypeStruct((1, 5), one)
    written = jt.export_program((model, values), tmp_path / "net", inputs=like, outputs=["logits"], platforms=["cpu"])
    assert written.inputs == "int32[batch,5]"
    wanted, _ = jax.jit(functools.partial(model.apply, train=False, key=None))(values, tokens)
    np.testing.assert_allclose(served(tmp_path / "net", tokens)["logits"], wanted["logits"], rtol=1e-4, atol=1e-5)
    with pytest.raises(jt.InputError, match=r"inputs= is a batch of arrays"):
        jt.export_program((model, values), tmp_path / "other", inputs=like, normalize=False)


def test_weights_in_half_precision_are_kept_as_bits(tmp_path):
    model = jt.models.mlp(3, hidden=(), param_dtype=jnp.bfloat16)
    values = drawn(model, SHAPE)
    jt.export_program((model, values), tmp_path / "net", image_shape=SHAPE, platforms=["cpu"])
    assert np.load(tmp_path / "net" / "weights.npz")["params/head/kernel"].dtype == np.uint16
    wanted, _ = model.apply(values, photos(2), train=False, key=None)
    found = served(tmp_path / "net", photos(2))["probabilities"]
    np.testing.assert_allclose(found, jax.nn.softmax(wanted["logits"]), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "vit-ti-4",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("small-cnn", "conv4", "conv4-strided", "resnet20", "preact-resnet20", "wrn-10-2", "vgg11-bn")
        ),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("vgg11-imagenet", "resnet18-imagenet")),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("mobilenet-v2", "efficientnet-lite0")),
    ],
)
def test_networks_of_the_zoo_take_any_batch(name, tmp_path):
    model, shape = jt.models.create(name, 3), jt.models.ZOO[name].image
    written = jt.export_program((model, drawn(model, shape)), tmp_path / "net", image_shape=shape)
    assert written.outputs == {"probabilities": "float32[batch,3]"}


@pytest.mark.slow
def test_depthwise_convolutions_give_the_same_in_the_form_of_each_platform(tmp_path):
    model, shape = jt.models.mobilenet_v2(3), (32, 32, 3)
    values = drawn(model, shape)
    jt.export_program((model, values), tmp_path / "net", image_shape=shape, outputs=["logits"])
    program = export.deserialize(bytearray((tmp_path / "net" / "program.jax").read_bytes()))
    assert "feature_group_count = 32" in program.mlir_module()  # for the platforms that have fast ones
    images = photos(2, shape)
    wanted, _ = jax.jit(functools.partial(model.apply, train=False, key=None))(values, images)
    np.testing.assert_allclose(served(tmp_path / "net", images)["logits"], wanted["logits"], rtol=1e-4)


@pytest.mark.slow
def test_a_process_without_this_library_serves_it(tmp_path):
    """The example, in a process that has loaded neither jaxtransfer nor flax when it is done."""
    loaded = jt.load_pretrained(variables(), NET, inputs=jax.ShapeDtypeStruct((1, *SHAPE), jnp.float32))
    names = ["ant", "bee", "wasp"]
    jt.pretrained.write_run(loaded, tmp_path / "run", class_names=names, image_shape=SHAPE)
    jt.export_program(tmp_path / "run", tmp_path / "net")
    np.save(tmp_path / "images.npy", photos(4))
    code = (
        f"import runpy, sys; sys.argv = ['serve', {str(tmp_path / 'net')!r}, {str(tmp_path / 'images.npy')!r}]\n"
        f"runpy.run_path({str(SERVE)!r}, run_name='__main__')\n"
        "assert not {'jaxtransfer', 'flax', 'optax'} & {name.partition('.')[0] for name in sys.modules}"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    wanted = reference(photos(4))
    said = [line.split() for line in ran.stdout.splitlines()]
    assert [name for name, _ in said] == [names[k] for k in wanted.argmax(1)]
    np.testing.assert_allclose([float(value) for _, value in said], wanted.max(1), atol=2e-6)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"platforms": ["gpu"]}, "unknown platform 'gpu'"),
        ({"platforms": []}, "expected one or more platforms"),
        ({"outputs": ["logit"]}, "did you mean 'logits'"),
        ({"image_shape": None}, "doesn't say which images it takes; pass image_shape="),
        ({"image_shape": (5, 4, 1)}, "expected"),
    ],
)
def test_what_can_not_be_is_told(options, told, tmp_path):
    with pytest.raises(jt.InputError, match=told) as caught:
        jt.export_program((NET, variables()), tmp_path / "net", **{"image_shape": SHAPE, **options})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "net").exists()


def test_other_sources_and_folders_are_told(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(jt.InputError, match="is there and no exported program"):
        jt.export_program((NET, variables()), tmp_path, image_shape=SHAPE)
    for source in (3, (NET, 3), (NET,), {"params": {}}):
        with pytest.raises(jt.InputError, match="expected"):
            jt.export_program(source, tmp_path / "net", image_shape=SHAPE)
    by_hand = jt.Model(NET.init, NET.apply)
    with pytest.raises(jt.InputError, match="normalisation can't be taken off"):
        jt.export_program((by_hand, variables()), tmp_path / "net", image_shape=SHAPE, normalize=False)

    def fixed(values, images, *, train, key):
        return {"logits": jnp.zeros((2, 3)) + images.reshape(2, -1)[:, :3]}, {}

    with pytest.raises(jt.InputError, match="can't be written for any batch size"):
        jt.export_program((jt.Model(NET.init, fixed), variables()), tmp_path / "net", image_shape=SHAPE)
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(jt.InputError, match=r"pip install 'jaxtransfer\[export\]'"):
        jt.export_program((NET, variables()), tmp_path / "net", image_shape=SHAPE)


def test_a_head_that_was_drawn_gives_no_probabilities(tmp_path):
    fresh = jt.load_pretrained(variables(), NET, reinit="head", inputs=jax.ShapeDtypeStruct((1, *SHAPE), jnp.float32))
    written = jt.export_program(fresh, tmp_path / "net", image_shape=SHAPE)
    assert written.outputs.keys() == {"features"}
