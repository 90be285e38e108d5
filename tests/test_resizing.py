"""Images of any size brought to one: against Pillow and by torchvision's formulas, in data sets and in runs."""

import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
from PIL import Image

import jaxtransfer as jt
from jaxtransfer import resizing
from jaxtransfer.data import Dataset, Resizing, eval_batches, load, pipeline
from jaxtransfer.data.sources import ListSource
from jaxtransfer.pretrained import Preprocessing
from jaxtransfer.resizing import STRETCH, fit, fit_mask

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def torchvisions(image, side, share, method):
    """`Resize(floor(side / share))` and `CenterCrop(side)` of a PIL image, by their formulas."""
    picture = Image.fromarray(image.squeeze())
    edge, (width, height) = math.floor(side / share), picture.size
    short, long = min(width, height), max(width, height)
    longer = int(edge * long / short)
    picture = picture.resize((edge, longer) if width <= height else (longer, edge), FILTERS[method])
    top, left = round((picture.height - side) / 2.0), round((picture.width - side) / 2.0)
    return np.asarray(picture.crop((left, top, left + side, top + side))).reshape(side, side, image.shape[2])


@pytest.mark.parametrize("method", FILTERS)
def test_of_a_long_strip_the_middle_alone_is_resized(method, rng, monkeypatch):
    strip = np.arange(20_000, dtype=np.uint32)[None, :, None].astype(np.uint8)  # else 256 x 5 million pixels
    found = Resizing(0.875, method)(strip, (224, 224))
    assert found.shape == (224, 224, 1)
    assert set(np.unique(found)) == {9999 % 256, 10_000 % 256}
    monkeypatch.setattr(resizing, "MOST_PIXELS", 0)
    for height, width in ((7, 300), (300, 7), (40, 900), (2, 50)):
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        made = Resizing(0.9, method)(image, (32, 32)).astype(int)
        gap = np.abs(made - torchvisions(image, 32, 0.9, method))
        assert gap.max() <= (1 if method == "bilinear" else 16)  # of noise, where the cubic filter overshoots
        assert gap.mean() < 0.4


@pytest.mark.parametrize("method", FILTERS)
@pytest.mark.parametrize(("height", "width"), [(40, 61), (61, 40), (17, 90), (12, 9), (32, 32), (36, 36), (33, 48)])
def test_a_share_of_the_resized_image_is_torchvisions(height, width, method, rng):
    for share in (0.875, 0.9, 1.0, 0.3):
        for channels in (1, 3):
            image = rng.integers(0, 256, (height, width, channels), np.uint8)
            found = Resizing(share, method)(image, (32, 32))
            np.testing.assert_array_equal(found, torchvisions(image, 32, share, method))


