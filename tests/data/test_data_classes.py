"""Classes are found by their names, whatever the order in which either side counts them."""

import cv2
import numpy as np
import pytest

import jaxtransfer as jt
from jaxtransfer.data.classes import match_classes


@pytest.mark.parametrize(
    ("names", "known", "places", "by_number"),
    [
        ("cat dog eel", "cat dog eel", [0, 1, 2], False),
        ("eel cat dog", "cat dog eel", [2, 0, 1], False),
        ("dog", "cat dog eel", [1], False),
        ("ant dog", "cat dog eel", [-1, 1], False),
        ("0 1 10 11 2", "0 1 2 10 11", [0, 1, 3, 4, 2], False),
        ("00 01 02", "2 1 0", [2, 1, 0], False),  # one number, written otherwise
        ("3 7", "0 1 2 3 4 5 6 7", [3, 7], False),
        ("0 1 2", "cat dog eel", [0, 1, 2], True),
        ("0 2 1", "cat dog eel", [0, 2, 1], True),  # the data sort as they like; the number is in the name
        ("cat dog eel", "2 0 1", [1, 2, 0], True),
        ("3 7", "cat dog", [-1, -1], False),  # names, if strange ones
        ("0 dog", "cat dog", [-1, 1], False),
    ],
)
def test_names_beat_numbers(names, known, places, by_number):
    found = match_classes(names.split(), known.split(), of="data", whose="run")
    assert found.places.tolist() == places
    assert found.by_number is by_number
    assert found.same == (places == list(range(len(known.split()))))


@pytest.mark.parametrize(
    ("names", "known", "why"),
    [
        ("0 1", "cat dog eel", "data has numbers for names, and data has 2 classes, run 3; name the classes alike"),
        ("cat dog", "0 1 2", "run has numbers for names, and data has 2 classes, run 3"),
        ("cat dog", "cat dog dog", "two of run or of data are called 'dog'"),
    ],
)
def test_where_names_do_not_tell(names, known, why):
    with pytest.raises(jt.InputError, match=why):
        match_classes(names.split(), known.split(), of="data", whose="run")


def _dataset(tmp_path=None):
    images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1)
    return jt.data.Dataset.from_arrays(images, np.array([0, 1, 2, 2, 1, 0]), class_names=["eel", "cat", "dog"])


def test_a_data_set_in_the_classes_of_another():
    theirs = ("ant", "bee", "cat", "dog", "eel")
    data = _dataset().select([5, 0, 1, 3])
    for asked in (data.as_classes(theirs), data.as_classes(theirs).decoded(), data.decoded().as_classes(theirs)):
        assert asked.class_names == theirs
        assert asked.labels.tolist() == [4, 4, 2, 3]
        assert asked.read([3, 2])["label"].tolist() == [3, 2]
        assert asked[1]["label"] == 4
        assert asked.select([2]).labels.tolist() == [2]
        np.testing.assert_array_equal(asked.read(np.arange(4))["image"].ravel(), [5, 0, 1, 3])
    assert data.labels.tolist() == [0, 0, 1, 2]
    back = data.as_classes(theirs).as_classes(("dog", "cat", "eel"))
    assert back.labels.tolist() == [2, 2, 1, 0]


def test_only_classes_that_occur_must_be_known():
    data = _dataset()
    assert data.select([0, 5]).as_classes(["eel"]).labels.tolist() == [0, 0]
    with pytest.raises(jt.InputError, match=r"runs/a has no class 'dog' \(did you mean 'dogs'\?\), which arrays"):
        data.as_classes(["dogs", "cat", "eel"], whose="runs/a")


def test_files_in_the_classes_of_another(tmp_path, rng):
    for name in ("cat", "dog", "eel"):
        (tmp_path / name).mkdir()
        for number in range(4):
            assert cv2.imwrite(str(tmp_path / name / f"{number}.png"), rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    data = jt.data.load(f"folder:{tmp_path}", "all")
    asked = data.as_classes(["eel", "other", "cat", "dog"])
    expected = [{"cat": 2, "dog": 3, "eel": 0}[data.class_names[label]] for label in data.labels]
    assert asked.labels.tolist() == expected
    assert asked.read(np.arange(12))["label"].tolist() == expected
    assert asked[5]["label"] == expected[5]
    assert asked.decoded().labels.tolist() == expected
    np.testing.assert_array_equal(asked.read([7])["image"], data.read([7])["image"])
