"""What tells one data set from another: the same for copies, another for whatever training would see differently."""

import json
import os
import shutil
import time

import cv2
import numpy as np
import pytest

import jaxtransfer as jt

fingerprint = jt.data.fingerprint


@pytest.fixture
def folder(tmp_path):
    """Two classes of six BMP images each: files of one size, one border, with the same names in both classes."""
    rng = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(6):
            image = np.full((64, 64, 3), 255, np.uint8)
            image[20:44, 20:44] = rng.integers(0, 256, (24, 24, 3))
            cv2.imwrite(str(tmp_path / "images" / name / f"{number}.bmp"), image)
    return tmp_path / "images"


def of(folder, split="all"):
    return fingerprint(jt.data.load(f"folder:{folder}", split))


def changed(before, after):
    return {part for part in before.keys() | after.keys() if before.get(part) != after.get(part)}


def test_a_copy_elsewhere_and_later_is_the_same(folder, tmp_path):
    before = of(folder)
    shutil.copytree(folder, tmp_path / "copy")
    for file in (tmp_path / "copy").rglob("*.bmp"):
        os.utime(file, (1, 1))
    assert of(tmp_path / "copy") == before
    assert json.loads(json.dumps(before)) == before


def test_files_swapped_between_classes_are_seen(folder):
    before = of(folder)
    a, b = folder / "ant" / "3.bmp", folder / "bee" / "3.bmp"
    assert a.stat().st_size == b.stat().st_size
    one, other = a.read_bytes(), b.read_bytes()
    a.write_bytes(other)
    b.write_bytes(one)
    assert changed(before, of(folder)) == {"images"}


def test_each_change_of_a_folder_shows_in_its_part(folder, tmp_path):
    before = of(folder)
    (folder / "ant" / "0.bmp").rename(folder / "ant" / "9.bmp")
    assert changed(before, of(folder)) >= {"images"}
    (folder / "ant" / "9.bmp").rename(folder / "ant" / "0.bmp")
    (folder / "bee").rename(folder / "wasp")
    assert changed(before, of(folder)) >= {"class_names"}
    (folder / "wasp").rename(folder / "bee")
    assert of(folder) == before
    (folder / "ant" / "5.bmp").rename(folder / "bee" / "6.bmp")
    assert changed(before, of(folder)) >= {"labels", "images"}
    (folder / "bee" / "6.bmp").unlink()
    assert changed(before, of(folder)) >= {"labels", "images", "examples"}
    assert changed(before, of(folder, "all[:3]")) >= {"split", "examples"}


def test_decoding_and_choosing_do_not_change_what_the_data_are(folder):
    data = jt.data.load(f"folder:{folder}", "all")
    for dataset in (data, jt.data.load("digits/upright", "test").take(40)):
        assert fingerprint(dataset) == fingerprint(dataset.decoded())
        few = dataset.select([7, 3, 5])
        assert fingerprint(few) == fingerprint(dataset.decoded().select([7, 3, 5]))
        assert fingerprint(few) == fingerprint(dataset.decoded().select([1, 7, 3, 5]).decoded().select([1, 2, 3]))
        assert changed(fingerprint(few), fingerprint(dataset.select([3, 7, 5]))) & {"images", "rows"}


def test_every_byte_and_label_of_arrays_counts(numbered):
    data = numbered(50)
    before = fingerprint(data)
    images, labels = data.source.images.copy(), data.labels.copy()
    assert fingerprint(jt.data.Dataset.from_arrays(images, labels, class_names=data.class_names)) == before
    images[31, 4, 2, 1] ^= 1
    after = fingerprint(jt.data.Dataset.from_arrays(images, labels, class_names=data.class_names))
    assert changed(before, after) == {"images"}
    labels[[3, 4]] = labels[[4, 3]]
    after = fingerprint(jt.data.Dataset.from_arrays(data.source.images, labels, class_names=data.class_names))
    assert changed(before, after) == {"labels"}
    numbers = fingerprint(data.with_columns({"number": np.arange(50)}))
    assert changed(before, numbers) == {"columns"}
    assert numbers != fingerprint(data.with_columns({"number": np.arange(50) + 1}))
    assert changed(numbers, fingerprint(data.with_columns({"text": np.array(["a"] * 50, object)}))) == {"columns"}


def test_tfds_sets_are_known_by_version_files_and_rows(tmp_path):
    train, test = (jt.data.load("digits/upright", split) for split in ("train", "test"))
    assert fingerprint(train)["data"] == "digits/upright/1.0.0"
    assert changed(fingerprint(train), fingerprint(test)) == {"split", "examples", "records", "rows"}
    noisy = jt.data.load("digits/noisy", "train")
    assert changed(fingerprint(train), fingerprint(noisy)) == {"data", "records"}
    assert changed(fingerprint(train), fingerprint(train.subset(per_class=2))) == {"examples", "rows"}


def test_it_costs_little_per_file(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for number in range(1000):
            (tmp_path / name / f"{number}.png").write_bytes(bytes(2000))
    cv2.imwrite(str(tmp_path / "ant" / "0.png"), np.zeros((8, 8, 3), np.uint8))
    data = jt.data.load(f"folder:{tmp_path}", "all", image_shape=(8, 8, 3))
    begin = time.process_time()
    fingerprint(data)
    assert time.process_time() - begin < 0.2  # 2,000 files; measured 0.02 s


def test_a_file_that_is_gone_is_named(folder):
    data = jt.data.load(f"folder:{folder}", "all")
    (folder / "bee" / "2.bmp").unlink()
    with pytest.raises(jt.InputError, match=r"cannot read .*bee/2\.bmp: No such file"):
        fingerprint(data)
