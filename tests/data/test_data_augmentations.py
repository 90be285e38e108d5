"""Augmentations of photos against Pillow, by their distributions, and in pipelines."""

import math

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

import jaxtransfer as jt
from jaxtransfer.data import Dataset, augment, load, pipeline
from jaxtransfer.data.transform import Rows


@pytest.fixture
def picture(rng):
    """A picture of plain parts and of noise, so that every change changes it."""
    picture = cv2.resize(rng.integers(20, 230, (5, 6, 3), np.uint8), (27, 23))
    picture[5:9, 5:9] = rng.integers(0, 256, (4, 4, 3), np.uint8)
    return np.clip(picture, 9, 244)


def pillows(picture, magnitude, fill=0):
    """What torchvision's fourteen changes make of a PIL image at a magnitude of 30, by name and sign."""
    image, s = Image.fromarray(picture), magnitude / 30
    width, height = image.size
    made = {"identity": image, "autocontrast": ImageOps.autocontrast(image), "equalize": ImageOps.equalize(image)}
    made["posterize"] = ImageOps.posterize(image, 8 - round(magnitude / 7.5))
    made["solarize"] = ImageOps.solarize(image, 255 - 255 * s)
    for sign in (-1, 1):
        matrices = {
            "shear x": (1, sign * 0.3 * s, 0, 0, 1, 0),
            "shear y": (1, 0, 0, sign * 0.3 * s, 1, 0),
            "translate x": (1, 0, -int(sign * 150 / 331 * width * s), 0, 1, 0),
            "translate y": (1, 0, 0, 0, 1, -int(sign * 150 / 331 * height * s)),
        }
        for name, matrix in matrices.items():
            options = {"resample": Image.Resampling.NEAREST, "fillcolor": (fill,) * 3}
            made[name, sign] = image.transform(image.size, Image.Transform.AFFINE, matrix, **options)
        made["rotate", sign] = image.rotate(sign * 30 * s, Image.Resampling.NEAREST, fillcolor=(fill,) * 3)
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Color, ImageEnhance.Contrast, ImageEnhance.Sharpness):
            made[enhance.__name__, sign] = enhance(image).enhance(1 + sign * 0.9 * s)
    return {name: np.asarray(one) for name, one in made.items()}


@pytest.mark.parametrize(("magnitude", "fill"), [(9, 0), (30, 128), (4, 0), (17, 255)])
def test_rand_augment_makes_what_pillow_makes_each_as_often(picture, rng, magnitude, fill):
    batch = {"image": np.repeat(picture[None], 4200, axis=0)}
    found = augment.rand_augment(1, magnitude, fill=fill)(batch, rng)["image"]
    wanted = pillows(picture, magnitude, fill)
    by_pixels = {one.tobytes(): name for name, one in wanted.items()}
    assert len(by_pixels) == len(wanted)  # all differ, so that each can be told
    counts = dict.fromkeys(wanted, 0)
    for image in found:
        counts[by_pixels[image.tobytes()]] += 1  # KeyError: it is none of Pillow's
    for name, count in counts.items():
        expected = 300 if isinstance(name, str) else 150
        assert abs(count - expected) < 5 * math.sqrt(expected), name
    assert batch["image"][1].tobytes() == picture.tobytes()


def test_rand_augment_draws_each_change_anew(picture, rng):
    batch = {"image": np.repeat(picture[None], 600, axis=0)}
    twice = augment.rand_augment(2, 9)(batch, rng)["image"]
    once = {one.tobytes() for one in pillows(picture, 9).values()}
    both = {two.tobytes() for one in pillows(picture, 9).values() for two in pillows(one, 9).values()}
    seen = {image.tobytes() for image in twice}
    assert seen <= both
    assert len(seen - once) > 150
    grey = augment.rand_augment()({"image": batch["image"][..., :1]}, rng)["image"]
    assert grey.shape == (600, *picture.shape[:2], 1)


def test_at_magnitude_zero_almost_nothing_changes(picture, rng):
    found = augment.rand_augment(1, 0)({"image": np.repeat(picture[None], 300, axis=0)}, rng)["image"]
    seen = {image.tobytes() for image in found}
    left = ImageOps.autocontrast(Image.fromarray(picture)), ImageOps.equalize(Image.fromarray(picture))
    assert seen == {picture.tobytes(), *(np.asarray(one).tobytes() for one in left)}


