"""Weights in one line, without their libraries: state dicts made up by hand."""

import json
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtransfer as jt
from jaxtransfer.pretrained import Rule, Scheme

MODEL = jt.models.cifar_resnet(8, 3)
SHAPE = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)


def theirs_of(classes=3, channels=3, seed=0):
    """A CIFAR ResNet-8's state dict as PyTorch lays it out, written down by hand."""
    rng = np.random.default_rng(seed)
    out = {}

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    def norm(name, width):
        for kind in ("weight", "bias", "running_mean"):
            out[f"{name}.{kind}"] = draw(width)
        out[f"{name}.running_var"] = np.abs(draw(width)) + 0.5
        out[f"{name}.num_batches_tracked"] = np.array(7)

    out["conv1.weight"] = draw(16, channels, 3, 3)
    norm("bn1", 16)
    before = 16
    for stage, width in enumerate((16, 32, 64), 1):
        for number in (1, 2):
            out[f"layer{stage}.0.conv{number}.weight"] = draw(width, before if number == 1 else width, 3, 3)
            norm(f"layer{stage}.0.bn{number}", width)
        before = width
    out["linear.weight"], out["linear.bias"] = draw(classes, 64), draw(classes)
    return out


THEIRS = theirs_of()


def load(source=THEIRS, model=MODEL, *, inputs=SHAPE, **options):
    return jt.load_pretrained(source, model, inputs=inputs, **options)


def check(loaded, theirs=THEIRS):
    """Holds some leaves of each kind against what was written down, and counts all of them."""
    params, stats = loaded.variables["params"], loaded.variables["batch_stats"]
    for place in np.ndindex(3, 3):
        kernel = params["stage2_block1"]["conv1"]["kernel"]
        np.testing.assert_array_equal(kernel[place], theirs["layer2.0.conv1.weight"][(..., *place)].T)
    np.testing.assert_array_equal(params["head"]["kernel"], theirs["linear.weight"].T)
    np.testing.assert_array_equal(params["stage3_block1"]["norm2"]["scale"], theirs["layer3.0.bn2.weight"])
    np.testing.assert_array_equal(stats["stem_norm"]["var"], theirs["bn1.running_var"])
    assert len(loaded.report.taken) == 37


def test_a_state_dict_is_told_by_its_names():
    loaded = load()
    check(loaded)
    assert loaded.report.scheme == "CIFAR ResNet"
    assert loaded.report.taken["params/head/bias"] == "linear.bias"
    assert loaded.preprocessing.mean == (0.485, 0.456, 0.406)
    assert "CIFAR ResNet; 37 leaves from 37 tensors, 0 adapted, 0 fresh, 0 tensors left" in str(loaded.report)
    assert "usual for CIFAR ResNet" in str(loaded.report)
    assert loaded.params.keys() == loaded.state.keys() == {"model"}


def test_its_model_takes_images_as_they_are():
    loaded = load()
    images = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3), np.uint8)
    prepared = (images / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    both = jax.jit(
        lambda v, x, y: (
            loaded.model.apply(v, x, train=False, key=None)[0]["logits"],
            MODEL.apply(v, y, train=False, key=None)[0]["logits"],
        )
    )
    np.testing.assert_allclose(*both(loaded.variables, images, prepared.astype(np.float32)), rtol=1e-4, atol=1e-4)
    mine = jt.models.normalize(MODEL, 0.5, 0.5)
    again = load(model=mine)
    assert again.model is mine
    assert "normalises by [0.5], and is left so" in str(again.report)


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "_orig_mod.module.", "encoder_q.", "model.net."])
def test_prefixes_are_taken_off(prefix):
    check(load({prefix + name: value for name, value in THEIRS.items()}))


def test_other_networks_in_the_file_are_left_only_if_told():
    both = {f"encoder_{one}.{name}": value for one in "qk" for name, value in THEIRS.items()}
    with pytest.raises(jt.InputError, match=r"37 left over: encoder_k\.conv1\.weight \(16, 3, 3, 3\)"):
        load(both)
    loaded = load(both, ignore="encoder_k")
    check(loaded)
    names = {name for name in both if not name.endswith("num_batches_tracked")}
    assert set(loaded.report.taken.values()) | loaded.report.left.keys() == names
    assert set(loaded.report.left.values()) == {"ignored"}
    with pytest.raises(jt.InputError, match="ignore: the pattern 'encoder_x' selects no"):
        load(both, ignore="encoder_x")


