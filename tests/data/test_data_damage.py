"""Files that are not what was written, and folders that ask for code: one clear error, or mended."""

import errno
import json
import os
import shutil
import signal
import sys

import numpy as np
import pytest

from jaxtransfer.data import available, digits, load, pipeline, prepared
from jaxtransfer.errors import InputError


@pytest.fixture
def letters(tmp_path):
    """A tfds folder with one data set in no catalogue: the digits under another name."""
    folder = tmp_path / "tfds" / "letters" / "1.0.0"
    shutil.copytree(digits.prepare("upright"), folder)
    return folder


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def flip(path, share):
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("share", [0.05, 0.55, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.3, 0.7))])
def test_a_flipped_bit_names_the_file_and_the_example(letters, share):
    whole = load("letters", "train", data_dir=letters.parent.parent).decoded()
    flip(letters / "digits-train.array_record-00000-of-00001", share)
    data = load("letters", "train", data_dir=letters.parent.parent)
    with pytest.raises(InputError, match=r"is damaged: Corrupted Riegeli/records file") as raised:
        data.decoded()
    message = str(raised.value)
    assert "digits-train.array_record-00000-of-00001" in message
    number = int(message.split("example ")[1].split()[0])
    with pytest.raises(InputError, match=rf"example {number} of digits/upright/1\.0\.0 in"):
        data[number]
    np.testing.assert_array_equal(data[number - 1]["image"], whole[number - 1]["image"])  # it, and no other one
    with pytest.raises(InputError, match=rf"example {number} of"):
        _ = data.labels
    stream = pipeline(data, 1201, cache=None).iterate()
    with pytest.raises(InputError, match=rf"example {number} of"):  # from a thread that reads ahead
        next(stream)


def test_the_file_is_the_one_of_the_example(letters):
    flip(letters / "digits-test.array_record-00000-of-00001", 0.5)
    data = load("letters", "train[:10]+test", data_dir=letters.parent.parent)
    with pytest.raises(InputError, match=r"in .*digits-test\.array_record-00000-of-00001 is damaged"):
        data.decoded()