def test_no_size_is_missed_by_a_rounding(rng):
    for _ in range(2000):
        height, width, side = (int(n) for n in rng.integers(1, 700, 3))
        share = float(rng.uniform(0.05, 1))
        plan = Resizing(share).plan((height, width), (side, side))
        edge, short = math.floor(side / share), min(height, width)
        assert plan[:2] == (edge * height // short, edge * width // short)
        assert 0 <= plan.top <= plan.rows - side
        assert 0 <= plan.left <= plan.columns - side


def test_another_aspect_ratio_is_covered(rng):
    for size in ((8, 16), (16, 8)):
        for old in ((20, 33), (33, 20), (64, 3)):
            image = rng.integers(0, 256, (*old, 3), np.uint8)
            resizing = Resizing(0.8, "bicubic")
            plan = resizing.plan(old, size)
            wanted = [math.floor(side / 0.8) for side in size]
            assert plan.rows >= wanted[0]
            assert plan.columns >= wanted[1]
            assert (plan.rows == wanted[0]) or (plan.columns == wanted[1])
            assert plan.rows / plan.columns == pytest.approx(old[0] / old[1], rel=1.1 / min(plan[:2]))
            assert resizing(image, size).shape == (*size, 3)


def test_stretching_is_what_it_was_and_filters_can_stretch(rng):
    image = rng.integers(0, 256, (30, 17, 3), np.uint8)
    area = cv2.resize(image, (9, 8), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(fit(image, (8, 9, 3)), area)
    np.testing.assert_array_equal(STRETCH(image, (8, 9)), area)
    grown = cv2.resize(image, (40, 50), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(STRETCH(image, (50, 40)), grown)
    bicubic = np.asarray(Image.fromarray(image).resize((9, 8), FILTERS["bicubic"]))
    np.testing.assert_array_equal(Resizing(None, "bicubic")(image, (8, 9)), bicubic)


def test_channels_are_brought_along(rng):
    image = rng.integers(0, 256, (20, 30, 4), np.uint8)
    whole = np.asarray(Image.fromarray(image).resize((15, 10), FILTERS["bilinear"]))
    np.testing.assert_array_equal(fit(image, (10, 10, 4), Resizing(1.0)), whole[:, 2:12])  # round(2.5) is 2
    opaque = fit(image[:, :, :3], (10, 10, 4), Resizing(1.0))
    assert (opaque[:, :, 3] == 255).all()
    np.testing.assert_array_equal(opaque[:, :, :3], fit(image, (10, 10, 3), Resizing(1.0)))
    assert fit(image, (10, 10, 1), Resizing(0.5)).shape == (10, 10, 1)


@pytest.mark.parametrize("options", [{"crop": 0.0}, {"crop": 1.1}, {"crop": "0.9"}, {"crop": float("nan")}])
def test_what_is_no_share_is_told(options):
    with pytest.raises(jt.InputError, match="crop is the share"):
        Resizing(**options)
    with pytest.raises(jt.InputError, match="unknown interpolation 'lanczos'"):
        Resizing(interpolation="lanczos")


@pytest.fixture
def photos(tmp_path, rng):
    """A folder of images of many sizes and kinds, and how each is to be seen, by class and number."""
    shapes, seen = [(40, 61, 3), (61, 40, 3), (32, 32, 3), (24, 50, 1), (36, 41, 4)], {}
    for label in range(2):
        folder = tmp_path / "photos" / f"class{label}"
        folder.mkdir(parents=True)
        for number, shape in enumerate(shapes):
            image = cv2.resize(rng.integers(0, 256, (6, 7, shape[2]), np.uint8), shape[1::-1]).reshape(shape)
            Image.fromarray(image.squeeze()).save(folder / f"{number}.png")
            seen[label, number] = np.repeat(image, 3, 2) if shape[2] == 1 else image[:, :, :3]
    return tmp_path / "photos", seen


def shown(batches):
    return {(int(label), image.tobytes()) for batch in batches for label, image in zip(*parts(batch), strict=True)}


def parts(batch):
    kept = batch["mask"] > 0
    return batch["label"][kept], batch["image"][kept]


def test_a_folder_of_many_sizes_is_resized_as_asked(photos):
    folder, seen = photos
    for share, method in ((0.875, "bilinear"), (1.0, "bicubic")):
        data = load(f"folder:{folder}", "all", image_shape=(32, 32, 3), resizing=Resizing(share, method))
        wanted = {(label, torchvisions(image, 32, share, method).tobytes()) for (label, _), image in seen.items()}
        for cache in ("memory", None):
            assert shown(eval_batches(data, 4, cache=cache)) == wanted  # the one of 32 x 32 too


def test_a_fingerprint_tells_the_resizing(photos):
    folder, _ = photos

    def told(**options):
        return jt.data.fingerprint(load(f"folder:{folder}", "all", image_shape=(32, 32, 3), **options))

    plain, crop = told(), told(resizing=Resizing(0.9))
    assert plain == told(resizing=STRETCH)
    assert "resizing" not in plain
    assert crop == {**plain, "resizing": "crop 0.9, bilinear"}
    assert told(resizing=Resizing(None, "bicubic")) == {**plain, "resizing": "stretched, bicubic"}
    data = load(f"folder:{folder}", "all", image_shape=(32, 32, 3), resizing=Resizing(0.9))
    assert jt.data.fingerprint(data.decoded()) == crop
    assert pipeline(data, 4).fingerprint()["resizing"] == "crop 0.9, bilinear"


def test_what_lies_on_the_pixels_is_cut_with_them(rng):
    image = np.repeat(rng.integers(0, 256, (30, 44, 1), np.uint8), 3, 2)
    mask = (image[:, :, 0] > 100).astype(np.uint8)
    data = Dataset.from_columns(image=image[None], mask_of=mask[None])
    data = replace(data, source=ListSource([{"image": image, "mask_of": mask}]), entries={
        "image": replace(data.entries["image"], shape=(10, 10, 3)),
        "mask_of": replace(data.entries["mask_of"], shape=(10, 10)),
    }, resize=True, resizing=Resizing(0.5))  # fmt: skip
    found = data[0]
    plan = Resizing(0.5).plan((30, 44), (10, 10))
    assert plan == (20, 29, 5, 10)
    rows = [math.floor((5 + k + 0.5) * 30 / 20) for k in range(10)]
    columns = [math.floor((10 + k + 0.5) * 44 / 29) for k in range(10)]
    wanted = np.array([[mask[row, column] for column in columns] for row in rows])
    np.testing.assert_array_equal(found["mask_of"], wanted)
    np.testing.assert_array_equal(fit_mask(mask, (10, 10), Resizing(0.5)), wanted)


def test_data_like_what_weights_expect(photos):
    folder, seen = photos
    known = Preprocessing((24, 24), 0.8, (0.5,) * 3, (0.5,) * 3, "bicubic")
    data = load(f"folder:{folder}", "all", like=known)
    assert data.image_shape == (24, 24, 3)
    wanted = {(label, torchvisions(image, 24, 0.8, "bicubic").tobytes()) for (label, _), image in seen.items()}
    assert shown(eval_batches(data, 3)) == wanted
    for options, told in (
        ({"like": known, "image_shape": (8, 8, 3)}, "leave image_shape= and resizing= out"),
        ({"like": Preprocessing()}, "like= is a run or a preprocessing that says which"),
        ({"resizing": Resizing()}, "pass both"),
        ({"image_shape": (8, 8, 3), "resizing": 0.9}, "is a jt.data.Resizing, got 0.9"),
    ):
        with pytest.raises(jt.InputError, match=told):
            load(f"folder:{folder}", "all", **options)
    digits = load("digits/upright", "test", image_shape=(16, 16, 3), resizing=Resizing(0.5)).take(3)
    plain = load("digits/upright", "test").take(3)
    for number in range(3):
        image = np.repeat(plain[number]["image"], 3, 2)
        np.testing.assert_array_equal(digits[number]["image"], torchvisions(image, 16, 0.5, "bilinear"))
