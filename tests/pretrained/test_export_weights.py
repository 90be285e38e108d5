"""Weights out: the names and layouts of the originals, tensor by tensor, bit by bit; and in again."""

import functools
import json
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxtransfer as jt
from jaxtransfer.formats import read_tensors
from jaxtransfer.pretrained import LIBRARIES, Layout, Rule, Scheme

MODEL = jt.models.cifar_resnet(8, 3)
SHAPE = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)


def drawn(model=MODEL, shape=SHAPE, seed=0):
    """Variables of random values, some of them not finite or signed zeros."""
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), shape)
    rng = np.random.default_rng(seed)

    def leaf(one):
        values = rng.normal(size=one.shape).astype(one.dtype)
        values.reshape(-1)[:3] = [-0.0, np.nan, np.inf][: min(3, values.size)]
        return values

    return jax.tree.map(leaf, dict(shapes))


def bits(tensors):
    return {name: (np.dtype(value.dtype).name, value.shape, value.tobytes()) for name, value in tensors.items()}


def leaves(variables):
    return jt.tree.leaves_by_path(variables)


def header(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])


def by_hand(params, stats):
    """The names and layouts of the CIFAR ResNets, written down."""
    out = {"conv1.weight": params["stem_conv"]["kernel"]}

    def norm(name, ours, theirs):
        out[f"{theirs}.weight"], out[f"{theirs}.bias"] = (params_of(params, ours)[one] for one in ("scale", "bias"))
        where = params_of(stats, ours)
        out[f"{theirs}.running_mean"], out[f"{theirs}.running_var"] = where["mean"], where["var"]

    norm("stem", ("stem_norm",), "bn1")
    for stage in (1, 2, 3):
        for number in (1, 2):
            block = f"stage{stage}_block1"
            out[f"layer{stage}.0.conv{number}.weight"] = params[block][f"conv{number}"]["kernel"]
            norm("", (block, f"norm{number}"), f"layer{stage}.0.bn{number}")
    out = {name: np.moveaxis(value, (3, 2), (0, 1)) if value.ndim == 4 else value for name, value in out.items()}
    return out | {"linear.weight": params["head"]["kernel"].T, "linear.bias": params["head"]["bias"]}


def params_of(tree, path):
    for name in path:
        tree = tree[name]
    return tree


def test_names_and_layouts_are_theirs(tmp_path):
    variables = drawn()
    written = jt.export_weights((MODEL, variables), tmp_path / "a" / "w.safetensors", scheme="cifar")
    wanted = by_hand(variables["params"], variables["batch_stats"])
    assert bits(read_tensors(tmp_path / "a" / "w.safetensors")) == bits(wanted)
    assert (written.tensors, written.scheme) == (37, "CIFAR ResNet")
    assert f"37 tensors, {written.count:,} values" in str(written)
    assert sum(value.size for value in wanted.values()) == written.count


@pytest.mark.parametrize("scheme", ["jaxtransfer", "cifar"])
def test_in_again_it_is_the_same(scheme, tmp_path):
    variables = drawn()
    jt.export_weights((MODEL, variables), tmp_path / "w.safetensors", scheme=scheme)
    again = jt.load_pretrained(tmp_path / "w.safetensors", MODEL, inputs=SHAPE)
    assert bits(leaves(again.variables)) == bits(leaves(variables))
    assert not again.report.adapted
    if scheme == "jaxtransfer":
        assert header(tmp_path / "w.safetensors").keys() == {*leaves(variables), "__metadata__"}


