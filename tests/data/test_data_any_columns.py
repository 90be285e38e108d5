"""Data sets of any columns: what is taken, what is refused, and what batches then hold."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxtransfer.data import Dataset, Entry, augment, eval_batches, fingerprint, pipeline, views
from jaxtransfer.errors import InputError

N = 11


def table(**changes):
    rng = np.random.default_rng(3)
    columns = {
        "features": rng.normal(size=(N, 4)),  # float64
        "tokens": rng.integers(0, 50, (N, 6)),  # int64
        "padding": rng.random((N, 6)) < 0.5,
        "label": np.arange(N) % 3,
        "pose": np.array(["left", "right"] * 5 + ["up"]),
        "ground": rng.integers(0, 4, (N, 3, 2)).astype(np.uint8),
        "value": rng.normal(size=(N, 1)).astype(np.float16),
        "index": np.arange(N),
    }
    names = {"pose": None, "ground": ("road", "sky", "tree", "void")}
    return columns, Dataset.from_columns({**columns, **changes}, class_names=names, name="mine", split="train")


def test_facts_and_values_of_any_column():
    columns, data = table()
    f, i = np.dtype(np.float32), np.dtype(np.int32)
    assert data.entries == {
        "features": Entry((4,), f),
        "tokens": Entry((6,), i),
        "padding": Entry((6,), np.dtype(bool)),
        "label": Entry((), i, ("0", "1", "2")),
        "pose": Entry((), i, ("left", "right", "up")),
        "ground": Entry((3, 2), np.dtype(np.uint8), ("road", "sky", "tree", "void")),
        "value": Entry((1,), np.dtype(np.float16)),
        "index": Entry((), i),
    }
    assert (data.classes, data.class_names) == (3, ("0", "1", "2"))
    assert data.entries["pose"].classes == 3
    assert data.entries["features"].classes is None
    assert len(data) == N
    some = data.select([4, 2, 2, 10]).take(3)
    batch = some.read([2, 0])
    for name, values in columns.items():
        if name != "pose":
            np.testing.assert_array_equal(batch[name], values[[2, 4]].astype(batch[name].dtype))
    assert batch["pose"].tolist() == [0, 0]
    assert data.select([10, 1]).column("pose").tolist() == [2, 1]
    assert data.column("ground").dtype == np.uint8
    assert sorted(data[3]) == sorted(columns)
    assert repr(data) == (
        "Dataset(mine (train): 11 examples; features float32 [4], tokens int32 [6], padding bool [6], label int32 of 3 "
        "classes, pose int32 of 3 classes, ground uint8 [3, 2] of 4 classes, value float16 [1], index int32 [])"
    )


def test_batches_are_the_same_rows_of_all_columns():
    _, data = table()
    stream = pipeline(data, 4, seed=1)
    for number in range(6):
        batch = stream.batch(number)
        whole = data.read(batch["index"])
        assert batch.keys() == whole.keys()
        for name, values in whole.items():
            np.testing.assert_array_equal(batch[name], values)
    held = pipeline(data, 4, seed=1, cache="device").batch(5)
    for name, values in batch.items():
        np.testing.assert_array_equal(np.asarray(held[name]), values)


def test_evaluation_pads_every_column():
    _, data = table()
    batches = list(eval_batches(data, 4))
    assert [batch["mask"].tolist() for batch in batches] == [[1] * 4, [1] * 4, [1, 1, 1, 0]]
    for batch in batches:
        assert {name: values.shape[0] for name, values in batch.items()} == dict.fromkeys(batch, 4)
    last = batches[-1]
    for name, values in data.read([8, 9, 10]).items():
        np.testing.assert_array_equal(last[name][:3], values)
        assert not last[name][3:].any()
        assert last[name].dtype == values.dtype


def test_images_or_labels_may_be_missing():
    features = np.zeros((4, 2), np.float32)
    data = Dataset.from_columns(features=features)
    assert data.class_names == ()
    for fact, name in (("image_shape", "image"), ("labels", "label"), ("classes", "label")):
        with pytest.raises(InputError, match=rf"columns \(all\) has no column '{name}'; it has features"):
            getattr(data, fact)
    with pytest.raises(InputError, match="no column 'label'"):
        data.subset(per_class=1)
    assert data.column("features") is not None
    labelled = data.with_columns({"label": np.array(["a", "b", "a", "a"])}, class_names={"label": None})
    assert (labelled.class_names, labelled.labels.tolist()) == (("a", "b"), [0, 1, 0, 0])
    assert labelled.as_classes(["b", "c", "a"]).labels.tolist() == [2, 0, 2, 2]
    assert sorted(labelled.subset(per_class=1).labels) == [0, 1]
    numbers = Dataset.from_columns(label=np.array([[0.5], [2.0]]))
    with pytest.raises(InputError, match=r"as_classes is of one class per example, and 'label' is float32 \[1\]"):
        numbers.as_classes(["a"])
    with pytest.raises(InputError, match=r"labels are numbers \(float32 \[1\]\), not classes"):
        _ = numbers.classes
    assert numbers.labels.shape == (2, 1)
    assert Dataset.from_columns(label=[True, False]).class_names == ("False", "True")


def test_subset_by_any_label():
    _, data = table()
    few = data.take(10).select(np.arange(10))
    with pytest.raises(InputError, match="class 'up' has 0 examples"):
        few.subset(per_class=2, by="pose")
    assert np.bincount(data.subset(per_class=1, by="pose", seed=4).column("pose")).tolist() == [1, 1, 1]
    with pytest.raises(InputError, match=r"subset chooses by classes, and 'tokens' is int32 \[6\]"):
        data.subset(per_class=1, by="tokens")


REFUSED = [
    ({"x": np.zeros(3), "y": np.zeros(4)}, {}, "'x' has 3, 'y' has 4"),
    ({}, {}, "expected one column or more"),
    ({"mask": np.ones(3)}, {}, "can't be called 'mask'.*weights of examples are called 'weight'"),
    ({"x": ["one", "two"]}, {}, r"column 'x' is text, .*class_names=\{'x': None\}.*Vocabulary"),
    ({"x": np.array([None, 3], object)}, {}, "column 'x' is object, and batches are of numbers"),
    ({"x": np.array(["2020-01-01"], "datetime64[D]")}, {}, "column 'x' is datetime64"),
    ({"x": [[1, 2], [3]]}, {}, "column 'x' must be one array .*pad"),
    ({"x": 3.0}, {}, "got a single value"),
    ({"x": [[1.0, 2.0], [3.0, np.nan]]}, {}, "column 'x': example 1 has a value that is not finite, nan"),
    ({"x": np.array([1e300])}, {}, "not finite, inf"),
    ({"x": np.array([2**31])}, {}, "column 'x' has 2147483648, which int32 can't hold"),
    ({"x": [0, 1, 3]}, {"x": ["a", "b", "c"]}, "example 2 has 'x' 3, expected 0 to 2"),
    ({"x": [[0, 1], [-1, 0]]}, {"x": ["a", "b"]}, "example 1 has 'x' -1, expected 0 to 1"),
    ({"x": ["a", "z"]}, {"x": ["a", "b"]}, "column 'x': example 1 has label 'z'"),
    ({"x": [0.0, 1.0]}, {"x": ["a", "b"]}, "column 'x': labels must be integers"),
    ({"x": [0, 1]}, {"x": "ab"}, "class_names are a list of names"),
    ({"x": [0, 1]}, {"y": ["a"]}, "unknown column of class_names= 'y'; known: x"),
    ({"label": [0, -1]}, {}, "example 1 has label -1"),
    ({"image": np.zeros((2, 3))}, {}, r"'image' is \[N, H, W, C\]"),
]


@pytest.mark.parametrize(("columns", "names", "message"), REFUSED)
def test_unusable_columns_are_told_by_name(columns, names, message):
    with pytest.raises(InputError, match=message):
        Dataset.from_columns(columns, class_names=names)


def test_what_lies_on_the_pixels_goes_with_no_augmentation():
    image = np.zeros((6, 4, 3, 1), np.uint8)
    columns = {"image": image, "ground": np.zeros((6, 4, 3), np.uint8), "label": np.arange(6)}
    data = Dataset.from_columns(columns, class_names={"ground": ["sky", "road"]})
    assert data.of_image == {"ground"}
    for make in (pipeline, eval_batches):
        with pytest.raises(InputError, match=r"'ground' has a value for each pixel.*move the images alone"):
            make(data.take(4), 2, augment=augment.random_flip())
    own = dataclasses.replace(data, of_image=frozenset())
    assert pipeline(own, 2, augment=augment.random_flip()).batch(0)["ground"].shape == (2, 4, 3)
    assert Dataset.from_columns(columns, of_image=()).of_image == frozenset()
    with pytest.raises(InputError, match=r"unknown column of of_image= 'grund' \(did you mean 'ground'\?\)"):
        Dataset.from_columns(columns, of_image=["grund"])


def test_transforms_of_images_say_that_there_are_none():
    data = Dataset.from_columns(features=np.zeros((4, 2), np.float32))
    for transform in (augment.random_flip(), augment.random_crop(1), augment.cutout(1), augment.normalize(0, 1)):
        with pytest.raises(InputError, match=r"changes images, batch\['image'\], and the batch has features"):
            pipeline(data, 2, augment=transform).batch(0)
    with pytest.raises(InputError, match=r"images in batch\['image'\]; the batch has features"):
        views.augmented(views.random_flip())(jax.random.key(0), data.read([0]), np.arange(1))


def test_a_fingerprint_is_of_every_column_and_its_classes():
    columns, data = table()
    before = fingerprint(data)
    assert fingerprint(Dataset.from_columns(dict(reversed(columns.items())), **_named(data))) == before
    for name, values in columns.items():
        changed = np.array(values).copy()
        changed[2] = changed[3]
        after = fingerprint(table(**{name: changed})[1])
        assert {key for key in before if before[key] != after[key]} == {"labels" if name == "label" else "arrays"}
    other = dataclasses.replace(data, entries={**data.entries, "pose": Entry((), np.dtype("int32"), ("a", "b", "c"))})
    assert {key for key, value in fingerprint(other).items() if before[key] != value} == {"class_names of"}


def _named(data):
    names = {name: entry.class_names for name, entry in data.entries.items() if entry.class_names}
    return {"class_names": names, "name": data.name, "split": data.split}


class Rows:
    """A source of someone else's, with other entries than images and labels."""

    def __init__(self, columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns["x"])

    def __getitem__(self, index):
        return {name: values[index] for name, values in self.columns.items()}

    def many(self, indices):
        return [self[index] for index in indices]


