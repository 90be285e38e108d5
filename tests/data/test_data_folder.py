import logging
import os
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from jaxtransfer.data import load
from jaxtransfer.errors import InputError


def write(path, shape=(6, 5, 3), seed=0):
    """Writes a random image and returns it in RGB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    cv2.imwrite(str(path), image[..., ::-1])
    return image


def tree(root, names, files=10):
    for number, name in enumerate(names):
        for file in range(files):
            write(root / name / f"{name.replace('/', '-')}-{file}.png", seed=100 * number + file)


def test_split_folders_share_their_classes(tmp_path):
    tree(tmp_path, ["train/dog", "train/cat", "train/.hidden", "test/cat", "test/emu"], files=3)
    (tmp_path / "train" / "notes.txt").write_text("no image")
    (tmp_path / "test" / "cat" / "notes.txt").write_text("no image")
    train, test = (load(f"folder:{tmp_path}", split) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("cat", "dog", "emu")
    assert np.bincount(train.labels, minlength=3).tolist() == [3, 3, 0]
    assert np.bincount(test.labels, minlength=3).tolist() == [3, 0, 3]
    assert train.image_shape == (6, 5, 3)


def test_class_folders_split_deterministically_and_stratified(tmp_path):
    tree(tmp_path, ["a", "b", "c"])
    every, train, test = (load(f"folder:{tmp_path}", split) for split in ("all", "train", "test"))
    names = [{path.name for path, _ in dataset.source.files} for dataset in (every, train, test)]
    assert names[1] | names[2] == names[0]
    assert not names[1] & names[2]
    assert np.bincount(train.labels).tolist() == [8, 8, 8]
    assert np.bincount(test.labels).tolist() == [2, 2, 2]
    tree(tmp_path / "copy", ["c", "b", "a"])  # other contents, same names
    again = load(f"folder:{tmp_path / 'copy'}", "test")
    assert {path.name for path, _ in again.source.files} == names[2]
    assert len(set(every.labels[:10])) == 3  # a slice mixes the classes


def test_slices(tmp_path):
    tree(tmp_path, ["a", "b"])
    files = lambda split: [path for path, _ in load(f"folder:{tmp_path}", split).source.files]  # noqa: E731
    whole = files("all")
    assert files("all[:5]") == whole[:5]
    assert files("all[-3:]") == whole[-3:]
    assert files("all[25%:50%]") == whole[5:10]
    assert files("all[:25%]") + files("all[25%:]") == whole


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "jpg", "JPEG"])
def test_formats_decode_to_rgb(tmp_path, suffix):
    path = tmp_path / "a" / f"x.{suffix}"
    path.parent.mkdir()
    image = np.zeros((16, 16, 3), np.uint8)
    image[..., 0] = 250
    cv2.imwrite(str(path), image[..., ::-1])
    example = load(f"folder:{tmp_path}", "all")[0]
    assert example["label"] == 0
    np.testing.assert_allclose(example["image"].astype(int), image, atol=20)


def test_pixels_are_those_of_the_file(tmp_path):
    image = write(tmp_path / "a" / "x.png")
    np.testing.assert_array_equal(load(f"folder:{tmp_path}", "all")[0]["image"], image)


def test_ragged_sizes_need_a_shape(tmp_path):
    write(tmp_path / "a" / "x.png", (6, 5, 3))
    write(tmp_path / "a" / "y.png", (9, 9, 3))
    with pytest.raises(InputError, match="pass image_shape"):
        load(f"folder:{tmp_path}", "all").decoded()
    assert load(f"folder:{tmp_path}", "all", image_shape=(4, 4, 1)).decoded().source.images.shape == (
        2,
        4,
        4,
        1,
    )


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\nnothing"])
def test_a_corrupt_image_is_named(tmp_path, content):
    tree(tmp_path, ["a"], files=3)
    (tmp_path / "a" / "broken.png").write_bytes(content)
    with pytest.raises(InputError, match=r"cannot decode the image .*broken\.png"):
        load(f"folder:{tmp_path}", "all").decoded()


def test_unusable_folders(tmp_path):
    with pytest.raises(InputError, match="there is no folder"):
        load(f"folder:{tmp_path / 'missing'}", "all")
    with pytest.raises(InputError, match="no images in"):
        load(f"folder:{tmp_path}", "all")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("no image")
    with pytest.raises(InputError, match="no images in"):
        load(f"folder:{tmp_path}", "all")
    tree(tmp_path, ["a"], files=3)
    with pytest.raises(InputError, match=r"unknown split .*'tests' \(did you mean 'test'\?\); known: all, test, train"):
        load(f"folder:{tmp_path}", "tests")
    with pytest.raises(InputError, match="no images in split 'test'"):
        load(f"folder:{tmp_path}", "test")
    with pytest.raises(InputError, match="cannot read the split"):
        load(f"folder:{tmp_path}", "all[1")
    with pytest.raises(InputError, match="image_shape must be"):
        load(f"folder:{tmp_path}", "all", image_shape=(8, 8))


def names_of(dataset):
    return sorted(path.name for path, _ in dataset.source.files)


@pytest.mark.parametrize("suffix", ["tif", "TIFF", "ppm", "pgm", "pbm", "gif", "jpe", "dib"])
def test_all_kinds_that_the_decoder_reads_are_found(tmp_path, suffix, caplog):
    tree(tmp_path, ["ant"], files=2)
    image = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    if not cv2.haveImageWriter(f".{suffix}"):
        pytest.skip("this OpenCV was built without it")
    grey = suffix in ("pgm", "pbm")
    name = f".{'gif' if suffix == 'gif' else suffix.lower()}"
    (tmp_path / "bee").mkdir()
    (tmp_path / "bee" / f"x.{suffix}").write_bytes(cv2.imencode(name, image[..., 0] if grey else image)[1].tobytes())
    data = load(f"folder:{tmp_path}", "all")
    assert np.bincount(data.labels).tolist() == [2, 1]
    assert data.decoded().source.images.shape == (3, 6, 5, 3)
    assert not caplog.records


@pytest.mark.parametrize("splits", [True, False])
def test_images_further_inside_belong_to_their_class(tmp_path, splits):
    for part in ("train/", "test/") if splits else ("",):
        tree(tmp_path, [f"{part}ant", f"{part}bee/day1", f"{part}bee/day2/morning", f"{part}cat/day1"], files=4)
    for split in ("train", "test"):
        data = load(f"folder:{tmp_path}", split)
        assert data.class_names == ("ant", "bee", "cat")
        if splits:
            assert np.bincount(data.labels).tolist() == [4, 8, 4]
    if not splits:
        assert np.bincount(load(f"folder:{tmp_path}", "all").labels).tolist() == [4, 8, 4]


def test_one_image_further_inside_makes_no_splits_of_classes(tmp_path):
    tree(tmp_path, ["ant", "bee"], files=10)
    before = [path for path, _ in load(f"folder:{tmp_path}", "train").source.files]
    write(tmp_path / "bee" / "more" / "x.png")
    data = load(f"folder:{tmp_path}", "train")
    assert data.class_names == ("ant", "bee")
    assert [path for path, _ in data.source.files if path.name != "x.png"] == before


def test_files_of_one_name_in_two_folders_are_two_examples(tmp_path):
    for day in range(3):
        write(tmp_path / "ant" / f"day{day}" / "1.png", seed=day)
    every = load(f"folder:{tmp_path}", "all")
    assert len(every) == 3
    assert len({bytes(every[i]["image"]) for i in range(3)}) == 3


def test_folders_of_folders_are_splits_where_one_is_asked_for(tmp_path, caplog):
    tree(tmp_path, ["amazon/ant", "amazon/bee", "webcam/ant"], files=3)
    data = load(f"folder:{tmp_path}", "amazon[:50%]")
    assert (data.class_names, len(data)) == (("ant", "bee"), 3)
    assert not caplog.records
    assert load(f"folder:{tmp_path}", "all").class_names == ("amazon", "webcam")
    assert "'amazon', 'webcam' are taken as classes, as there is no split 'all'" in caplog.text


def test_a_split_beside_a_class_is_refused(tmp_path):
    tree(tmp_path, ["train/ant", "car"], files=2)
    with pytest.raises(
        InputError, match=r"class folders in 'train' and images in 'car', a split and a class side by side"
    ):
        load(f"folder:{tmp_path}", "train")


def test_a_stray_image_does_not_make_classes_of_splits(tmp_path, caplog):
    tree(tmp_path, ["train/ant", "train/bee", "test/ant"], files=3)
    write(tmp_path / "train" / "overview.png")
    write(tmp_path / "overview.png")
    data = load(f"folder:{tmp_path}", "train")
    assert (data.class_names, len(data)) == (("ant", "bee"), 6)
    assert "train): 1 files are left out: 1 in no class folder" in caplog.text
    assert "train/overview.png" in caplog.text


def test_a_class_called_as_a_split_stays_a_class(tmp_path):
    tree(tmp_path, ["train", "car", "bus"], files=5)
    assert load(f"folder:{tmp_path}", "train").class_names == ("bus", "car", "train")


@pytest.mark.parametrize("where", ["", "train/"])
def test_a_class_without_images_is_an_error(tmp_path, where):
    tree(tmp_path, [f"{where}ant", f"{where}bee"], files=5)
    (tmp_path / where / "cat").mkdir()
    (tmp_path / where / "cat" / "x.svg").write_text("no image")
    with pytest.raises(InputError, match=r"the class 'cat' has no images in .*; remove its folder, or bring its files"):
        load(f"folder:{tmp_path}", "train")


def test_a_class_without_images_in_the_asked_split_is_an_error(tmp_path):
    tree(tmp_path, ["train/ant", "train/bee", "test/ant"], files=3)
    (tmp_path / "test" / "bee").mkdir()
    assert len(load(f"folder:{tmp_path}", "train")) == 6
    with pytest.raises(InputError, match=r"the class 'bee' has no images in the split 'test' of"):
        load(f"folder:{tmp_path}", "test")


def test_what_is_left_out_is_counted_and_said(tmp_path, caplog):
    tree(tmp_path, ["ant", "bee"], files=3)
    for name in ("a.txt", "b.txt", "c.heic", "README", "._0.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / "ant" / name).write_text("no image")
    (tmp_path / "__MACOSX" / "ant").mkdir(parents=True)
    write(tmp_path / "__MACOSX" / "ant" / "x.png")
    (tmp_path / "ant" / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "bee" / "pipe.png")
    caplog.set_level(logging.WARNING, "jaxtransfer")
    begin = time.monotonic()
    data = load(f"folder:{tmp_path}", "all").decoded()
    assert time.monotonic() - begin < 10
    assert (data.class_names, len(data)) == (("ant", "bee"), 6)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"folder:{tmp_path}: 6 files are left out: ")
    for part in ("2 with .txt (", "ant/a.txt)", "1 with .heic (", "2 that are no files (", "1 without a suffix ("):
        assert part in line


def test_links_are_followed_and_may_lead_up(tmp_path):
    tree(tmp_path / "store", ["ants"], files=4)
    tree(tmp_path / "images", ["bee"], files=2)
    (tmp_path / "images" / "ant").symlink_to(tmp_path / "store" / "ants")
    (tmp_path / "images" / "bee" / "up").symlink_to(tmp_path / "images")  # for ever, if one went on
    (tmp_path / "images" / "bee" / "x.png").symlink_to(tmp_path / "store" / "ants" / "ants-0.png")
    data = load(f"folder:{tmp_path / 'images'}", "all")
    assert data.class_names == ("ant", "bee")
    assert np.bincount(data.labels).tolist() == [4, 3]


def test_links_that_lead_to_themselves_are_left_out(tmp_path, caplog):
    tree(tmp_path, ["ant", "bee"], files=2)
    for path in (tmp_path / "ant" / "x.png", tmp_path / "ant" / "further", tmp_path / "cat"):
        path.symlink_to(path.name)
    data = load(f"folder:{tmp_path}", "all")
    assert (len(data), data.class_names) == (4, ("ant", "bee"))
    assert "3 files are left out" in caplog.text


@pytest.mark.parametrize("beside", ["labels/train/1.txt", "notes/ant/1.csv", "drafts/cat/more/x.txt"])
def test_folders_without_images_beside_splits_are_no_splits(beside, tmp_path):
    tree(tmp_path, ["train/ant", "train/bee", "test/ant"], files=2)
    (tmp_path / beside).parent.mkdir(parents=True)
    (tmp_path / beside).write_text("0 0.5 0.5")
    train = load(f"folder:{tmp_path}", "train")
    assert (len(train), train.class_names) == (4, ("ant", "bee"))
    with pytest.raises(InputError, match="known: test, train"):
        load(f"folder:{tmp_path}", "val")


def test_classes_are_in_plain_order(tmp_path):
    tree(tmp_path, ["10", "2", "1", "B", "a"], files=1)
    assert load(f"folder:{tmp_path}", "all").class_names == ("1", "10", "2", "B", "a")


def test_names_that_are_no_utf8(tmp_path):
    write(tmp_path / "bee" / "x.png")
    image = (tmp_path / "bee" / "x.png").read_bytes()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/bee/caf\xe9.png")).write_bytes(image)  # of files they are no matter
    assert len(load(f"folder:{tmp_path}", "all").decoded()) == 2
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    (folder / "x.png").write_bytes(image)
    with pytest.raises(InputError, match=r"the class folder .*caf\\xe9 is not UTF-8.*rename it"):
        load(f"folder:{tmp_path}", "all")


def test_a_folder_whose_own_path_is_no_utf8(tmp_path):
    write(tmp_path / "plain" / "bee" / "x.png")
    folder = (tmp_path / "plain").rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    with pytest.raises(InputError, match=r"the name of the data, folder:.*caf\\xe9, is not UTF-8.*lay a link to it"):
        load(f"folder:{folder}", "all")
    (tmp_path / "cafe").symlink_to(folder)
    assert len(load(f"folder:{tmp_path / 'cafe'}", "all").decoded()) == 1


def test_half_a_character_in_a_name():
    """What JSON can hold and no file system."""
    for name in ("\ud800", "folder:\ud800"):
        with pytest.raises(InputError, match=r"\\ud800, is not UTF-8"):
            load(name, "train")


@pytest.mark.parametrize("name", ["~nosuchuser", "~nosuchuser/images"])
def test_the_home_of_nobody(name):
    with pytest.raises(InputError, match=r"there is no home folder of '~nosuchuser' for ~nosuchuser"):
        load(f"folder:{name}", "train")
    with pytest.raises(InputError, match=r"there is no home folder of '~nosuchuser' for ~nosuchuser"):
        load("mnist", "train", data_dir=name)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", ""])
def test_paths_that_no_folder_has(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"there is no folder|no images in"):
        load(f"folder:{name}", "train")


def test_alpha_is_kept_where_it_is_asked_for(tmp_path):
    rgba = np.random.default_rng(0).integers(0, 256, (6, 5, 4), dtype=np.uint8)
    (tmp_path / "ant").mkdir()
    cv2.imwrite(str(tmp_path / "ant" / "x.png"), rgba[..., [2, 1, 0, 3]])
    data = load(f"folder:{tmp_path}", "all", image_shape=(6, 5, 4))
    np.testing.assert_array_equal(data[0]["image"], rgba)
    assert load(f"folder:{tmp_path}", "all").image_shape == (6, 5, 3)