@pytest.mark.slow
def test_what_is_known_travels_in_the_file(tmp_path):
    plain = jt.models.resnet20(3)
    model = jt.models.normalize(plain, (0.1, 0.2, 0.3), 0.5)
    loaded = jt.load_pretrained(jax.tree.map(np.nan_to_num, drawn(model)), model, inputs=SHAPE)
    run = jt.pretrained.write_run(loaded, tmp_path / "run", class_names=["a", "b", "ä"], image_shape=(8, 8, 3))
    for source in (run, str(run), jt.load_run(run)):
        jt.export_weights(source, tmp_path / "w.safetensors", scheme="cifar")
        said = header(tmp_path / "w.safetensors")["__metadata__"]
        assert said["format"] == "pt"
        entries = json.loads(said["jaxtransfer"])
        assert (entries["network"]["model"], entries["step"], entries["scheme"]) == ("resnet20", 0, "CIFAR ResNet")
        again = jt.load_pretrained(tmp_path / "w.safetensors", plain, inputs=SHAPE)
        assert again.class_names == ("a", "b", "ä")
        assert (again.preprocessing.size, again.preprocessing.mean) == ((8, 8), (0.1, 0.2, 0.3))
        assert "preprocessing (the file itself)" in str(again.report)
        assert jt.pretrained.told_network(tmp_path / "w.safetensors") == "resnet20"
        assert again.model.recipe.mean == [0.1, 0.2, 0.3]
    twice = jt.export_weights(again, tmp_path / "again.safetensors", scheme="cifar")
    assert twice.path.read_bytes()[-1000:] == (tmp_path / "w.safetensors").read_bytes()[-1000:]
    assert json.loads(header(twice.path)["__metadata__"]["jaxtransfer"])["class_names"] == ["a", "b", "ä"]


def test_what_a_file_says_of_itself_in_error_is_told(tmp_path):
    from jaxtransfer.formats import safetensors

    for said in ("{", "[]", '{"preprocessing": {"sise": 3}}', '{"preprocessing": 3}'):
        safetensors.write(tmp_path / "w.safetensors", {"a": np.zeros(2)}, {"jaxtransfer": said})
        with pytest.raises(jt.InputError, match=r"can't be read|preprocessing has no"):
            jt.load_pretrained(tmp_path / "w.safetensors", MODEL, inputs=SHAPE)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", jnp.bfloat16, "float32"])
