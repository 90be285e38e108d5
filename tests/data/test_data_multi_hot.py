"""Columns where each example has any number of labels: whose names their class names are, and what is refused."""

import numpy as np
import pytest

import jaxtransfer as jt

HOT = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])


def made(values, names, column="label"):
    return jt.data.Dataset.from_columns({"x": np.zeros(len(values)), column: values}, class_names={column: names})


@pytest.mark.parametrize(
    ("values", "dtype"),
    [(HOT, np.int32), (HOT.astype(bool), np.int32), (HOT.astype(np.uint8), np.uint8), (HOT / 2, np.float32)],
    ids=["int", "bool", "byte", "probabilities"],
)
@pytest.mark.parametrize("width", [1, 3])
def test_names_are_the_labels(values, dtype, width):
    names, values = ("a", "b", "c")[:width], values[:, :width]
    data = made(values, names, "tags")
    entry = data.entries["tags"]
    assert (entry.multi_hot, entry.class_names, entry.dtype) == (True, names, dtype)
    np.testing.assert_array_equal(data.select([2, 0]).column("tags"), values[[2, 0]])
    np.testing.assert_array_equal(data[2]["tags"], values[2])
    assert f"of {width} labels of 0 and 1" in repr(data)


@pytest.mark.parametrize(
    ("values", "names"), [(HOT, ["no", "yes"]), (HOT * 2, ["a", "b", "c"]), (HOT, None), (HOT[:, 0], ["no", "yes"])]
)
def test_classes_stay_classes(values, names):
    entry = made(values, names).entries["label"]
    assert not entry.multi_hot
    assert "classes" in str(entry)


@pytest.mark.parametrize(
    ("values", "names", "told"),
    [
        (HOT / 2, ["a", "b"], "fractions for 3 labels, which hold together, and 2 class names"),
        (HOT * 1.5, ["a", "b", "c"], r"values are 0 or 1, or probabilities; got 1\.5"),
        (HOT * np.nan, ["a", "b", "c"], "got nan"),
        (HOT, ["a", "b", "a"], "names two of its labels 'a'"),
    ],
)
def test_what_is_refused(values, names, told):
    with pytest.raises(jt.InputError, match=told):
        made(values, names)


def test_a_share_of_each_label_is_held_out():
    rng = np.random.default_rng(0)
    values = (rng.random((200, 3)) < [0.5, 0.1, 0.03]).astype(int)
    data = made(values, ["a", "b", "c"], "tags")
    rest, held = jt.data.hold_out(data, 0.2, seed=1, by="tags")
    assert sorted([*rest.rows, *held.rows]) == list(range(200))
    counts, chosen = values.sum(0), held.column("tags").sum(0)
    np.testing.assert_allclose(chosen, 0.2 * counts, atol=1.5)
    assert chosen.min() >= 1
    assert abs(len(held) - 40) <= 3
    again = jt.data.hold_out(data, 0.2, seed=1, by="tags")[1]
    np.testing.assert_array_equal(held.rows, again.rows)
    kinds = made(values[:, 0], ["no", "yes"], "kind")
    for kind in np.bincount(jt.data.hold_out(kinds, 0.25, by="kind")[1].column("kind")) - 0.25 * np.bincount(
        values[:, 0]
    ):
        assert abs(kind) <= 0.5
    with pytest.raises(jt.InputError, match="hold_out is by classes, or by labels"):
        jt.data.hold_out(made(HOT / 2, ["a", "b", "c"]), 0.2)


def test_balanced_weights_are_of_classes():
    with pytest.raises(jt.InputError, match="pos_weight=negatives / positives"):
        jt.data.balanced_weights(made(HOT, ["a", "b", "c"]))
    kinds = made(np.array([0, 1, 1, 1]), ["no", "yes"], "kind")
    np.testing.assert_allclose(jt.data.balanced_weights(kinds, label="kind"), [2, 2 / 3])
