import os
import subprocess
import sys

import numpy as np
import pytest

from jaxtransfer.data import digits, load
from jaxtransfer.errors import InputError


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXTRANSFER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tfds" / "digits"


def images_of(dataset):
    return np.stack([example["image"] for example in dataset])


def test_all_digits_are_there_and_splits_are_disjoint():
    from sklearn.datasets import load_digits

    raw = load_digits()
    train, test = digits.split_rows(raw.target)
    assert sorted([*train, *test]) == list(range(1797))
    both = [load("digits/upright", split) for split in ("train", "test")]
    assert [len(dataset) for dataset in both] == [len(train), len(test)] == list(digits.SPLITS.values())
    for dataset, rows in zip(both, (train, test), strict=True):
        assert dataset.image_shape == (8, 8, 1)
        assert dataset.classes == 10
        stored = sorted(zip(map(bytes, images_of(dataset)), dataset.labels, strict=True))
        pixels = np.round(raw.images[rows] * 255 / 16).astype(np.uint8)
        assert stored == sorted(zip(map(bytes, pixels), raw.target[rows], strict=True))
        share = np.bincount(dataset.labels) / np.bincount(raw.target)
        assert share.max() - share.min() < 0.01  # stratified


@pytest.mark.slow
@pytest.mark.parametrize("split", [pytest.param("train", marks=pytest.mark.slow), "test"])
def test_configs_share_rows_in_the_same_order(split):
    sets = {config: load(f"digits/{config}", split) for config in digits.CONFIGS}
    images = {config: images_of(dataset).astype(int) for config, dataset in sets.items()}
    for dataset in sets.values():
        np.testing.assert_array_equal(dataset.labels, sets["upright"].labels)
    upright = images["upright"]
    np.testing.assert_array_equal(images["inverted"], 255 - upright)
    rotated = np.empty_like(upright)
    for row in range(8):
        for column in range(8):
            rotated[:, 7 - column, row] = upright[:, row, column]
    np.testing.assert_array_equal(images["rotated"], rotated)


def test_noise_is_strong_and_leaves_the_digit():
    upright, noisy = (images_of(load(f"digits/{config}", "test")) for config in ("upright", "noisy"))
    difference = noisy.astype(float) - upright
    middle = (upright > 100) & (upright < 160) & (noisy > 0) & (noisy < 255)
    assert 45 < difference[middle].std() < 75  # a quarter of the range, a little clipped
    correlation = np.corrcoef(noisy.ravel(), upright.ravel())[0, 1]
    assert 0.7 < correlation < 0.95


def test_prepared_once_without_leftovers_and_not_in_the_users_folder(empty_cache, tmp_path, monkeypatch):
    users = tmp_path / "users"
    users.mkdir(mode=0o555)
    monkeypatch.setenv("TFDS_DATA_DIR", str(users))
    load("digits/inverted", "train")
    folder = empty_cache / "inverted"
    assert [child.name for child in folder.iterdir()] == ["1.0.0"]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    load("digits/inverted", "test")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert list(users.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param("no metadata", marks=pytest.mark.slow),
        pytest.param("missing shard", marks=pytest.mark.slow),
        "cut shard",
    ],
)
def test_a_damaged_cache_is_replaced(empty_cache, damage):
    expected = images_of(load("digits/upright", "test"))
    folder = empty_cache / "upright" / "1.0.0"
    shard = folder / "digits-test.array_record-00000-of-00001"
    if damage == "no metadata":
        (folder / "dataset_info.json").unlink()
    elif damage == "missing shard":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    np.testing.assert_array_equal(images_of(load("digits/upright", "test")), expected)
    assert [child.name for child in folder.parent.iterdir()] == ["1.0.0"]


def test_the_slower_of_two_processes_discards_its_own(empty_cache, monkeypatch):
    first = digits.prepare("upright")
    before = first.stat().st_ino
    real, answers = digits.is_prepared, [False]  # as it was when the slower process looked
    monkeypatch.setattr(digits, "is_prepared", lambda config: answers.pop() if answers else real(config))
    assert digits.prepare("upright") == first
    assert first.stat().st_ino == before
    assert [child.name for child in first.parent.iterdir()] == ["1.0.0"]


@pytest.mark.slow
def test_two_processes_at_once_and_no_tensorflow(empty_cache):
    script = (
        "import sys\n"
        "from jaxtransfer.data import load\n"
        "sizes = [len(load(f'digits/{c}', 'train')) for c in ('upright', 'rotated', 'inverted', 'noisy')]\n"
        "total = int(load('digits/noisy', 'test').decoded().read(range(596))['image'].sum())\n"
        "print(sizes, total, 'tensorflow' in sys.modules)"
    )
    command = [sys.executable, "-W", "error", "-c", script]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": dict(os.environ)}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    results = [(*process.communicate(timeout=60), process.returncode) for process in processes]
    assert results[0] == results[1]
    output, errors, code = results[0]
    assert (errors, code) == ("", 0)
    assert output.startswith("[1201, 1201, 1201, 1201] ")
    assert output.endswith("False\n")
    assert sorted(path.name for path in empty_cache.glob("*/*")) == ["1.0.0"] * 4


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXTRANSFER_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="set JAXTRANSFER_CACHE to a writable folder"):
        load("digits/upright", "train")


def test_the_cache_follows_the_environment(tmp_path, monkeypatch):
    from jaxtransfer.data.cache import cache_dir

    monkeypatch.setenv("JAXTRANSFER_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("JAXTRANSFER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "jaxtransfer"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "jaxtransfer"