@pytest.mark.slow
def test_color_jitter_blends_as_pillow_in_any_order(picture, rng):
    for name, enhance in (("brightness", ImageEnhance.Brightness), ("contrast", ImageEnhance.Contrast)):
        options = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0} | {name: 0.7}
        found = augment.color_jitter(**options)({"image": np.repeat(picture[None], 40, axis=0)}, rng)["image"]
        steps = np.linspace(0.3, 1.7, 2801)
        made = np.stack([np.asarray(enhance(Image.fromarray(picture)).enhance(float(f))) for f in steps])
        apart = np.abs(found[:, None].astype(int) - made[None]).max(axis=(2, 3, 4))
        nearest = steps[apart.argmin(axis=1)]
        assert apart.min(axis=1).max() <= 1
        assert nearest.min() < 0.6
        assert nearest.max() > 1.4
    turned = augment.color_jitter(0, 0, 0, 0.5)({"image": np.repeat(picture[None], 40, axis=0)}, rng)["image"]
    grey = [np.asarray(Image.fromarray(one).convert("HSV"))[..., 2].astype(int) for one in (picture, *turned)]
    assert max(np.abs(one - grey[0]).max() for one in grey[1:]) <= 1  # the value stays, the hue turns
    assert len({one.tobytes() for one in turned}) > 30
    still = augment.color_jitter(0, 0, 0, 0)({"image": picture[None]}, rng)["image"]
    np.testing.assert_array_equal(still[0], picture)


def test_hue_is_pillows_within_its_rounding(picture, rng):
    from jaxtransfer.data import pixels

    for turn in (-0.5, -0.2, 0.0, 0.13, 0.4):
        h, s, v = Image.fromarray(picture).convert("HSV").split()
        moved = (np.asarray(h).astype(int) + int(turn * 255)) % 256
        wanted = np.asarray(Image.merge("HSV", (Image.fromarray(moved.astype(np.uint8)), s, v)).convert("RGB"))
        found = pixels.hue(picture[None], np.array([turn]))[0]
        assert np.abs(found.astype(int) - wanted).mean() < 1.5
        assert np.abs(found.astype(int) - wanted).max() <= 12


@pytest.mark.slow
def test_crops_have_the_distribution_that_is_asked_for(rng):
    height, width, count = 60, 90, 4000
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([rows, columns, 0 * rows], axis=2).astype(np.uint8)
    made = {}
    scale, ratio = (0.2, 0.6), (0.8, 1.25)
    cut = augment.random_resized_crop((height, width), scale=scale, ratio=ratio, interpolation="area")
    found = cut({"image": [image] * count}, rng)["image"].astype(float)
    made["tall"] = found[:, -1, 0, 0] - found[:, 0, 0, 0] + 1
    made["broad"] = found[:, 0, -1, 1] - found[:, 0, 0, 1] + 1
    area = made["tall"] * made["broad"] / (height * width)
    assert area.min() > 0.18
    assert area.max() < 0.63
    assert area.mean() == pytest.approx(0.4, abs=0.015)  # none is refused: 0.6 of 60 x 90 fits at 0.8..1.25
    assert np.quantile(area, 0.25) == pytest.approx(0.3, abs=0.02)
    shape = np.log(made["broad"] / made["tall"])
    assert np.abs(shape).max() < np.log(1.25) + 0.06
    assert shape.mean() == pytest.approx(0, abs=0.02)
    top = found[:, 0, 0, 0] / np.maximum(height - made["tall"], 1)
    assert top.mean() == pytest.approx(0.5, abs=0.03)
    assert top.min() == 0
    assert top.max() == pytest.approx(1, abs=0.05)