def test_other_types(dtype, tmp_path):
    variables = drawn()
    jt.export_weights((MODEL, variables), tmp_path / "w.safetensors", dtype=dtype)
    kind = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}[jnp.dtype(dtype).name]
    wanted = {path: leaf.astype(kind) for path, leaf in leaves(variables).items()}
    assert bits(read_tensors(tmp_path / "w.safetensors")) == bits(wanted)
    found = jt.inspect_weights(tmp_path / "w.safetensors")
    assert {row.dtype for row in found.tensors} == {jnp.dtype(dtype).name}
    again = jt.load_pretrained(tmp_path / "w.safetensors", MODEL, inputs=SHAPE)
    same = {path: leaf.astype(np.float32) for path, leaf in wanted.items()}
    assert bits(leaves(again.variables)) == bits(same)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"scheme": "torchvison"}, "did you mean 'torchvision'"),
        ({"scheme": "big_vision"}, "is a cifar_resnet, and big_vision has no names for it; choose another"),
        ({"scheme": "torchvision"}, "is a cifar_resnet, and torchvision has no names"),  # though its layers are alike
        (
            {"scheme": Scheme("mine", (Rule("a", "stem_conv"),))},
            "mine has none for 36 of 37 leaves, .*; choose",
        ),
        ({"dtype": "float8"}, "unknown type 'float8'"),
        ({"dtype": "int8"}, "unknown type 'int8'"),
        ({"dtype": "float16"}, "params/head/bias has values up to 1e[+]06, beyond float16"),
        ({"scheme": Scheme("mine", (Rule("a", "b", lambda *_: {}),))}, "can only be read"),
        ({"scheme": Scheme("mine", (Rule(r"a\d", "stem_conv"),))}, r"'a\\\\d' of a scheme stands for many names"),
    ],
)
def test_what_can_not_be_is_told(options, told, tmp_path):
    variables = drawn()
    variables["params"]["head"]["bias"] = np.full(3, 1e6, np.float32)
    with pytest.raises(jt.InputError, match=told) as caught:
        jt.export_weights((MODEL, variables), tmp_path / "w.safetensors", **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_other_sources_and_places_are_told(tmp_path):
    for source in (3, (MODEL, 3), {"params": {}}, tmp_path / "nowhere"):
        with pytest.raises(jt.InputError):
            jt.export_weights(source, tmp_path / "w.safetensors")
    with pytest.raises(jt.InputError, match="is a folder"):
        jt.export_weights((MODEL, drawn()), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(jt.InputError, match="cannot write"):
        jt.export_weights((MODEL, drawn()), tmp_path / "file" / "w.safetensors")


@pytest.mark.parametrize("distilled", [False, True])
def test_a_text_encoder_leaves_by_the_names_that_it_came_by(distilled, tmp_path):
    import bert_reference

    theirs = bert_reference.weights(classes=3)
    theirs = bert_reference.distilled(theirs) if distilled else theirs
    sizes = {"width": 8, "depth": 2, "heads": 2, "hidden": 12, "vocabulary": 20, "positions": 10}
    kind = {"pooler": "relu", "types": 0} if distilled else {"pooler": "tanh"}
    model = jt.models.text_encoder(3, **sizes, **kind)
    loaded = jt.load_pretrained(theirs, model)
    jt.export_weights((model, loaded.variables), tmp_path / "w.safetensors", scheme="huggingface")
    assert bits(read_tensors(tmp_path / "w.safetensors")) == bits(
        {name: np.asarray(value, np.float32) for name, value in theirs.items()}
    )


def test_a_scheme_of_your_own(tmp_path):
    """Alternatives, options and classes of signs are spelled as they stand first; a group without a place is a kind."""
    twice = Layout(lambda kind, path, value, shapes: {f"params/{path}": value / 2}, lambda path, leaves: {
        "bias": leaves[f"params/{path}"] * 2} if f"params/{path}" in leaves else {})  # fmt: skip
    rules = (
        Rule(r"(?:net\.)?(?:body|trunk)\.(\d+)_(?:x|y)[12]", r"stage{\1}_block1/conv1"),
        Rule(r"top-(weight|bias)", "head/bias", twice),
        Rule(r"(.+)", r"\1"),
    )
    variables = jax.tree.map(lambda leaf: np.ones_like(leaf), drawn())
    jt.export_weights((MODEL, variables), tmp_path / "w.safetensors", scheme=Scheme("mine", rules))
    names = header(tmp_path / "w.safetensors").keys()
    assert {"net.body.0_x1.weight", "net.body.2_x1.weight", "top-bias", "head.weight"} <= names
    assert "stage1_block1/conv2.weight" in names
    assert len(names) == 38


@functools.cache
def library(name):
    return pytest.importorskip(name)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def torchvision(name, **options):
    return getattr(library("torchvision").models, name)(num_classes=7, **options)


def timm(name):
    return library("timm").create_model(name, num_classes=7)


def tiny_timm_vit():
    return library("timm").models.VisionTransformer(16, 4, num_classes=7, embed_dim=32, depth=2, num_heads=2)


def tiny_torchvision_vit():
    return library("torchvision").models.VisionTransformer(32, 16, 2, 2, 32, 128, num_classes=7)


def efficientnet():
    made = library("efficientnet_lite_pytorch").EfficientNet
    return made.from_name("efficientnet-lite0", image_size=64, num_classes=7)


ORIGINALS = [
    ("torchvision", lambda: torchvision("resnet18"), lambda: jt.models.resnet18(7), 64),
    slow("torchvision", lambda: torchvision("resnet152"), lambda: jt.models.resnet152(7), 64),
    slow("torchvision", lambda: torchvision("wide_resnet50_2"), lambda: jt.models.wide_resnet50_2(7), 64),
    slow("torchvision", lambda: torchvision("vgg11"), lambda: jt.models.vgg11(7, batch_norm=False), 224),
    slow("torchvision", lambda: torchvision("vgg11_bn"), lambda: jt.models.vgg11(7), 224),
    ("torchvision", lambda: torchvision("mobilenet_v2"), lambda: jt.models.mobilenet_v2(7), 64),
    ("torchvision", tiny_torchvision_vit, lambda: jt.models.vit(32, 2, 2, 7), 32),
    slow("timm", lambda: timm("resnet50"), lambda: jt.models.resnet50(7), 64),
    slow("timm", lambda: timm("vgg11_bn"), lambda: jt.models.vgg11(7), 224),
    slow("timm", lambda: timm("tf_efficientnet_lite0"), lambda: jt.models.efficientnet_lite0(7), 64),
    slow("timm", lambda: timm("mobilenetv2_100"), lambda: jt.models.mobilenet_v2(7), 64),
    ("timm", tiny_timm_vit, lambda: jt.models.vit(32, 2, 2, 7, patch=4), 16),
    slow("timm", lambda: timm("deit_tiny_patch16_224"), lambda: jt.models.vit_ti(7), 224),
    slow("efficientnet_lite_pytorch", efficientnet, lambda: jt.models.efficientnet_lite0(7), 64),
]


@pytest.mark.parametrize(("scheme", "original", "model", "size"), ORIGINALS)
def test_every_tensor_of_the_original_comes_back(scheme, original, model, size, tmp_path):
    """In, out and into another one of theirs, strictly: the same bits under the same names."""
    torch = pytest.importorskip("torch")
    import originals

    first, second = originals.lively(original()), original()
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    loaded = jt.load_pretrained(first.state_dict(), model(), inputs=image)
    jt.export_weights((loaded.model, loaded.variables), tmp_path / "w.safetensors", scheme=scheme)
    load_file = pytest.importorskip("safetensors.torch").load_file
    second.load_state_dict(load_file(tmp_path / "w.safetensors"), strict=True)
    for (name, wanted), found in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(wanted, found), name


@pytest.mark.parametrize("kind", ["vit", slow("resnet")])
def test_files_of_hugging_face_come_back(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    import originals

    if kind == "vit":
        config = transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, num_labels=7
        )
        config.image_size, config.patch_size = 16, 4
        net, model, size = transformers.ViTForImageClassification(config), jt.models.vit(32, 2, 2, 7, patch=4), 16
    else:
        config = transformers.ResNetConfig(
            layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], num_labels=7
        )
        net, model, size = transformers.ResNetForImageClassification(config), jt.models.resnet18(7), 64
    originals.lively(net).save_pretrained(tmp_path / "theirs")
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    loaded = jt.load_pretrained(tmp_path / "theirs", model, inputs=image)
    jt.export_weights((model, loaded.variables), tmp_path / "w.safetensors", scheme="huggingface")
    assert bits(read_tensors(tmp_path / "w.safetensors")) == bits(read_tensors(tmp_path / "theirs"))


def test_a_net_of_ours_runs_in_torchvision(tmp_path):
    """Weights that were drawn here give there what they give here."""
    torch = pytest.importorskip("torch")
    import originals

    net = torchvision("resnet18")
    load_file = pytest.importorskip("safetensors.torch").load_file
    model, x = jt.models.resnet18(7), originals.images((2, 33, 33, 3))
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), jax.ShapeDtypeStruct(x.shape, x.dtype))
    variables = jax.tree.map(
        lambda one: (draw.uniform(0.5, 1.5, one.shape) * max(1, np.prod(one.shape[:-1])) ** -0.5).astype(one.dtype),
        dict(shapes),
    )
    jt.export_weights((model, variables), tmp_path / "w.safetensors", scheme="torchvision")
    net.load_state_dict(load_file(tmp_path / "w.safetensors"), strict=True)
    wanted, _ = originals.run(net, x, train=False)
    found, _ = jax.jit(functools.partial(model.apply, train=False, key=None))(variables, x)
    assert originals.error(found["logits"], wanted) < 1e-4
    assert torch.isfinite(torch.from_numpy(wanted)).all()


