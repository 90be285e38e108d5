"""Labels and numbers of examples are checked before they are cast: a cast makes a class of anything."""

import numpy as np
import pytest

from jaxtransfer.data import Dataset, pipeline
from jaxtransfer.errors import InputError

IMAGES = np.zeros((8, 4, 4, 1), np.uint8)
WHOLE = np.arange(8)


def arrays(labels, **options):
    return Dataset.from_arrays(IMAGES, labels, **options)


@pytest.mark.parametrize(
    ("dtype", "label"),
    [
        (np.int64, 2**32 + 3),  # int32 makes 3 of it
        (np.int64, -(2**32) + 1),
        (np.uint64, 2**63),
        (np.uint64, 2**64 - 1),
        (np.uint32, 2**32 - 1),
        (np.int8, -1),
        (np.uint8, 8),
    ],
)
def test_a_label_is_checked_as_it_came(dtype, label):
    labels = WHOLE.astype(dtype)
    labels[5] = label
    with pytest.raises(InputError, match=rf"example 5 has label {label}, expected 0 to 7 \(8 classes\)"):
        arrays(labels, class_names="01234567")


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.uint32, np.int64, np.uint64])
def test_labels_of_any_integer_type_are_taken(dtype):
    dataset = arrays(WHOLE.astype(dtype))
    assert dataset.labels.dtype == np.int32
    assert dataset.labels.tolist() == WHOLE.tolist()


def test_ids_that_number_no_classes_ask_for_names():
    labels = WHOLE.copy()
    labels[2] = 2**40  # a name for each number below would fill the memory
    with pytest.raises(InputError, match=r"example 2 has label 1099511627776.*np\.unique"):
        arrays(labels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (WHOLE + 0.9, r"got float64 \[8\]; round them"),
        (WHOLE > 3, r"labels must be integers \[8\].* got bool \[8\]"),
        (np.eye(8, dtype=int), r"got int64 \[8, 8\]; of one-hot labels pass labels\.argmax\(1\)"),
        (WHOLE[:, None], r"got int64 \[8, 1\]; pass labels\[:, 0\]"),
        (WHOLE[:7], r"one per image.* got int64 \[7\]"),
        ([None] * 8, r"got object \[8\]"),
        (["ant", 3] * 4, r"example 1 has label '3'|got object"),
        ([b"ant"] * 8, r"got \|S3 \[8\]"),
        (3, r"got int64 \[\]"),
    ],
)
def test_what_is_no_label_is_refused(labels, message):
    with pytest.raises(InputError, match=message):
        arrays(labels, class_names=("ant", "bee"))


def test_labels_may_be_names():
    words = ["bee", "ant", "cat", "bee", "ant", "ant", "cat", "bee"]
    for labels in (words, np.array(words), np.array(words, object)):
        dataset = arrays(labels)
        assert dataset.class_names == ("ant", "bee", "cat")
        assert dataset.labels.tolist() == [1, 0, 2, 1, 0, 0, 2, 1]
        assert arrays(labels, class_names=("cat", "dog", "bee", "ant")).labels.tolist() == [2, 3, 0, 2, 3, 3, 0, 2]
    with pytest.raises(InputError, match=r"example 2 has label 'cat', which is none of the class_names 'ant', 'bee'"):
        arrays(words, class_names=("ant", "bee"))
    with pytest.raises(InputError, match=r"class_names has 'bee' more than once"):
        arrays(words, class_names=("ant", "bee", "cat", "bee"))


def test_no_rows_make_a_data_set_that_trains_nothing():
    empty = Dataset.from_arrays(IMAGES[:0], [])
    assert (len(empty), empty.classes, empty.labels.dtype) == (0, 0, np.int32)
    assert len(arrays(WHOLE).select([])) == 0
    with pytest.raises(InputError, match="has no examples to train on"):
        pipeline(empty, 4)


@pytest.mark.parametrize("indices", [[0.9], [1.0, 2.0], np.array([np.nan]), WHOLE > 3, ["1"], [None]])
def test_select_and_read_take_whole_numbers(indices):
    with pytest.raises(InputError, match=r"select takes whole numbers of examples, got"):
        arrays(WHOLE).select(indices)
    with pytest.raises(InputError, match=r"read takes whole numbers of examples, got"):
        arrays(WHOLE).read(indices)


def test_a_mask_is_told_how_to_become_numbers():
    data = arrays(WHOLE)
    with pytest.raises(InputError, match=r"of a mask np\.flatnonzero\(mask\)"):
        data.select(data.labels == 3)
    assert data.select(np.flatnonzero(data.labels == 3)).labels.tolist() == [3]
    assert data.select(np.array([7, 0], np.uint8)).labels.tolist() == [7, 0]


def test_counts_are_whole_too():
    data = arrays(WHOLE % 2)
    for call in (lambda: data.take(2.5), lambda: data.subset(per_class=1.5), lambda: data[2.5]):
        with pytest.raises(InputError, match=r"whole numbers of examples, got float64"):
            call()
    assert data.take(np.int64(3)).labels.tolist() == [0, 1, 0]


class Given:
    """A source of someone else's."""

    def __init__(self, labels):
        self.given = labels

    def __len__(self):
        return len(self.given)

    def __getitem__(self, index):
        return {"image": IMAGES[index], "label": self.given[index]}

    def many(self, indices):
        return [self[int(index)] for index in indices]

    def read_labels(self):
        return np.array(self.given)


@pytest.mark.parametrize("labels", [[0.9] * 8, [[0, 1]] * 8, ["ant"] * 8])
def test_a_source_gives_whole_numbers(labels):
    data = Dataset("given", "train", ("ant", "bee"), (4, 4, 1), Given(labels))
    for read in (lambda: data.labels, lambda: data[0], data.decoded, lambda: pipeline(data, 4, cache=None).batch(0)):
        with pytest.raises(
            InputError, match=r"given \(train\): example \d has the label .*, expected one whole number"
        ):
            read()


def test_numbers_given_as_class_names_are_names():
    dataset = arrays(WHOLE % 3, class_names=[10, 2, 1])
    assert dataset.class_names == ("10", "2", "1")
    assert dataset.as_classes(("1", "2", "10", "3")).labels.tolist() == [2, 1, 0, 2, 1, 0, 2, 1]
