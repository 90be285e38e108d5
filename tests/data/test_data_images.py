import numpy as np
import pytest

from jaxtransfer.data import images
from jaxtransfer.errors import InputError


def test_shrinking_averages_areas():
    image = np.arange(16, dtype=np.uint8).reshape(4, 4, 1) * 10
    small = images.fit(image, (2, 2, 1))
    expected = image.reshape(2, 2, 2, 2).astype(float).mean(axis=(1, 3))
    np.testing.assert_allclose(small[..., 0], expected, atol=1)


def test_grey_and_colour_convert():
    grey = np.random.default_rng(0).integers(0, 256, (5, 4, 1), dtype=np.uint8)
    colour = images.fit(grey, (5, 4, 3))
    np.testing.assert_array_equal(colour, np.concatenate([grey] * 3, axis=2))
    np.testing.assert_array_equal(images.fit(colour, (5, 4, 1)), grey)
    red = np.zeros((5, 4, 3), np.uint8)
    red[..., 0] = 255
    assert images.fit(red, (5, 4, 1)).max() == 76  # 0.299 of 255
    assert images.fit(np.zeros((5, 4, 4), np.uint8), (10, 8, 3)).shape == (10, 8, 3)
    assert images.fit(grey, (10, 8, 3)).shape == (10, 8, 3)


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 2), (0, 8, 3), "large", 8])
def test_wrong_shapes(shape):
    with pytest.raises(InputError, match="image_shape must be"):
        images.check_shape(shape)