def test_inspection(tmp_path):
    variables = drawn()
    jt.export_weights((MODEL, variables), tmp_path / "w.safetensors", scheme="cifar")
    found = jt.inspect_weights(tmp_path / "w.safetensors")
    sizes = [leaf.size for leaf in leaves(variables).values()]
    assert (found.count, found.bytes, len(found.tensors)) == (sum(sizes), 4 * sum(sizes), 37)
    row = next(row for row in found.tensors if row.path == "layer2.0.conv1.weight")
    assert (row.shape, row.dtype, row.count, row.bytes) == ((32, 16, 3, 3), "float32", 4608, 18432)
    lines = str(found).splitlines()
    assert lines[0].split() == ["path", "shape", "type", "count"]
    assert "layer2.0.conv1.weight" in str(found)
    assert any(line.split() == ["layer2.0.conv1.weight", "32×16×3×3", "float32", "4,608"] for line in lines)
    assert f"37 tensors, {sum(sizes):,} values, {4 * sum(sizes):,} bytes, float32" in lines
    (scalar,) = jt.inspect_weights({"a": np.zeros((), np.int8)}).tensors
    assert (scalar.path, scalar.shape, scalar.dtype, scalar.count, scalar.bytes) == ("a", (), "int8", 1, 1)


def test_inspection_shows_types_as_they_are(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.tensor([1.5, -2.0]).bfloat16(), "b": torch.ones(2).half()}, tmp_path / "w.pth")
    found = jt.inspect_weights(tmp_path / "w.pth")
    assert [(row.path, row.dtype) for row in found.tensors] == [("a", "bfloat16"), ("b", "float16")]
    assert bits(read_tensors(tmp_path / "w.pth"))["a"][2] == np.array([1.5, -2.0], ml_dtypes.bfloat16).tobytes()


