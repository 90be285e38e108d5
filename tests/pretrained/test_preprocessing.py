"""Images prepared as the weights expect: against Pillow, and by hand."""

import jax
import numpy as np
import pytest

import jaxtransfer as jt
from jaxtransfer.pretrained import Preprocessing
from jaxtransfer.pretrained.resample import resample


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(7, 5), (31, 40), (20, 9), (50, 17), (31, 17)])
def test_resampling_is_pillows(method, shape, rng):
    image = pytest.importorskip("PIL.Image")
    filters = {"bilinear": image.Resampling.BILINEAR, "bicubic": image.Resampling.BICUBIC}
    pixels = rng.integers(0, 256, (31, 17, 3), np.uint8)
    wanted = np.asarray(image.fromarray(pixels).resize(shape[::-1], filters[method]))
    found = resample(pixels, shape, method)
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - wanted).max() <= 1  # it counts in fixed point
    assert (found != wanted).mean() < 0.02


def test_the_middle_is_cut_out_of_the_resized_image(rng):
    image = rng.integers(0, 256, (20, 33, 3), np.uint8)
    kept = Preprocessing((10, 10), 0.5).images([image])  # the shorter side is 20 already
    np.testing.assert_array_equal(kept, image[None, 5:15, 12:22])  # (33 - 10) / 2 = 11.5 goes to the even 12
    tall = Preprocessing((10, 10), 1.0).images([image.transpose(1, 0, 2)])
    wanted = resample(image.transpose(1, 0, 2), (16, 10), "bilinear")[3:13]
    almost(tall[0], wanted)
    wide = Preprocessing((8, 16), 1.0).images([image])
    almost(wide[0], resample(image, (9, 16), "bilinear")[:8])
    almost(Preprocessing((6, 7)).images([image])[0], resample(image, (6, 7), "bilinear"))


def almost(image, wanted):
    """Pillow counts in fixed point, `resample` in float64."""
    assert np.abs(image.astype(int) - wanted).max() <= 1
    assert (image != wanted).mean() < 0.02


def test_as_plain_data_and_back():
    one = Preprocessing((2, 3), 0.9, (0.1,), (0.2,), "bicubic")
    assert one.as_entries()["size"] == [2, 3]
    assert Preprocessing.from_entries(one.as_entries()) == one
    assert Preprocessing.from_entries({}) == Preprocessing()
    with pytest.raises(jt.InputError, match="preprocessing has no 'sise'"):
        Preprocessing.from_entries({"sise": [2, 3]})


@pytest.mark.parametrize(
    ("preprocessing", "images", "told"),
    [
        (Preprocessing(), [np.zeros((2, 2, 3), np.uint8)], "don't say which size"),
        (Preprocessing((2, 2)), [np.zeros((2, 2, 3))], "expected images of type uint8"),
        (Preprocessing((2, 2)), [np.zeros((2, 2), np.uint8)], "expected images of type uint8"),
        (Preprocessing((2, 2), interpolation="x"), [np.zeros((4, 4, 3), np.uint8)], "unknown interpolation 'x'"),
    ],
)
def test_what_is_no_image_is_told(preprocessing, images, told):
    with pytest.raises(jt.InputError, match=told):
        preprocessing.images(images)


def test_the_usual_size_is_that_of_the_network(tmp_path):
    """EfficientNet-Lite2 was trained on larger images than EfficientNet-Lite0."""
    model = jt.models.efficientnet_lite(2, 2)
    image = jax.ShapeDtypeStruct((1, 260, 260, 3), np.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), image)
    weights = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), dict(shapes))
    jt.export_weights((model, weights), tmp_path / "w.safetensors", scheme="efficientnet_lite_pytorch")
    known = jt.load_pretrained(tmp_path / "w.safetensors", model).preprocessing
    assert (known.size, known.crop, known.mean[0]) == ((260, 260), 0.875, pytest.approx(127 / 255))
