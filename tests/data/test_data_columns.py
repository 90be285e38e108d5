import numpy as np
import pytest

from jaxtransfer.data import Dataset, augment, eval_batches, pipeline
from jaxtransfer.data.columns import ColumnView
from jaxtransfer.errors import InputError


class Lazy:
    """A column that counts what is read of it."""

    def __init__(self, values):
        self.values, self.reads = values, 0

    def __len__(self):
        return len(self.values)

    def __getitem__(self, rows):
        assert isinstance(rows, np.ndarray)
        assert rows.dtype == np.int64
        self.reads += len(rows)
        return self.values[rows]


class Unheld:
    """A source that is not in memory."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index]

    def many(self, indices):
        return [self[int(index)] for index in indices]

    def read_labels(self):
        return self.dataset.labels


KINDS = ("array", "lazy")


def values_of(n):
    """[n, 2]: twice and thrice the number of the example."""
    return np.outer(np.arange(n), [2, 3]).astype(np.float32)


@pytest.fixture
def columned(numbered):
    def make(n, kind="array", held=True, **options):
        dataset = numbered(n)
        if not held:
            dataset = Dataset("unheld", "train", dataset.class_names, dataset.image_shape, Unheld(dataset))
        values = values_of(n)
        return dataset.with_columns({"value": Lazy(values) if kind == "lazy" else values}, **options)

    return make


def agree(batch, numbers):
    real = batch.get("mask", np.ones(len(batch["label"]))) == 1
    batch = {key: np.asarray(value) for key, value in batch.items()}
    np.testing.assert_array_equal(batch["value"][real], values_of(1000)[numbers(batch)[real]])
    assert batch["value"].dtype == np.float32
    assert not batch["value"][~real].any()


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_columns_go_where_the_images_go(columned, numbers, kind, held):
    whole = columned(60, kind, held)
    chosen = whole.select([9, 3, 3, 50, 7]).select([4, 2, 0])
    for dataset in (whole, chosen, whole.take(5), whole.subset(per_class=4, seed=1), whole.decoded(), chosen.decoded()):
        agree(dataset.read(np.arange(len(dataset))[::-1]), numbers)
        example = dataset[-1]
        np.testing.assert_array_equal(example["value"], dataset.read([len(dataset) - 1])["value"][0])
        assert isinstance(example["label"], int)
    assert numbers(chosen.read([0, 1, 2])).tolist() == [7, 3, 9]


def test_a_lazy_column_is_read_when_it_is_asked_for(columned):
    whole = columned(60, "lazy")
    part = whole.subset(per_class=5).select([1, 2, 3]).decoded()
    pipeline(part, 2)
    assert whole.columns["value"].reads == 0
    part.read([0, 2])
    assert whole.columns["value"].reads == 2
    assert isinstance(part.columns["value"], ColumnView)
    assert part.columns["value"].column is whole.columns["value"]  # views do not pile up


@pytest.mark.parametrize("cache", ["memory", "device", None])
@pytest.mark.parametrize("kind", KINDS)
def test_pipelines_carry_them(columned, numbers, kind, cache):
    stream = pipeline(columned(30, kind, held=False).select(np.arange(29, 3, -1)), 8, seed=2, cache=cache)
    for i in range(5):
        agree(stream.batch(i), numbers)
    again = pipeline(columned(30, kind), 8, seed=2, shard=(1, 2))
    agree(again.batch(3), numbers)
    assert again.batch(3)["value"].shape == (4, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_pads_them_with_zeros(columned, numbers, kind):
    batches = list(eval_batches(columned(10, kind).select(np.arange(1, 10)), 4))
    assert [batch["value"].shape for batch in batches] == [(4, 2)] * 3
    for batch in batches:
        agree(batch, numbers)


def test_what_depends_on_the_image_refuses_augmentation(columned, numbers):
    bound = columned(10, of_image=True)
    for dataset in (bound, bound.with_columns({"index": np.arange(10)}).take(5), bound.decoded()):
        for make in (pipeline, eval_batches):
            with pytest.raises(InputError, match=r"'value' was computed on unaugmented images.*leave the augment"):
                make(dataset, 4, augment=augment.normalize(0.5, 0.2))
            agree(make(dataset, 4).batch(0), numbers)
    index = columned(10).with_columns({"index": np.arange(10)})
    batch = pipeline(index, 4, augment=augment.compose(augment.random_flip(), augment.mixup(0.2, 3))).batch(0)
    assert batch["index"].shape == (4,)


def test_unusable_columns(columned):
    dataset = columned(10)
    for name in ("image", "label", "mask", "value"):
        with pytest.raises(InputError, match=rf"can't be called '{name}'"):
            dataset.with_columns({name: np.zeros(10)})
    for column in (np.zeros(9), list(range(11)), Lazy(np.zeros(5)), np.float32(3)):
        with pytest.raises(InputError, match="one entry for each of the 10 examples, got"):
            dataset.with_columns({"other": column})
    assert list(dataset.columns) == ["value"]
    assert dataset.with_columns({"other": [0] * 10}).labels is dataset.labels


def test_mixup_without_labels(columned, numbers):
    batch = columned(8).read(np.arange(8))
    mixed, labelled = (augment.mixup(0.7, classes)(batch, np.random.default_rng(2)) for classes in (None, 3))
    assert "label" not in mixed
    np.testing.assert_array_equal(mixed["image"], labelled["image"])
    np.testing.assert_array_equal(mixed["value"], batch["value"])
    unlabelled = {key: value for key, value in batch.items() if key != "label"}
    for classes in (None, 3):
        result = augment.mixup(0.7, classes)(unlabelled, np.random.default_rng(2))
        np.testing.assert_array_equal(result["image"], mixed["image"])
        assert "label" not in result
    with pytest.raises(InputError, match="classes >= 1 or None"):
        augment.mixup(0.7, 0)


def test_a_data_set_prints_its_columns():
    images, labels = np.zeros((4, 3, 2, 1), np.uint8), ["a", "b", "a", "c"]
    data = Dataset.from_arrays(images, labels, name="mine", split="train")
    assert repr(data) == "Dataset(mine (train): 4 examples; image uint8 [3, 2, 1], label int32 of 3 classes)"
    more = data.with_columns({"weight": np.ones(4, np.float32), "soft": np.zeros((4, 3))}).take(2)
    assert repr(more).endswith("label int32 of 3 classes, weight float32 [], soft float64 [3])")
    assert "2 examples" in repr(more)