def test_the_libraries_are_named():
    assert {"jaxtransfer", "torchvision", "timm", "huggingface", "cifar", "big_vision"} <= set(LIBRARIES)


@pytest.mark.slow
def test_options_that_no_shape_shows_come_back(tmp_path):
    """Padding and types are in no name and in no shape: the file says them, and a model of others is refused."""
    model = jt.models.efficientnet_lite0(2, same_padding=False, dtype=jnp.bfloat16)
    variables = drawn(model, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
    path = tmp_path / "w.safetensors"
    jt.export_weights((model, variables), path, scheme="timm")
    with pytest.raises(jt.InputError, match="with same_padding=False, the model has same_padding=True"):
        jt.load_pretrained(path, jt.models.efficientnet_lite0(2))
    jt.load_pretrained(path, jt.models.efficientnet_lite0(2, same_padding=False))
    assert jt.pretrained.told_network(path) == "efficientnet-lite0"
    loaded = jt.pretrained.load_named(path, "efficientnet-lite0")
    arguments = loaded.model.recipe.arguments
    assert (arguments["same_padding"], arguments["dtype"], arguments["classes"]) == (False, "bfloat16", 2)
    assert bits(leaves(loaded.variables)) == bits(leaves(variables))

    bare = tmp_path / "timm" / "w.npz"  # timm's, of which config.json alone says how they pad
    bare.parent.mkdir()
    np.savez(bare, **read_tensors(path))
    assert "nothing says which of them it is" in str(jt.load_pretrained(bare, jt.models.efficientnet_lite0(2)).report)
    timm = {"input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.5] * 3}
    (bare.parent / "config.json").write_text(json.dumps({"architecture": "efficientnet_lite0", "pretrained_cfg": timm}))
    with pytest.raises(jt.InputError, match="with same_padding=False, epsilon=1e-05, the model has same_padding=True"):
        jt.load_pretrained(bare, jt.models.efficientnet_lite0(2))
    loaded = jt.pretrained.load_named(bare, "efficientnet-lite0")
    assert (loaded.model.recipe.arguments["same_padding"], loaded.model.recipe.arguments["epsilon"]) == (False, 1e-5)
    assert "nothing says" not in str(loaded.report)


def test_a_file_of_ours_keeps_the_channels_of_its_images(tmp_path):
    """Small-cnn is usually on grey images; the stem of one on colours was summed over them, in silence."""
    model = jt.models.normalize(jt.models.small_cnn(3), (0.4, 0.5, 0.6), 0.2)
    variables = drawn(model, jax.ShapeDtypeStruct((1, 12, 20, 3), jnp.float32))
    loaded = jt.load_pretrained(variables, model, inputs=jax.ShapeDtypeStruct((1, 12, 20, 3), jnp.float32))
    run = jt.pretrained.run_of(loaded, image_shape=(12, 20, 3))
    jt.export_weights(run, tmp_path / "w.safetensors")
    again = jt.pretrained.load_named(tmp_path / "w.safetensors", "small-cnn")
    assert bits(leaves(again.variables)) == bits(leaves(variables))
    assert not again.report.adapted
    assert jt.pretrained.run_of(again).image_shape == (12, 20, 3)
    bare = jt.pretrained.load_named(variables, "small-cnn", mean=(0.4, 0.5, 0.6), std=(0.2,))  # nothing says its shape
    assert bits(leaves(bare.variables)) == bits(leaves(variables))
    assert jt.pretrained.run_of(bare).image_shape[2] == 3