def test_an_average_beside_the_weights_is_told_of():
    """What scripts save: the raw weights are taken, and the report says what else there is."""
    slow = {name: value + 1 for name, value in THEIRS.items()}
    loaded = load({"model": THEIRS, "model_ema": slow, "epoch": 3})
    check(loaded)
    assert "'model' was taken; there is model_ema, too: part='model_ema' takes that" in str(loaded.report)
    assert "no tensors, and left out: epoch, acc" in str(load({**THEIRS, "epoch": 3, "acc": 0.9}).report)
    other = load({"model": THEIRS, "model_ema": slow}, part="model_ema")
    check(other, slow)
    assert "model_ema, too" not in str(other.report)


def test_files_of_our_own_paths(tmp_path):
    first = load()
    flat = {name.replace("/", "__"): value for name, value in jt.tree.leaves_by_path(first.variables).items()}
    np.savez(tmp_path / "w.npz", **{name.replace("__", "/"): value for name, value in flat.items()})
    for again in (load(tmp_path / "w.npz"), load(first.variables)):
        check(again)
        assert again.report.scheme == "jaxtransfer"
        assert again.preprocessing is None
        assert "nothing says how images are prepared" in str(again.report)


class TestHeads:
    def test_of_other_classes_are_an_error_with_its_remedy(self):
        with pytest.raises(
            jt.InputError, match=r"2 of another shape: params/head/bias: expected.*reinit='head'"
        ) as caught:
            load(model=jt.models.cifar_resnet(8, 5))
        assert "\n" not in str(caught.value)

    def test_start_afresh(self):
        model = jt.models.cifar_resnet(8, 5)
        loaded = load(model=model, reinit="head", key=jax.random.key(3))
        fresh = model.init(jax.random.key(3), jnp.zeros(SHAPE.shape))
        np.testing.assert_allclose(loaded.variables["params"]["head"]["kernel"], fresh["params"]["head"]["kernel"])
        np.testing.assert_array_equal(
            loaded.variables["params"]["stem_norm"]["bias"], THEIRS["bn1.bias"]
        )  # all else is theirs
        assert loaded.report.fresh == dict.fromkeys(["params/head/bias", "params/head/kernel"], "reinit")
        assert loaded.report.left == dict.fromkeys(["linear.weight", "linear.bias"], "reinit")
        assert loaded.class_names == ()

    def test_are_mapped_by_class_name(self):
        there = ["tench, Tinca tinca", "Golden_retriever", "ant"]
        wanted = ["ant", "bee", "tinca  tinca", "golden retriever"]
        loaded = load(model=jt.models.cifar_resnet(8, 4), class_names=wanted, source_class_names=there)
        head = loaded.variables["params"]["head"]
        for ours, theirs in ((0, 2), (2, 0), (3, 1)):
            np.testing.assert_array_equal(head["kernel"][:, ours], THEIRS["linear.weight"][theirs])
            assert head["bias"][ours] == THEIRS["linear.bias"][theirs]
        assert head["bias"][1] == 0  # fresh, and not the row that stands in for it
        assert not np.isin(head["kernel"][:, 1], THEIRS["linear.weight"]).any()
        assert loaded.report.adapted["params/head/kernel"] == "3 of 4 classes by name"
        assert loaded.class_names == tuple(wanted)

    @pytest.mark.parametrize(
        ("names", "there", "told"),
        [
            (["a", "b", "c"], ["d", "e", "f"], "no class of the model is among those"),
            (["a", "b", "c"], [], "expected source_class_names of 3 outputs.*got 0"),
            (["a", "b"], ["d", "e", "f"], "expected class_names of 3 outputs.*got 2"),
            (["a", "b", "c"], ["a, b", "b", "c"], "'b' is the name of several classes"),
        ],
    )
    def test_names_that_do_not_fit_are_told(self, names, there, told):
        with pytest.raises(jt.InputError, match=told):
            load(class_names=names, source_class_names=there)