@pytest.mark.slow
@pytest.mark.parametrize(
    "file",
    [
        "digits-train.array_record-00000-of-00001",
        "features.json",
        pytest.param("dataset_info.json", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_cache_of_the_digits_is_prepared_anew(tmp_path, monkeypatch, file):
    monkeypatch.setenv("JAXTRANSFER_CACHE", str(tmp_path))
    whole = load("digits/inverted", "train").decoded()
    folder = digits.prepare("inverted")
    for damage in (lambda path: flip(path, 0.5), lambda path: path.write_bytes(path.read_bytes()[:-7]), os.remove):
        damage(folder / file)
        np.testing.assert_array_equal(load("digits/inverted", "train").decoded().source.images, whole.source.images)
    if file == "features.json":
        edit(
            folder / file, lambda spec: spec["featuresDict"]["features"]["label"]["classLabel"].update(numClasses="12")
        )
        assert load("digits/inverted", "train").classes == 10


@pytest.mark.slow
def test_a_cache_of_an_earlier_version_serves_where_it_is_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXTRANSFER_CACHE", str(tmp_path))
    folder = digits.prepare("upright")
    os.remove(folder / "digest.sha256")
    assert digits.is_prepared("upright")
    flip(folder / "digits-test.array_record-00000-of-00001", 0.5)
    assert not digits.is_prepared("upright")
    assert len(load("digits/upright", "test").decoded()) == 596


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXTRANSFER_CACHE", str(tmp_path))

    def full(self, **options):
        raise RuntimeError(f"Failed to write: {os.strerror(errno.ENOSPC)} [type.googleapis.com/...]\nmore")

    monkeypatch.setattr(digits.Digits, "download_and_prepare", full)
    with pytest.raises(
        InputError,
        match=r"cannot prepare digits/upright in .*: No space left on device; free some space .*JAXTRANSFER_CACHE",
    ) as raised:
        load("digits/upright", "train")
    assert "\n" not in str(raised.value)
    assert list((tmp_path / "tfds" / "digits" / "upright").iterdir()) == []


EVIL = "evil_features.Feature"


def planted(spec):
    spec["featuresDict"]["features"]["label"]["pythonClassName"] = EVIL


def planted_by_its_other_name(spec):
    label = spec["featuresDict"]["features"]["label"]
    del label["pythonClassName"]
    label["python_class_name"] = EVIL


def planted_in_a_text(spec):
    inner = {"type": EVIL, "content": {}}
    outer = {"type": "tensorflow_datasets.core.features.sequence_feature.Sequence"}
    content = {"feature": {**outer, "content": {"feature": inner, "length": None}}, "length": None}
    spec["featuresDict"]["features"]["more"] = {
        "pythonClassName": "tensorflow_datasets.core.features.sequence_feature.Sequence",
        "jsonFeature": {"json": json.dumps(content)},
    }


def planted_at_the_top(spec):
    spec.clear()
    spec.update({"type": EVIL, "content": {}})


def planted_nearby(spec):
    spec["featuresDict"]["features"]["label"]["pythonClassName"] = (
        "tensorflow_datasets_core.features.evil_features.Feature"
    )


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module on the path that leaves a file behind where it is imported."""
    (tmp_path / "modules").mkdir()
    trace = tmp_path / "trace"
    (tmp_path / "modules" / "evil_features.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield trace
    sys.modules.pop("evil_features", None)


@pytest.mark.parametrize(
    "plant", [planted, planted_by_its_other_name, planted_in_a_text, planted_at_the_top, planted_nearby]
)
def test_a_folder_that_names_a_class_of_someone_elses_runs_nothing(letters, evil, plant):
    edit(letters / "features.json", plant)
    root = letters.parent.parent
    for name in ("letters", "letters:1.0.0", "letters:1.*.*"):
        with pytest.raises(InputError, match=r"features\.json names the class '.*evil_features\.Feature'"):
            load(name, "train", data_dir=root)
    entry = {entry.name: entry for entry in available(root)}["letters"]
    assert "evil_features.Feature" in entry.note
    assert entry.classes is None
    assert not evil.exists()


@pytest.mark.parametrize("content", ["{", "7", "[]", "null", '{"featuresDict": 3}', "\x00", "[" * 100_000])
def test_features_of_another_shape(letters, content):
    (letters / "features.json").write_text(content)
    with pytest.raises(InputError, match="letters"):
        load("letters", "train", data_dir=letters.parent.parent)
    assert {entry.name: entry for entry in available(letters.parent.parent)}["letters"].note


def test_a_pipe_in_the_place_of_features_is_refused_at_once(letters):
    (letters / "features.json").unlink()
    os.mkfifo(letters / "features.json")

    def waited(*_):
        raise TimeoutError("it waits for a writer")

    before = signal.signal(signal.SIGALRM, waited)
    signal.alarm(30)
    try:
        with pytest.raises(InputError, match=r"features\.json is a named pipe, expected a regular file"):
            load("letters", "train", data_dir=letters.parent.parent)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_several_labels_per_image_are_refused(letters):
    def several(spec):
        features = spec["featuresDict"]["features"]
        features["label"] = {
            "pythonClassName": "tensorflow_datasets.core.features.sequence_feature.Sequence",
            "sequence": {"feature": features["label"], "length": "-1"},
        }

    edit(letters / "features.json", several)
    with pytest.raises(
        InputError, match=r"letters has several labels per image, feature 'label' is of shape \(None,\)"
    ):
        load("letters", "train", data_dir=letters.parent.parent)
    assert "several labels per image" in {e.name: e for e in available(letters.parent.parent)}["letters"].note


@pytest.mark.slow
def test_checks_of_features_take_what_tfds_itself_writes():
    from jaxtransfer.data.builders import check_features

    for config in digits.CONFIGS:
        check_features(digits.prepare(config))
    if data := os.environ.get("TFDS_DATA_DIR"):
        from pathlib import Path

        for folder in prepared.prepared_sets(Path(data)).values():
            check_features(folder)
