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