class TestWhatDoesNotFit:
    def test_another_architecture(self):
        with pytest.raises(jt.InputError, match="fit model 'resnet20': the closest scheme is CIFAR ResNet") as caught:
            load(model=jt.models.resnet20(3))
        assert "missing: batch_stats/stage1_block2" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_unknown_names(self):
        renamed = {name.replace("layer1", "blocks_a"): value for name, value in THEIRS.items()}
        with pytest.raises(jt.InputError, match=r"the closest scheme is CIFAR ResNet.*blocks_a\.0\.conv1\.weight \(16"):
            load(renamed)
        mine = Scheme("mine", (Rule(r"blocks_a\.(\d+)\.(conv|bn)(\d)", r"x\1/\2\3"),))
        with pytest.raises(jt.InputError, match="closest scheme is mine, by which 0 of 37"):
            load(renamed, scheme=mine)
        with pytest.raises(jt.InputError, match="by which 0 of 37 leaves fit; 2 left over: a"):
            load({"a": np.zeros(3), "b": np.zeros(2)})

    def test_another_shape(self):
        with pytest.raises(jt.InputError, match=r"1 of another shape: params/stage1_block1/conv1/kernel: expected"):
            load({**THEIRS, "layer1.0.conv1.weight": np.zeros((16, 16, 5, 5), np.float32)})

    def test_too_much_and_too_little(self):
        with pytest.raises(jt.InputError, match=r"1 left over: extra\.weight"):
            load({**THEIRS, "extra.weight": np.zeros(2)})
        with pytest.raises(jt.InputError, match="1 missing: batch_stats/stem_norm/var"):
            load({name: value for name, value in THEIRS.items() if name != "bn1.running_var"})

    def test_quantised_weights(self):
        with pytest.raises(jt.InputError, match=r"'conv1\.weight' is of type int8, quantised say"):
            load({**THEIRS, "conv1.weight": THEIRS["conv1.weight"].astype(np.int8)})

    @pytest.mark.parametrize("source", [3, None, [1]])
    def test_no_weights(self, source):
        with pytest.raises(jt.InputError, match="expected weights, got"):
            load(source)

    def test_no_model(self):
        with pytest.raises(jt.InputError, match=r"takes the jt\.Model that the weights are for, got 'resnet18'"):
            load(model="resnet18")

    def test_a_pattern_that_selects_nothing(self):
        with pytest.raises(jt.InputError, match="reinit: the pattern 'haed' selects no"):
            load(reinit="haed")

    def test_models_that_are_not_of_the_zoo_need_inputs(self):
        other = jt.Model(MODEL.init, MODEL.apply)
        with pytest.raises(jt.InputError, match="not of the zoo: pass inputs="):
            jt.load_pretrained(THEIRS, other)
        with pytest.raises(jt.InputError, match=r"jax\.ShapeDtypeStruct\(\(1, 8\), .*got \(8,\), in which 8 is"):
            jt.load_pretrained(THEIRS, other, inputs=(8,))
        check(load(model=other))


@pytest.mark.parametrize("channels", [1, 4])
def test_the_stem_for_other_channels(channels):
    """An image whose channels are equal gives what it gave as three of them."""
    shape = jax.ShapeDtypeStruct((1, 8, 8, channels), jnp.float32)
    loaded = load(inputs=shape)
    kernel = loaded.variables["params"]["stem_conv"]["kernel"]
    assert kernel.shape == (3, 3, channels, 16)
    np.testing.assert_allclose(kernel.sum(2), THEIRS["conv1.weight"].sum(1).transpose(1, 2, 0), rtol=1e-4, atol=1e-5)
    if channels == 4:  # in order, the first one again
        np.testing.assert_allclose(kernel[..., 3, :], 0.5 * THEIRS["conv1.weight"][:, 0].transpose(1, 2, 0), rtol=1e-6)
    assert loaded.report.adapted == {"params/stem_conv/kernel": f"from 3 to {channels} channels"}
    assert len(loaded.preprocessing.mean) == channels


