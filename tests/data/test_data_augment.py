"""Each transform against a loop that draws the same numbers and treats one example at a time."""

import numpy as np
import pytest

from jaxtransfer.data import augment
from jaxtransfer.data.augment import Rows
from jaxtransfer.errors import InputError


def batch_of(n=9, shape=(6, 5, 3), dtype=np.uint8, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (n, *shape)).astype(dtype),
        "label": np.arange(n, dtype=np.int32) % 4,
    }


def test_random_crop_matches_a_loop():
    batch = batch_of()
    result = augment.random_crop(2)(batch, np.random.default_rng(7))
    places = np.random.default_rng(7).integers(0, 5, (9, 2))
    for image, cropped, (y, x) in zip(batch["image"], result["image"], places, strict=True):
        for row in range(6):
            for column in range(5):
                at = (row + y - 2, column + x - 2)
                inside = 0 <= at[0] < 6 and 0 <= at[1] < 5
                np.testing.assert_array_equal(cropped[row, column], image[at] if inside else np.zeros(3))
    assert len({tuple(place) for place in places}) > 3


def test_random_crop_reaches_every_place_equally():
    image = np.zeros((20000, 3, 3, 1), np.uint8)
    image[:, 1, 1] = 1
    cropped = augment.random_crop(1)({"image": image}, np.random.default_rng(0))["image"]
    share = cropped[..., 0].mean(axis=0)  # the marked pixel moves by -1, 0 or 1 on each axis
    np.testing.assert_allclose(share, np.full((3, 3), 1 / 9), atol=0.01)


@pytest.mark.parametrize("channels", [1, 3, 4, 7])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float16, np.int64, np.bool_])
def test_crops_and_flips_keep_any_type_and_number_of_channels(dtype, channels, rng):
    image = rng.integers(0, 256, (12, 5, 4, channels)).astype(dtype)[:, ::-1]  # in no order of memory
    before, transform = image.copy(), augment.compose(augment.random_crop(1), augment.random_flip())
    result = transform({"image": image}, np.random.default_rng(1))["image"]
    draws = np.random.default_rng(1)
    places, flips = draws.integers(0, 3, (12, 2)), draws.random(12) < 0.5
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)))
    want = [one[y : y + 5, x : x + 4] for one, (y, x) in zip(padded, places, strict=True)]
    want = [np.fliplr(one) if flip else one for one, flip in zip(want, flips, strict=True)]
    np.testing.assert_array_equal(result, np.stack(want), strict=True)
    np.testing.assert_array_equal(image, before)
    assert result.flags.writeable
    none = transform({"image": image[:0]}, np.random.default_rng(1))["image"]
    assert none.shape == (0, 5, 4, channels)


def test_random_flip_matches_a_loop():
    batch = batch_of(40)
    result = augment.random_flip()(batch, np.random.default_rng(3))
    flips = np.random.default_rng(3).random(40) < 0.5
    for image, flipped, flip in zip(batch["image"], result["image"], flips, strict=True):
        np.testing.assert_array_equal(flipped, np.fliplr(image) if flip else image)
    assert 10 < flips.sum() < 30


@pytest.mark.parametrize("size", [1, 2, 3, 12])
def test_cutout_matches_a_loop(size):
    batch = batch_of()
    result = augment.cutout(size)(batch, np.random.default_rng(5))
    centres = np.random.default_rng(5).integers(0, (6, 5), (9, 2))
    for image, cut, (y, x) in zip(batch["image"], result["image"], centres, strict=True):
        for row in range(6):
            for column in range(5):
                hit = 0 <= row - y + size // 2 < size and 0 <= column - x + size // 2 < size
                np.testing.assert_array_equal(cut[row, column], 0 if hit else image[row, column])


def test_mixup_matches_a_loop():
    batch = batch_of(8)
    result = augment.mixup(0.7, classes=5)(batch, np.random.default_rng(2))
    rng = np.random.default_rng(2)
    weights, others = rng.beta(0.7, 0.7, 8), rng.permutation(8)
    assert result["image"].dtype == result["label"].dtype == np.float32
    for i, (w, j) in enumerate(zip(weights, others, strict=True)):
        image = (w * batch["image"][i].astype(float) + (1 - w) * batch["image"][j].astype(float)) / 255
        label = np.zeros(5)
        label[batch["label"][i]] += w
        label[batch["label"][j]] += 1 - w
        np.testing.assert_allclose(result["image"][i], image, atol=1e-6)
        np.testing.assert_allclose(result["label"][i], label, atol=1e-6)
    np.testing.assert_allclose(result["label"].sum(axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize(("mean", "std"), [((0.4, 0.5, 0.6), (0.2, 0.3, 0.1)), (0.5, 0.25)])
def test_normalize_matches_the_formula(dtype, mean, std):
    batch = batch_of(dtype=dtype)
    result = augment.normalize(mean, std)(batch, np.random.default_rng())["image"]
    scaled = batch["image"].astype(np.float64) / (255 if dtype == np.uint8 else 1)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, (scaled - np.array(mean)) / np.array(std), rtol=1e-5, atol=1e-5)


ALL = [augment.random_crop(2), augment.random_flip(), augment.cutout(3), augment.normalize(0.5, 0.2)]


@pytest.mark.parametrize("transform", [*ALL, augment.compose(*ALL)])
def test_rows_of_a_global_batch_equal_the_rows_of_the_whole(transform):
    batch = batch_of(12)
    whole = transform(batch, np.random.default_rng(4))["image"]
    for rows in (Rows(0, 4, 12), Rows(4, 8, 12), Rows(8, 12, 12)):
        part = {key: value[rows.start : rows.stop] for key, value in batch.items()}
        np.testing.assert_array_equal(
            transform(part, np.random.default_rng(4), rows)["image"], whole[rows.start : rows.stop]
        )


def test_transforms_leave_their_input_alone():
    batch = batch_of()
    before = {key: value.copy() for key, value in batch.items()}
    for transform in (*ALL, augment.mixup(1.0, 4), augment.compose(*ALL, augment.mixup(1.0, 4))):
        transform(batch, np.random.default_rng(0))
        for key, value in batch.items():
            np.testing.assert_array_equal(value, before[key])


def test_compose_draws_one_stream_in_order():
    batch = batch_of()
    crop, flip = augment.random_crop(2), augment.random_flip()
    rng = np.random.default_rng(1)
    expected = flip(crop(batch, rng), rng)
    result = augment.compose(crop, flip)(batch, np.random.default_rng(1))
    np.testing.assert_array_equal(result["image"], expected["image"])
    assert augment.compose(crop, flip).per_example
    assert not augment.compose(crop, augment.mixup(1.0, 4)).per_example
    assert not augment.compose(crop, lambda batch, rng: batch).per_example


@pytest.mark.parametrize(
    "make",
    [
        lambda: augment.random_crop(0),
        lambda: augment.cutout(0),
        lambda: augment.mixup(0.0, 4),
        lambda: augment.mixup(1.0, 0),
        lambda: augment.normalize(0.5, 0.0),
        lambda: augment.mixup(1.0, 2)(batch_of(), np.random.default_rng(0)),
        lambda: augment.normalize((0.5, 0.5), (1, 1))(batch_of(), np.random.default_rng(0)),
        lambda: augment.compose(augment.mixup(1.0, 4), augment.mixup(1.0, 4))(batch_of(), np.random.default_rng(0)),
    ],
)
def test_unusable_settings(make):
    with pytest.raises(InputError):
        make()