def test_a_source_may_give_any_entries():
    columns = {"x": np.arange(12, dtype=np.float32).reshape(6, 2), "kind": np.array([0, 1, 1, 0, 2, 1])}
    entries = {"x": Entry((2,), np.dtype(np.float32)), "kind": Entry((), np.dtype(np.int32), ("a", "b", "c"))}
    data = Dataset("rows", "train", source=Rows(columns), entries=entries)
    assert not data.in_memory
    for one in (data, data.decoded()):
        np.testing.assert_array_equal(one.read([3, 1])["x"], columns["x"][[3, 1]])
        np.testing.assert_array_equal(one.column("kind"), columns["kind"])
        assert one.nbytes == 6 * 12
        assert fingerprint(one) == fingerprint(data)
    few = {**entries, "kind": Entry((), np.dtype(np.int32), ("a", "b"))}
    with pytest.raises(InputError, match="example 1 has 'kind' 2, expected 0 to 1"):
        Dataset("rows", "train", source=Rows(columns), entries=few).select([0, 4]).read([1])
    wide = {**entries, "x": Entry((3,), np.dtype(np.float32))}
    with pytest.raises(InputError, match=r"example 0 has a value of 'x' of shape \(2,\), expected \(3,\)"):
        Dataset("rows", "train", source=Rows(columns), entries=wide).decoded()


