"""Warps and holes against SciPy and by their places."""

import jax
import numpy as np
import pytest
from scipy import ndimage

import jaxtransfer as jt
from jaxtransfer.data import views

KEY = jax.random.key(4)


def of(transform, image, count=40):
    keys = jax.random.split(KEY, count)
    return np.asarray(jax.jit(jax.vmap(transform, (0, None)))(keys, np.float32(image)))


@pytest.fixture
def image(rng):
    return rng.uniform(size=(9, 12, 2))


def warped(image, matrix, shift):
    """`image` drawn by SciPy at matrix⁻¹ (place − middle − shift) + middle, [y, x]."""
    middle = (np.array(image.shape[:2]) - 1) / 2
    back = np.linalg.inv(matrix)
    offset = middle - back @ (middle + shift)
    padded = [np.pad(image[..., c], 3) for c in range(image.shape[-1])]  # SciPy fades at the rim of the array alone
    offset = offset + 3 - back @ [3, 3]
    found = [ndimage.affine_transform(plane, back, offset, order=1, mode="constant") for plane in padded]
    return np.stack([plane[3:-3, 3:-3] for plane in found], axis=-1)


def test_an_image_that_is_not_changed_stays(image):
    np.testing.assert_allclose(of(views.affine(), image, 2), np.stack([image] * 2), atol=1e-6)


def test_affine_is_turn_shear_scale_and_shift(image):
    """A draw is found again from SciPy's picture of each of its parts."""
    degrees, translate, scale, shear = 40.0, 0.2, (0.6, 1.7), 25.0
    transform = views.affine(degrees=degrees, translate=translate, scale=scale, shear=shear)
    for key in jax.random.split(KEY, 5):
        turn, place, size, lean = jax.random.split(key, 4)
        angle = np.deg2rad(float(jax.random.uniform(turn, minval=-degrees, maxval=degrees)))
        slope = np.tan(np.deg2rad(float(jax.random.uniform(lean, minval=-shear, maxval=shear))))
        factor = float(jax.random.uniform(size, minval=scale[0], maxval=scale[1]))
        shift = np.array(jax.random.uniform(place, (2,), minval=-translate, maxval=translate)) * image.shape[:2]
        rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        matrix = rotation * factor @ np.array([[1, 0], [slope, 1]])
        out = np.asarray(jax.jit(transform)(key, np.float32(image)))
        np.testing.assert_allclose(out, warped(image, matrix, shift), atol=2e-5)


@pytest.mark.slow
def test_each_range_alone(image):
    for number, options in enumerate(({"degrees": 30}, {"translate": 0.2}, {"scale": (0.5, 1.5)}, {"shear": 30})):
        out = of(views.affine(**options), image, 6)
        assert not np.allclose(out[0], out[1], atol=1e-3), number
        assert out.min() >= 0
        assert out.max() <= 1


def test_cutout_is_a_square_of_zeros_anywhere(image):
    out = of(views.cutout(3), image + 1, 300)
    holes = (out == 0).all(-1)
    np.testing.assert_array_equal(out[~holes], np.stack([np.float32(image + 1)] * 300)[~holes])
    rows, columns = holes.any(2).sum(1), holes.any(1).sum(1)
    np.testing.assert_array_equal(holes.sum((1, 2)), rows * columns)  # a rectangle
    assert set(rows) == set(columns) == {2, 3}  # the middle is in the image, the square may stick out
    share = holes.mean(0)
    assert share.min() > 0.01  # every pixel is hit


def test_bad_ranges_are_refused():
    for options in ({"degrees": -1}, {"translate": 1.2}, {"scale": (1.2, 0.8)}, {"shear": 90}):
        with pytest.raises(jt.InputError, match="affine takes degrees"):
            views.affine(**options)
    with pytest.raises(jt.InputError, match="at least 1 pixel, got 0"):
        views.cutout(0)
