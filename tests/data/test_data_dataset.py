import dataclasses

import numpy as np
import pytest

from jaxtransfer.data import Dataset
from jaxtransfer.errors import InputError


class ListSource:
    """Examples one by one, with a count of what was read."""

    def __init__(self, images, labels):
        self.images, self.labels, self.label_reads = images, labels, 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "label": self.labels[index]}

    def many(self, indices):
        return [self[int(index)] for index in indices]

    def read_labels(self):
        self.label_reads += 1
        return np.array(self.labels)


def listed(images, labels, classes=3, shape=(6, 5, 3)):
    return Dataset("listed", "train", tuple("abc"[:classes]), shape, ListSource(images, labels))


def random_images(n, shape=(6, 5, 3)):
    return list(np.random.default_rng(n).integers(0, 256, (n, *shape), dtype=np.uint8))


def test_examples_attributes_and_iteration(numbered):
    dataset = numbered(7)
    assert (len(dataset), dataset.classes, dataset.image_shape) == (7, 3, (6, 5, 3))
    assert dataset.class_names == ("class0", "class1", "class2")
    example = dataset[4]
    assert example["image"].dtype == np.uint8
    assert example["label"] == 1
    assert isinstance(example["label"], int)
    assert len(list(dataset)) == 7
    np.testing.assert_array_equal(dataset[-1]["image"], dataset[6]["image"])
    with pytest.raises(IndexError):
        dataset[7]


def test_labels_are_read_once_as_int32():
    dataset = listed(random_images(5), [0, 2, 1, 0, 1])
    np.testing.assert_array_equal(dataset.labels, [0, 2, 1, 0, 1])
    assert dataset.labels.dtype == np.int32
    assert dataset.labels is dataset.labels
    assert dataset.source.label_reads == 1


def test_select_and_take_compose(numbered, numbers):
    dataset = numbered(10).select([9, 3, 3, 5]).select([2, 0])
    assert numbers(dataset.read([0, 1])).tolist() == [3, 9]
    assert dataset.labels.tolist() == [0, 0]
    assert len(numbered(10).take(4)) == 4
    assert len(numbered(10).take(40)) == 10
    for indices in ([10], [-1]):
        with pytest.raises(InputError, match="it has 10"):
            numbered(10).select(indices)


def test_subset_has_n_per_class_is_seeded_and_nested(numbered, numbers):
    dataset = numbered(60)
    chosen = dataset.subset(per_class=5, seed=3)
    assert np.bincount(chosen.labels).tolist() == [5, 5, 5]
    rows = numbers(chosen.read(range(15)))
    assert len(set(rows)) == 15
    assert sorted(rows) == rows.tolist()
    np.testing.assert_array_equal(dataset.subset(per_class=5, seed=3).rows, chosen.rows)
    assert set(dataset.subset(per_class=2, seed=3).rows) < set(chosen.rows)
    assert set(dataset.subset(per_class=5, seed=4).rows) != set(chosen.rows)


def test_subset_names_the_class_with_too_few(numbered):
    with pytest.raises(InputError, match=r"class 'class1' has 3 examples, 4 per class asked"):
        numbered(10).subset(per_class=4)
    with pytest.raises(InputError, match="per_class >= 1"):
        numbered(10).subset(per_class=0)


@pytest.mark.parametrize("bad", [3, -1])
def test_a_label_out_of_range_is_named(bad):
    labels = [0, 1, 2, bad, 0]
    dataset = listed(random_images(5), labels)
    for read in (lambda: dataset.labels, lambda: dataset[3], dataset.decoded, lambda: dataset.read([3])):
        with pytest.raises(InputError, match=rf"example 3 has label {bad}, expected 0 to 2 \(3 classes\)"):
            read()
    with pytest.raises(InputError, match=rf"example 3 has label {bad}"):
        Dataset.from_arrays(np.stack(random_images(5)), labels, class_names="abc")


def test_decoded_holds_the_same_examples():
    images = random_images(700)
    labels = [int(label) for label in np.random.default_rng(0).integers(0, 3, 700)]
    part = listed(images, labels).select(np.arange(699, 0, -2))
    decoded = part.decoded(threads=3)
    assert decoded.in_memory
    assert not part.in_memory
    np.testing.assert_array_equal(decoded.source.images, np.stack(images[::-2][: len(part)]))
    np.testing.assert_array_equal(decoded.labels, part.labels)
    assert decoded[5]["label"] == part[5]["label"]
    assert decoded.decoded() is decoded


def test_ragged_images_need_a_shape():
    images = [np.full((6, 5, 3), 7, np.uint8), np.full((8, 9, 1), 7, np.uint8)]
    dataset = listed(images, [0, 1])
    for read in (lambda: dataset[1], dataset.decoded):
        with pytest.raises(InputError, match=r"example 1 has an image of shape \(8, 9, 1\).*pass image_shape"):
            read()
    resized = dataclasses.replace(dataset, resize=True)
    np.testing.assert_array_equal(resized[1]["image"], np.full((6, 5, 3), 7))


@pytest.mark.parametrize(
    ("images", "labels", "text"),
    [
        (np.zeros((2, 4, 4, 1), np.float32), [0, 1], "uint8"),
        (np.zeros((2, 4, 4), np.uint8), [0, 1], "uint8"),
        (np.zeros((2, 4, 4, 1), np.uint8), [0, 1, 1], "one per image"),
        (np.zeros((2, 4, 4, 1), np.uint8), [0.0, 1.0], "integers"),
    ],
)
def test_wrong_arrays(images, labels, text):
    with pytest.raises(InputError, match=text):
        Dataset.from_arrays(images, labels)