def test_added_columns_are_what_they_would_be_from_the_start():
    rows = Dataset.from_columns(x=np.zeros((4, 2), np.float32))
    for labels in (np.array([0, 2, 1, 2]), np.array(["a", "c", "b", "c"])):
        added, whole = rows.with_columns({"label": labels}), Dataset.from_columns(label=labels)
        assert added.entry_of("label") == whole.entry_of("label")
        np.testing.assert_array_equal(added.labels, [0, 2, 1, 2])
        np.testing.assert_array_equal(added.subset(per_class=1).labels, whole.subset(per_class=1).labels)
    with pytest.raises(InputError, match="column 'user' has 1099511627779, which int32 can't hold"):
        rows.with_columns({"user": 2**40 + np.arange(4)})
    numbers = rows.with_columns({"index": np.arange(4), "score": np.array([0.5, 1, 2, 3])})
    assert (numbers[2]["index"], numbers[2]["score"]) == (2, 2.0)


def test_a_whole_column_is_no_other_numbers_than_one_by_one():
    data = Dataset(
        "rows", "all", source=Rows({"x": 2**32 + np.arange(3)}), entries={"x": Entry((), np.dtype(np.int32))}
    )
    for asked in (lambda: data[1], lambda: data.read([1]), lambda: data.column("x")):
        with pytest.raises(InputError, match=r"429496729\d.*int32"):
            asked()
