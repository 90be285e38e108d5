"""Examples that are drawn as often as they are weighted."""

import numpy as np
import pytest

import jaxtransfer as jt
from jaxtransfer.data import Dataset, pipeline

COUNTS = (40, 7, 3, 1)


@pytest.fixture
def uneven():
    labels = np.repeat(np.arange(5), (*COUNTS, 0))  # of the last class there is none
    return Dataset.from_columns(
        {"label": labels, "index": np.arange(len(labels)), "other": labels % 2},
        class_names={"label": list("abcde"), "other": ["even", "odd"]},
    )


def epochs(batches, count, size=51):
    stream = np.concatenate([batches.batch(i)["index"] for i in range(-(-count * size // batches.batch_size))])
    return stream[: count * size].reshape(count, size)


@pytest.mark.parametrize("batch_size", [4, 17, 51])
def test_classes_come_equally_often_and_their_examples_too(uneven, batch_size):
    for epoch in epochs(pipeline(uneven, batch_size, balance="label", threads=0), 5):
        drawn = np.bincount(uneven.labels[epoch], minlength=5)
        assert set(drawn[:4]) <= {12, 13}  # 51 / 4
        assert drawn[4] == 0
        times = np.bincount(epoch, minlength=51)
        for label, count in enumerate(COUNTS):
            share = 51 / 4 / count
            assert set(times[uneven.labels == label]) <= {int(share), int(share) + 1}


def test_on_average_each_gets_its_share(uneven, rng):
    weights = rng.exponential(size=51) * (rng.random(51) < 0.8)
    times = np.bincount(epochs(pipeline(uneven, 51, balance=weights, threads=0), 3000).ravel(), minlength=51) / 3000
    np.testing.assert_allclose(times, 51 * weights / weights.sum(), atol=0.05)
    assert (times[weights == 0] == 0).all()
    plain = epochs(pipeline(uneven, 51, balance=np.full(51, 0.3), threads=0), 4)
    assert (np.sort(plain) == np.arange(51)).all()
    assert len({tuple(epoch) for epoch in plain}) == 4


def test_a_batch_is_a_function_of_its_number(uneven):
    whole = pipeline(uneven, 8, seed=2, balance="other", threads=0)
    wanted = [whole.batch(i)["index"] for i in range(20)]
    assert all(np.bincount(uneven.labels[one] % 2, minlength=2).min() > 0 for one in epochs(whole, 2))
    stream = pipeline(uneven, 8, seed=2, balance="other", threads=2).iterate(start=11)
    for i in range(11, 20):
        np.testing.assert_array_equal(next(stream)["index"], wanted[i])
    stream.close()
    parts = [pipeline(uneven, 8, seed=2, balance="other", threads=0, shard=(k, 2)).batch(13)["index"] for k in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(parts), wanted[13])
    assert any((pipeline(uneven, 8, seed=3, balance="other").batch(i)["index"] != wanted[i]).any() for i in range(3))


def test_a_fingerprint_tells_the_weights(uneven):
    plain, label, other = (pipeline(uneven, 8, balance=by).fingerprint() for by in (None, "label", "other"))
    assert "balance" not in plain
    assert label["balance"] != other["balance"]
    assert {**plain, "balance": label["balance"]} == label


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"balance": "index"}, "names a column of classes"),
        ({"balance": "absent"}, "has no column 'absent'"),
        ({"balance": [1.0, 2.0]}, "a weight for each of the 51 examples"),
        ({"balance": np.full(51, -1.0)}, "not negative"),
        ({"balance": np.zeros(51)}, "not all 0"),
        ({"balance": np.full(51, np.nan)}, "finite"),
        ({"balance": np.full(51, 1e308)}, "finite"),  # their sum is not
        ({"balance": "label", "shuffle": False}, "takes them in order; drop one"),
    ],
)
def test_what_can_be_no_weights_is_refused(uneven, options, told):
    with pytest.raises(jt.InputError, match=told):
        pipeline(uneven, 4, **options)