def test_a_crop_is_pillows_and_falls_back_to_the_middle(rng):
    image = rng.integers(0, 256, (20, 90, 3), np.uint8)
    whole = augment.random_resized_crop(16, scale=(1, 1), ratio=(0.75, 4 / 3))({"image": [image]}, rng)["image"][0]
    middle = image[:, (90 - round(20 * 4 / 3)) // 2 :][:, : round(20 * 4 / 3)]
    wanted = np.asarray(Image.fromarray(middle).resize((16, 16), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(whole, wanted)
    turned = image.transpose(1, 0, 2)
    tall = augment.random_resized_crop(16, scale=(1, 1), interpolation="bicubic")({"image": [turned]}, rng)["image"][0]
    middle = turned[(90 - round(20 / 0.75)) // 2 :][: round(20 / 0.75)]
    wanted = np.asarray(Image.fromarray(middle).resize((16, 16), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(tall, wanted)


@pytest.mark.parametrize("value", [None, 7, (1, 2, 3)])
def test_erasing_changes_one_rectangle_of_some_images(rng, value):
    image = np.full((3000, 20, 30, 3), 99, np.uint8)
    erase = augment.random_erasing(0.4, scale=(0.1, 0.3), ratio=(0.5, 2), value=value)
    found = erase({"image": image}, rng)["image"]
    changed = (found != 99).any(axis=3)
    hit = changed.any(axis=(1, 2))
    assert hit.mean() == pytest.approx(0.4, abs=0.05)
    for picture, where in zip(found[hit][:200], changed[hit][:200], strict=True):
        rows, columns = np.flatnonzero(where.any(axis=1)), np.flatnonzero(where.any(axis=0))
        inside = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        share = inside.shape[0] * inside.shape[1] / 600
        assert 0.07 < share < 0.36
        if value is None:
            assert where.sum() > 0.9 * inside.shape[0] * inside.shape[1]
            assert inside.std() > 30
        else:
            assert (inside == np.array(value)).all()
    assert (image == 99).all()


def test_the_share_of_a_pasted_label_is_that_of_the_pixels(rng):
    size, classes = 400, 400  # each its own class, whose number its pixels show
    image = np.broadcast_to(np.arange(size, dtype=np.float32)[:, None, None, None], (size, 14, 18, 1))
    found = augment.cutmix(1.0, classes)({"image": image, "label": np.arange(size)}, rng)
    shares = []
    for row in range(size):
        counts = np.bincount(found["image"][row].astype(int).ravel(), minlength=classes) / (14 * 18)
        np.testing.assert_allclose(found["label"][row], counts, atol=1e-6)
        shares.append(1 - counts[row])
        mixed = found["image"][row, :, :, 0] != row
        if mixed.any():
            assert mixed[np.ix_(mixed.any(axis=1), mixed.any(axis=0))].all()  # a rectangle
    assert 0.25 < np.mean(shares) < 0.5  # a half, less what was cut off at the border
    assert found["label"].dtype == np.float32
    assert "label" not in augment.cutmix()({"image": image, "label": np.arange(size)}, rng)
    with pytest.raises(jt.InputError, match="cutmix needs integer labels"):
        augment.cutmix(1.0, classes)(found, rng)


def test_one_of_several_is_drawn_for_each_batch():
    mixed = augment.one_of(augment.mixup(0.2, 3), augment.cutmix(1.0, 3))
    batch = {"image": np.zeros((4, 4, 4, 3), np.uint8), "label": np.arange(4) % 3}
    kinds = [mixed(batch, np.random.default_rng(seed))["image"].dtype for seed in range(200)]
    assert 70 < sum(kind == np.uint8 for kind in kinds) < 130  # cutmix leaves the type


CHAIN = (
    augment.random_resized_crop(12, scale=(0.3, 1)),
    augment.random_flip(),
    augment.rand_augment(2, 9),
    augment.color_jitter(),
    augment.random_erasing(0.5),
)


def test_a_fingerprint_sees_each_of_several_transforms():
    data = Dataset.from_arrays(np.arange(6 * 48, dtype=np.uint8).reshape(6, 4, 4, 3), np.arange(6) % 3)

    def told(of_mixup, of_cutmix):
        mixes = augment.one_of(augment.mixup(of_mixup, 3), augment.cutmix(of_cutmix, 3))
        both = augment.compose(augment.random_flip(), mixes)
        return [pipeline(data, 2, augment=one).fingerprint()["augmentation"] for one in (mixes, both)]

    plain, *others = told(0.2, 1.0), told(0.9, 1.0), told(0.2, 0.3)
    assert plain == told(0.2, 1.0)
    assert all(one[k] != plain[k] for one in others for k in (0, 1))


@pytest.fixture
def photos(tmp_path, rng):
    for label in range(2):
        folder = tmp_path / "photos" / f"class{label}"
        folder.mkdir(parents=True)
        for number in range(6):
            image = cv2.resize(rng.integers(0, 256, (5, 6, 3), np.uint8), (int(rng.integers(30, 60)), 40))
            assert cv2.imwrite(str(folder / f"{number}.png"), image)
    return load(f"folder:{tmp_path / 'photos'}", "all", image_shape=(12, 12, 3), resizing=jt.data.Resizing())


def test_a_pipeline_cuts_from_the_files_and_is_the_same_however_it_is_read(photos):
    whole = augment.compose(*CHAIN, augment.one_of(augment.mixup(0.2, 2), augment.cutmix(1.0, 2)))
    plain = [pipeline(photos, 8, seed=3, augment=whole, threads=0).batch(i) for i in range(6)]
    for threads in (1, 3):
        stream = pipeline(photos, 8, seed=3, augment=whole, threads=threads).iterate(start=2)
        for i in range(2, 6):
            batch = next(stream)
            assert all(np.array_equal(batch[name], plain[i][name]) for name in ("image", "label"))
        stream.close()
    halves = [pipeline(photos, 8, seed=3, augment=whole, shard=(k, 2), threads=0).batch(4) for k in range(2)]
    np.testing.assert_array_equal(np.concatenate([half["image"] for half in halves]), plain[4]["image"])
    rows = augment.compose(*CHAIN)
    own = [pipeline(photos, 8, seed=3, augment=rows, shard=(k, 2), threads=0).batch(4) for k in range(2)]
    both = pipeline(photos, 8, seed=3, augment=rows, threads=0).batch(4)
    np.testing.assert_array_equal(np.concatenate([half["image"] for half in own]), both["image"])
    seen = {
        image.tobytes() for i in range(6) for image in pipeline(photos, 8, augment=rows, threads=0).batch(i)["image"]
    }
    assert len(seen) == 48  # nothing is repeated over four epochs
    narrow = {"image": [np.full((40, 50, 3), 9, np.uint8)] * 2}
    assert rows(narrow, np.random.default_rng(0), Rows(2, 4, 8))["image"].shape == (2, 12, 12, 3)


def test_cutting_sees_what_the_centre_crop_leaves_out(photos):
    cut = augment.random_resized_crop(12, scale=(0.02, 0.03))
    parts = np.concatenate([pipeline(photos, 12, augment=cut, threads=0).batch(i)["image"] for i in range(20)])
    held = np.concatenate([pipeline(photos.decoded(), 12, augment=cut, threads=0).batch(i)["image"] for i in range(20)])
    assert parts.std(axis=(1, 2)).mean() > 1.3 * held.std(axis=(1, 2)).mean()  # of 40 x 45 pixels, not of 12 x 12
    with pytest.raises(jt.InputError, match='cache="memory" holds images resized'):
        pipeline(photos, 4, augment=cut, cache="memory")
    one, other = (pipeline(photos, 4, augment=augment.random_resized_crop(12, scale=s)) for s in ((0.1, 1), (0.2, 1)))
    assert one.fingerprint()["augmentation"] != other.fingerprint()["augmentation"]


def applied(transform, dtype=np.uint8):
    return transform({"image": np.zeros((2, 4, 4, 3), dtype)}, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: augment.rand_augment(0), "count of at least 1"),
        (lambda: augment.rand_augment(2, 31), r"whole magnitude in 0\.\.30"),
        (lambda: augment.rand_augment(fill=256), r"a value in 0\.\.255"),
        (lambda: augment.color_jitter(hue=0.6), "the hue at most 0.5"),
        (lambda: augment.color_jitter(-1), "at least 0"),
        (lambda: augment.random_erasing(1.5), r"probability in \[0, 1\]"),
        (lambda: augment.random_erasing(scale=(0, 0.5)), "scale is a range"),
        (lambda: augment.random_erasing(ratio=(2, 1)), "ratio is a range"),
        (lambda: augment.random_resized_crop(0), "at least 1 pixel"),
        (lambda: augment.random_resized_crop(8, scale=(0.1, 1.1)), "scale is a range"),
        (lambda: augment.random_resized_crop(8, interpolation="nearest"), "unknown interpolation"),
        (lambda: augment.random_erasing(value="grey"), "a finite number, or one for each channel"),
        (lambda: augment.random_erasing(value=(1, float("nan"))), "a finite number, or one for each channel"),
        (
            lambda: applied(augment.random_erasing(value=(0.485, 0.456, 0.406))),
            r"whole numbers in 0\.\.255; got \[0.485",
        ),
        (lambda: applied(augment.random_erasing(value=256)), r"whole numbers in 0\.\.255"),
        (lambda: applied(augment.random_erasing(value=(1, 2))), "fills 2 channels; the images have 3"),
        (lambda: applied(augment.random_resized_crop(2), np.float32), "resizes images uint8, got floats"),
        (lambda: augment.cutmix(0), "alpha > 0"),
        (lambda: augment.cutmix(float("inf")), "finite alpha"),
        (lambda: augment.mixup(float("inf")), "finite alpha"),
        (lambda: augment.mixup(float("nan")), "finite alpha"),
        (lambda: augment.one_of(), "one transform or more"),
        (
            lambda: augment.rand_augment()({"image": np.zeros((2, 4, 4, 3), np.float32)}, np.random.default_rng(0)),
            "rand_augment changes images uint8",
        ),
        (
            lambda: pipeline(Dataset.from_columns(x=np.zeros(4)), 2, augment=augment.rand_augment()).batch(0),
            "this transform changes images",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, told):
    with pytest.raises(jt.InputError, match=told):
        make()