def test_a_stem_for_two_channels_gives_maps_as_large():
    """Two of three kernels alone would give two thirds."""
    images = jax.ShapeDtypeStruct((1, 8, 8, 2), jnp.float32)
    kernel = load(inputs=images).variables["params"]["stem_conv"]["kernel"]
    np.testing.assert_allclose(kernel, 1.5 * THEIRS["conv1.weight"][:, :2].transpose(2, 3, 1, 0), rtol=1e-6)


def vit_of_big_vision(width=8, heads=2, patches=4, style="new"):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    old = style == "old"
    block = "Transformer/encoderblock_0/"
    attention = block + f"MultiHeadDotProductAttention_{int(old)}/"
    names = {
        "cls": draw(1, 1, width),
        ("Transformer/posembed_input/" if old else "") + "pos_embedding": draw(1, patches + 1, width),
        "embedding/kernel": draw(4, 4, 3, width),
        "embedding/bias": draw(width),
        "Transformer/encoder_norm/scale": draw(width),
        "Transformer/encoder_norm/bias": draw(width),
        "head/kernel": draw(width, 3),
        "head/bias": draw(3),
        attention + "out/kernel": draw(heads, width // heads, width),
        attention + "out/bias": draw(width),
    }
    for one in ("query", "key", "value"):
        names[attention + one + "/kernel"] = draw(width, heads, width // heads)
        names[attention + one + "/bias"] = draw(heads, width // heads)
    for layer in ("LayerNorm_0", "LayerNorm_2" if old else "LayerNorm_1"):
        names |= {f"{block}{layer}/{kind}": draw(width) for kind in ("scale", "bias")}
    mlp = block + ("MlpBlock_3" if old else "MlpBlock_0")
    names |= {f"{mlp}/Dense_0/kernel": draw(width, 4 * width), f"{mlp}/Dense_0/bias": draw(4 * width)}
    names |= {f"{mlp}/Dense_1/kernel": draw(4 * width, width), f"{mlp}/Dense_1/bias": draw(width)}
    return {("" if old else "params/") + name: value for name, value in names.items()}


@pytest.mark.parametrize("style", ["new", "old"])
def test_big_vision(style, tmp_path):
    names = vit_of_big_vision(style=style)
    np.savez(tmp_path / "vit.npz", **names)
    model = jt.models.vit(8, 1, 2, 3, patch=4)
    loaded = load(tmp_path / "vit.npz", model)
    assert loaded.report.scheme == "big_vision ViT"
    assert set(loaded.report.taken.values()) == names.keys()
    params = loaded.variables["params"]
    out = next(value for name, value in names.items() if name.endswith("out/kernel"))
    np.testing.assert_array_equal(params["stage1"]["attention"]["out"]["kernel"], out)
    second = next(value for name, value in names.items() if name.endswith("Dense_1/kernel"))
    np.testing.assert_array_equal(params["stage1"]["fc2"]["kernel"], second)
    assert loaded.preprocessing.mean == (0.5, 0.5, 0.5)


def test_heads_that_their_shapes_show_are_not_split_anew():
    with pytest.raises(jt.InputError, match=r"attention/key/bias: expected \(4, 2\), got \(2, 4\)"):
        load(vit_of_big_vision(), jt.models.vit(8, 1, 4, 3, patch=4))
    assert "heads" not in str(load(vit_of_big_vision(), jt.models.vit(8, 1, 2, 3, patch=4)).report)


@pytest.mark.parametrize("told", [{}, {"num_attention_heads": 2}, {"model_args": {"num_heads": 4}}])
def test_heads_that_nothing_shows_are_told_of(told, tmp_path):
    """By the names of transformers, whose tensors are flat."""
    names = vit_of_huggingface()
    np.savez(tmp_path / "w.npz", **names)
    (tmp_path / "config.json").write_text(json.dumps(told))
    model = jt.models.vit(8, 1, 2, 3, patch=4)
    if "model_args" in told:
        with pytest.raises(jt.InputError, match="has 4 attention heads, the model 2"):
            load(tmp_path / "w.npz", model)
        return
    loaded = load(tmp_path / "w.npz", model)
    wanted = names["layers.0.attention.q_proj.weight"].T.reshape(8, 2, 4)
    np.testing.assert_array_equal(loaded.variables["params"]["stage1"]["attention"]["query"]["kernel"], wanted)
    assert ("heads: nothing says how many the weights have; the model has 2" in loaded.report.notes) is not bool(told)


def vit_of_huggingface(width=8):
    rng = np.random.default_rng(0)
    shapes = {"embeddings.cls_token": (1, 1, width), "embeddings.position_embeddings": (1, 5, width)}
    shapes["embeddings.patch_embeddings.projection"] = (width, 3, 4, 4)
    shapes |= dict.fromkeys(["layernorm", "layers.0.layernorm_before", "layers.0.layernorm_after"], (width,))
    shapes |= {f"layers.0.attention.{one}_proj": (width, width) for one in "qkvo"}
    shapes |= {"layers.0.mlp.fc1": (4 * width, width), "layers.0.mlp.fc2": (width, 4 * width), "classifier": (3, width)}
    out = {}
    for name, shape in shapes.items():
        whole = name.endswith(("token", "embeddings"))
        out[name if whole else f"{name}.weight"] = rng.normal(size=shape).astype(np.float32)
        if not whole:
            out[f"{name}.bias"] = rng.normal(size=shape[0]).astype(np.float32)
    return out


def test_positions_stay_where_the_grid_does_and_keep_planes():
    """Bicubic resampling gives a plane back as a plane, but at the rim; the class token's stays."""
    names = vit_of_big_vision(patches=64)
    rows, columns = np.meshgrid(np.arange(8.0), np.arange(8.0), indexing="ij")
    plane = np.broadcast_to((2 * rows - columns).reshape(1, 64, 1), (1, 64, 8))
    name = "params/pos_embedding"
    names[name] = np.concatenate([names[name][:, :1], plane], 1).astype(np.float32)
    model = jt.models.vit(8, 1, 2, 3, patch=4)
    loaded = load(names, model, inputs=jax.ShapeDtypeStruct((1, 64, 48, 3), jnp.float32))
    found = loaded.variables["params"]["stem_position"]
    assert found.shape == (1, 1 + 16 * 12, 8)
    np.testing.assert_array_equal(found[:, 0], names[name][:, 0])
    grid = found[0, 1:].reshape(16, 12, 8)[4:12, 4:8, 0]
    places = [(np.arange(n) + 0.5) * 8 / n - 0.5 for n in (16, 12)]
    wanted = 2 * places[0][4:12, None] - places[1][None, 4:8]
    np.testing.assert_allclose(grid, wanted, atol=1e-5)
    with pytest.raises(jt.InputError, match="no class token and a square"):
        load(vit_of_big_vision(patches=5), model)


def test_positions_of_as_many_patches_in_another_grid_are_interpolated(tmp_path):
    names = vit_of_big_vision(patches=36)
    model = jt.models.vit(8, 1, 2, 3, patch=4)
    wide = jax.ShapeDtypeStruct((1, 16, 36, 3), jnp.float32)
    loaded = load(names, model, inputs=wide)
    assert loaded.report.adapted == {"params/stem_position": "interpolated from 6×6 to 4×9"}
    ours = loaded.variables["params"]["stem_position"]
    own = load(loaded.variables, model, inputs=wide)  # ours are of the grid that they are laid out for
    assert own.report.adapted == {}
    np.testing.assert_array_equal(own.variables["params"]["stem_position"], ours)

    np.savez(tmp_path / "w.npz", **{name.replace("params/", ""): value for name, value in names.items()})
    timm = {"input_size": [3, 16, 36], "mean": [0.5] * 3, "std": [0.5] * 3}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": timm}))  # says which grid it is
    assert load(tmp_path / "w.npz", model, inputs=wide).report.adapted == {}
    tall = load(tmp_path / "w.npz", model, inputs=jax.ShapeDtypeStruct((1, 36, 16, 3), jnp.float32))
    assert tall.report.adapted == {"params/stem_position": "interpolated from 4×9 to 9×4"}


@pytest.mark.slow
def test_a_run_gives_its_weights_names_and_preprocessing(tmp_path):
    data = jt.data.load("digits/upright", "train").subset(per_class=2)
    model = jt.models.normalize(jt.models.mlp(10, hidden=(4,)), 0.3, 0.4)
    batches = jt.data.pipeline(data, 16)
    fitted = jt.fit(jt.classification(model), _sgd(), batches, steps=1, out=tmp_path / "run", model=model, dataset=data)
    fresh = jt.models.mlp(10, hidden=(4,))
    image = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    for source in (tmp_path / "run", str(tmp_path / "run"), jt.load_run(tmp_path / "run")):
        loaded = load(source, fresh, inputs=image)
        jax.tree.map(np.testing.assert_array_equal, loaded.params, jax.device_get(fitted.state.params))
        assert loaded.class_names == tuple(data.class_names)
        assert (loaded.preprocessing.size, loaded.preprocessing.mean) == ((8, 8), (0.3,))


def _sgd():
    import optax

    return optax.sgd(0.1)


class TestHub:
    """Names of the hub, with a stand-in for huggingface_hub."""

    @pytest.fixture
    def hub(self, monkeypatch, tmp_path):
        asked = []

        def snapshot_download(repository, *, revision, allow_patterns):
            asked.append((repository, revision))
            if repository == "owner/offline":
                raise OSError("Cannot reach the hub.\nA long story")
            return str(tmp_path / repository.replace("/", "--"))

        module = types.SimpleNamespace(snapshot_download=snapshot_download)
        monkeypatch.setitem(sys.modules, "huggingface_hub", module)
        return asked

    @pytest.mark.parametrize(
        ("name", "wanted"),
        [
            ("hf:owner/net", ("owner/net", None)),
            ("hf:owner/net@v1.0", ("owner/net", "v1.0")),
            ("timm:net.in1k@abc", ("timm/net.in1k", "abc")),
        ],
    )
    def test_names(self, hub, tmp_path, name, wanted):
        folder = tmp_path / wanted[0].replace("/", "--")
        folder.mkdir()
        np.savez(folder / "w.npz", **THEIRS)
        (folder / "w.npz").rename(folder / "pytorch_model.bin")
        check(load(name))
        assert set(hub) == {wanted}

    def test_offline_is_one_line(self, hub):
        with pytest.raises(jt.InputError, match=r"cannot fetch hf:owner/offline: Cannot reach the hub; offline, fetch"):
            load("hf:owner/offline")

    def test_no_weights_there(self, hub, tmp_path):
        (tmp_path / "owner--net").mkdir()
        with pytest.raises(jt.InputError, match="hf:owner/net has no weights of a known kind"):
            load("hf:owner/net")

    @pytest.mark.parametrize("name", ["hf:owner", "hf:", "timm:", "hf:a/b/c", "hf:/net"])
    def test_other_forms_are_told(self, name):
        with pytest.raises(jt.InputError, match="expected hf:owner/name or timm:name"):
            load(name)

    def test_without_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(jt.InputError, match=re.escape("pip install 'jaxtransfer[hub]'")):
            load("hf:owner/net")


def test_what_stands_beside_the_weights(tmp_path):
    np.savez(tmp_path / "w.npz", **THEIRS)
    timm = {"input_size": [3, 160, 200], "crop_pct": 0.9, "mean": [0.1, 0.2, 0.3], "std": [1, 2, 4]}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": timm, "label_names": ["a", "b", "c"]}))
    loaded = load(tmp_path / "w.npz")
    wanted = jt.pretrained.Preprocessing((160, 200), 0.9, (0.1, 0.2, 0.3), (1.0, 2.0, 4.0), "bicubic")
    assert loaded.preprocessing == wanted
    assert loaded.class_names == ("a", "b", "c")
    assert "preprocessing (config.json)" in str(loaded.report)

    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"2": "z", "0": "x", "1": "y"}}))
    vit = {"size": {"height": 20, "width": 30}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(vit))
    loaded = load(tmp_path / "w.npz")
    wanted = jt.pretrained.Preprocessing((20, 30), None, (0.5,) * 3, (0.25,) * 3)
    assert loaded.preprocessing == wanted
    assert loaded.class_names == ("x", "y", "z")

    resnet = {**vit, "size": {"shortest_edge": 224}, "crop_pct": 0.875, "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(resnet))
    assert load(tmp_path / "w.npz").preprocessing == jt.pretrained.Preprocessing(
        (224, 224), 0.875, (0.5,) * 3, (0.25,) * 3, "bicubic"
    )
    old = {**vit, "size": 224, "crop_pct": 0.875, "resample": 3}  # ResNets before sizes had names: the shorter side
    cut = {**vit, "crop_size": 224, "do_center_crop": True, "resample": 3}
    for entries in (old, {**cut, "size": 256}, {**cut, "size": {"height": 256, "width": 256}}):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(entries))
        assert load(tmp_path / "w.npz").preprocessing == jt.pretrained.Preprocessing(
            (224, 224), 0.875, (0.5,) * 3, (0.25,) * 3, "bicubic"
        )
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**cut, "size": {"shortest_edge": 400}}))
    odd = load(tmp_path / "w.npz").preprocessing  # 224 / (224 / 400) is a little less than 400
    assert odd.resizing.plan((500, 1000), odd.size) == (400, 800, 88, 288)
    scales = {  # of 0 to 255: all give (x − 127.5) / 127.5
        "plain": {"rescale_factor": 1 / 255},
        "doubled": {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
        "none": {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3},
        "offset": {"rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False},
    }
    half = {**vit, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    for name, scaled in scales.items():
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({**half, **scaled}))
        known = load(tmp_path / "w.npz").preprocessing
        np.testing.assert_allclose((known.mean, known.std), np.full((2, 3), 0.5), rtol=1e-6, err_msg=name)
    for wrong in ("[", '{"image_mean": 3, "image_std": 3}'):
        (tmp_path / "preprocessor_config.json").write_text(wrong)
        with pytest.raises(jt.InputError, match=r"preprocessor_config\.json|can't be read"):
            load(tmp_path / "w.npz")


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"architecture": "resnetblur50"}, "has resnetblur50, which smooths its maps"),
        ({"architecture": "resnetaa50"}, "has resnetaa50, which smooths its maps"),
        ({"architecture": "vit_base_patch16_224", "global_pool": "avg"}, "has global_pool avg, not token"),
        ({"architecture": "resnet18", "global_pool": "max"}, "has global_pool max, not avg"),
        ({"architecture": "resnet18", "model_args": {"act_layer": "silu"}}, "has act_layer silu, not relu"),
        ({"architecture": "resnet50", "model_args": {"output_stride": 16}}, "has output_stride 16, not 32"),
        ({"model_type": "resnet", "downsample_in_bottleneck": True}, "has downsample_in_bottleneck True, not False"),
        ({"model_type": "resnet", "downsample_in_first_stage": True}, "has downsample_in_first_stage True, not False"),
        ({"model_type": "vit", "hidden_act": "quick_gelu"}, "has hidden_act quick_gelu, not gelu"),
    ],
)
def test_networks_whose_weights_fit_and_that_compute_something_else_are_refused(config, told, tmp_path):
    np.savez(tmp_path / "w.npz", **THEIRS)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(jt.InputError, match=told + ".*: the model would give something else in silence"):
        load(tmp_path / "w.npz")


def test_a_planted_pickle_is_refused_and_does_nothing(tmp_path):
    torch = pytest.importorskip("torch")

    class Planted:
        def __reduce__(self):
            return (open, (str(tmp_path / "planted"), "w"))

    for zipped in (True, False):
        state = {name: torch.from_numpy(np.array(value)) for name, value in THEIRS.items()}
        torch.save({"state_dict": state}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        check(load(tmp_path / "w.pth"))
        torch.save({"state_dict": state, "x": Planted()}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(jt.InputError, match="holds Python objects besides tensors"):
            load(tmp_path / "w.pth")
        assert not (tmp_path / "planted").exists()
