"""Zipped batches: batch i of the whole is batch i of each part, from any position, to the last padded one."""

import numpy as np
import pytest

from jaxtransfer.data import Dataset, eval_batches, fingerprint, pipeline, zipped
from jaxtransfer.errors import InputError


def numbered(count, kinds=3):
    return Dataset.from_columns(features=np.arange(2.0 * count).reshape(count, 2), label=np.arange(count) % kinds)


def equal(one, other):
    assert one.keys() == other.keys()
    for name, part in one.items():
        assert part.keys() == other[name].keys()
        for key, values in part.items():
            np.testing.assert_array_equal(values, other[name][key])


def parts(seed=0):
    return pipeline(numbered(10), 4, seed=seed), pipeline(numbered(7), 3, seed=seed + 1, threads=0)


@pytest.mark.parametrize("start", [0, 1, 7])
def test_a_batch_is_that_of_each_part(start):
    source, target = parts()
    both = zipped(source=source, target=target)
    assert both.steps_per_epoch == 3
    with both.iterate(start) as stream:
        for number in range(start, start + 9):
            batch = next(stream)
            equal(batch, {"source": source.batch(number), "target": target.batch(number)})
            equal(batch, both.batch(number))
            assert stream.position == number + 1
        state = stream.get_state()
        after = next(stream)
        stream.set_state(state)
        equal(next(stream), after)
    assert next(stream, None) is None
    for i in range(7):  # each epoch of each part has each example once
        rows = np.concatenate([both.batch(7 * i + k)["target"]["features"][:, 0] for k in range(7)])
        assert np.bincount((rows / 2).astype(int)).tolist() == [3] * 7


def test_parts_may_be_zipped_or_someone_elses():
    class Own:
        def iterate(self, start):
            return ({"x": np.full(2, i)} for i in range(start, 100))

    both = zipped({"pair": zipped(source=parts()[0]), "own": Own()})
    batch = both.batch(5)
    np.testing.assert_array_equal(batch["pair"]["source"]["label"], parts()[0].batch(5)["label"])
    assert batch["own"]["x"].tolist() == [5, 5]
    streams = both.iterate(5)
    assert next(streams)["own"]["x"].tolist() == [5, 5]
    assert next(streams)["own"]["x"].tolist() == [6, 6]
    assert {key.rpartition("/")[0] for key in both.fingerprint()} == {"pair/source", "own"}


def test_the_shorter_evaluation_is_filled_with_padding():
    one, other = eval_batches(numbered(10), 4), eval_batches(numbered(3), 2)
    both = zipped(source=one, target=other)
    assert len(both) == 3
    for _ in range(2):  # again and again
        batches = list(both)
        assert [batch["source"]["mask"].tolist() for batch in batches] == [[1] * 4, [1] * 4, [1, 1, 0, 0]]
        assert [batch["target"]["mask"].tolist() for batch in batches] == [[1, 1], [1, 0], [0, 0]]
        assert not batches[-1]["target"]["features"].any()
    with pytest.raises(InputError, match="'source' ends after 3 batches, and others never do"):
        zipped(source=one, target=parts()[1])
    with pytest.raises(TypeError, match="has no length"):
        len(zipped(source=parts()[0]))


def test_a_fingerprint_is_of_all_parts():
    before = zipped(source=parts()[0], target=parts()[1]).fingerprint()
    assert before["source/examples"] == 10
    assert before["target/labels"] == fingerprint(numbered(7))["labels"]
    other = zipped(source=parts()[0], target=pipeline(numbered(7, 2), 3, seed=1)).fingerprint()
    assert {key for key in before if before[key] != other[key]} == {"target/labels", "target/class_names"}


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({}, "one part or more, got none"),
        ({"source": numbered(4)}, r"'source' must have batch\(i\) or iterate\(start\), got a Dataset"),
        ({"source": {"x": np.zeros(3)}}, "got a dict"),
        ({"source": [1, 2]}, "got a list"),
    ],
)
def test_what_can_not_be_zipped(made, message):
    with pytest.raises(InputError, match=message):
        zipped(**made)
    with pytest.raises(InputError, match="at least 0"):
        zipped(source=parts()[0]).iterate(-1)
