import threading
import time

import numpy as np
import pytest

from jaxtransfer.data import Episodes, augment, eval_batches, pipeline
from jaxtransfer.errors import InputError


def equal(first, second):
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])
        assert first[key].dtype == second[key].dtype


TRANSFORM = augment.compose(augment.random_crop(1), augment.random_flip(), augment.normalize(0.5, 0.2))


@pytest.mark.parametrize("size", [1, 4, 7, 10, 23])
def test_each_epoch_has_every_example_once(numbered, numbers, size):
    dataset, count = numbered(10), 40
    stream = pipeline(dataset, size, seed=5)
    assert stream.steps_per_epoch == -(-10 // size)
    assert stream.batch_size == size
    seen = np.concatenate([numbers(stream.batch(i)) for i in range(-(-count // size))])
    epochs = [seen[start : start + 10].tolist() for start in range(0, count, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    if not 10 % size or size > 10:  # no batch ends one epoch and begins the next, or none can do without repeats
        expected = np.concatenate([np.random.default_rng([0, 5, epoch]).permutation(10) for epoch in range(4)])
        np.testing.assert_array_equal(seen[:count], expected)


@pytest.mark.parametrize(
    ("n", "size"), [(300, 256), (257, 256), (256, 256), (511, 256), (513, 256), (700, 256), (7, 5)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_batch_holds_an_example_once_and_an_epoch_each(numbered, numbers, n, size, seed):
    stream = pipeline(numbered(n), size, seed=seed, threads=0)
    epochs = 8
    batches = [numbers(stream.batch(i)) for i in range(-(-epochs * n // size))]
    assert [len(np.unique(batch)) for batch in batches] == [size] * len(batches)
    seen = np.concatenate(batches)[: epochs * n].reshape(epochs, n)
    np.testing.assert_array_equal(np.sort(seen, axis=1), np.tile(np.arange(n), (epochs, 1)))
    assert len({tuple(epoch) for epoch in seen}) == epochs
    plain = np.array([np.random.default_rng([0, seed, epoch]).permutation(n) for epoch in range(epochs)])
    np.testing.assert_array_equal(seen[0], plain[0])
    # only what a batch would hold twice moved, and what it changed places with
    moved = (seen != plain).sum(axis=1)
    begun = [epoch * n % size for epoch in range(epochs)]
    assert all(count <= 2 * min(rows, size - rows) for count, rows in zip(moved, begun, strict=True))


@pytest.mark.parametrize(("n", "size"), [(300, 256), (700, 256), (7, 5)])
def test_batches_in_any_order_and_of_any_host_are_the_same(numbered, numbers, n, size):
    expected = [numbers(pipeline(numbered(n), size, threads=0).batch(i)) for i in range(30)]
    stream = pipeline(numbered(n), size, threads=0)
    for i in np.random.default_rng(0).permutation(30):
        np.testing.assert_array_equal(numbers(stream.batch(int(i))), expected[i])
    if size % 2 == 0:
        halves = [pipeline(numbered(n), size, shard=(index, 2), threads=0) for index in range(2)]
        for i in (29, 3, 17):
            np.testing.assert_array_equal(np.concatenate([numbers(half.batch(i)) for half in halves]), expected[i])


def test_each_row_is_as_likely_at_each_place(numbered, numbers):
    counts, seeds = np.zeros((7, 7)), 400
    for seed in range(seeds):
        stream = pipeline(numbered(7), 5, seed=seed, threads=0)
        seen = np.concatenate([numbers(stream.batch(i)) for i in range(2, 5)])
        counts[np.arange(7), seen[4:11]] += 1  # epoch 2: places 14 to 20 of the stream
    statistic = np.sum((counts - seeds / 7) ** 2 / (seeds / 7))
    assert statistic < 73.4  # chi square of 36 degrees of freedom: above in 1 of 4,000 runs of fair draws


def test_a_batch_larger_than_the_data_holds_examples_as_often_as_any_other(numbered, numbers):
    counts = np.bincount(numbers(pipeline(numbered(10), 23).batch(1)), minlength=10)
    assert counts.sum() == 23
    assert counts.max() - counts.min() <= 2


def test_without_shuffle_the_order_is_that_of_the_data(numbered, numbers):
    stream = pipeline(numbered(10), 4, shuffle=False)
    seen = np.concatenate([numbers(stream.batch(i)) for i in range(5)])
    np.testing.assert_array_equal(seen, np.arange(20) % 10)


def test_batches_hold_uint8_images_and_their_int32_labels(numbered, numbers):
    dataset = numbered(300)
    batch = pipeline(dataset, 50).batch(2)
    assert batch["image"].dtype == np.uint8
    assert batch["image"].shape == (50, 6, 5, 3)
    assert batch["label"].dtype == np.int32
    np.testing.assert_array_equal(batch["label"], dataset.labels[numbers(batch)])


def test_batches_are_a_function_of_seed_and_number(numbered):
    make = lambda seed: pipeline(numbered(30), 8, seed=seed, augment=TRANSFORM)  # noqa: E731
    first, again, other = make(1), make(1), make(2)
    later = again.batch(9)  # the order of the calls plays no part
    for i in range(9):
        equal(first.batch(i), again.batch(i))
    equal(first.batch(9), later)
    assert (first.batch(0)["image"] != other.batch(0)["image"]).any()
    assert (first.batch(0)["image"] != first.batch(1)["image"]).any()


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_iterating_from_a_position_continues_the_stream(numbered, threads):
    stream = pipeline(numbered(30), 8, augment=TRANSFORM, threads=threads)
    with stream.iterate() as batches:
        expected = [next(batches) for _ in range(12)]
    for i, batch in enumerate(expected):
        equal(batch, stream.batch(i))
    with stream.iterate(5) as resumed:
        for i in range(5, 12):
            assert resumed.position == i
            equal(next(resumed), expected[i])
        state = resumed.get_state()
        assert state == {"position": 12}
        resumed.set_state({"position": 3})
        equal(next(resumed), expected[3])


@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize(
    "transform",
    [
        None,
        TRANSFORM,
        augment.mixup(0.5, 3),
        augment.compose(augment.random_crop(1), augment.mixup(0.5, 3)),
        lambda batch, rng: {
            **batch,
            "image": batch["image"] + rng.integers(0, 9, (len(batch["image"]), 1, 1, 1)),
        },
    ],
)
def test_the_union_over_hosts_is_the_global_batch(numbered, hosts, transform):
    whole = pipeline(numbered(30), 8, seed=3, augment=transform)
    parts = [pipeline(numbered(30), 8, seed=3, augment=transform, shard=(index, hosts)) for index in range(hosts)]
    for i in (0, 3, 11):
        batches = [part.batch(i) for part in parts]
        assert all(len(batch["label"]) == 8 // hosts for batch in batches)
        equal({key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}, whole.batch(i))


def test_a_host_reads_its_own_examples_only(numbered):
    dataset = numbered(32)
    read = []
    object.__setattr__(dataset, "read", lambda indices: read.extend(indices) or type(dataset).read(dataset, indices))
    pipeline(dataset, 8, augment=TRANSFORM, shard=(1, 4)).batch(0)
    assert len(read) == 2


@pytest.mark.parametrize("cache", ["auto", "memory", "device", None])
def test_caches_give_the_same_batches(cache):
    from jaxtransfer.data import load

    dataset = load("digits/upright", "train[:50]")
    expected = pipeline(load("digits/upright", "train[:50]"), 16, seed=1).batch(4)
    stream = pipeline(dataset, 16, seed=1, cache=cache)
    assert stream.dataset.in_memory == (cache is not None)
    with stream.iterate(4) as batches:
        equal({key: np.asarray(value) for key, value in next(batches).items()}, expected)


def test_the_device_cache_compiles_once_and_refuses_augmentation(numbered):
    import jax

    stream = pipeline(numbered(20), 8, cache="device")
    batches = [stream.batch(i) for i in range(4)]
    assert all(isinstance(batch["image"], jax.Array) for batch in batches)
    with pytest.raises(InputError, match="drop one"):
        pipeline(numbered(20), 8, cache="device", augment=TRANSFORM)


def test_threads_end_when_the_iterator_is_dropped_closed_or_fails(numbered):
    def grain_threads():
        return [thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]

    def wait():
        end = time.monotonic() + 5
        while grain_threads() and time.monotonic() < end:
            time.sleep(0.01)
        return not grain_threads()

    stream = pipeline(numbered(30), 8, threads=2)
    batches = stream.iterate()
    next(batches)
    assert grain_threads()
    del batches
    assert wait()
    batches = stream.iterate()
    next(batches)
    batches.close()
    assert wait()
    assert list(batches) == []

    def fail(batch, rng):
        raise InputError("this transform fails")

    with pytest.raises(InputError, match="this transform fails"):
        next(pipeline(numbered(30), 8, augment=fail).iterate())
    assert wait()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 8.0}, r"batch_size must be a whole number, got 8\.0"),
        ({"batch_size": "8"}, "batch_size must be a whole number, got '8'"),
        ({"batch_size": 8, "shard": (0, 3)}, "does not divide by the 3 hosts"),
        ({"batch_size": 8, "shard": (2, 2)}, "shard must be"),
        ({"batch_size": 8, "seed": -1}, "seed >= 0"),
        ({"batch_size": 8, "threads": -1}, "threads >= 0"),
        ({"batch_size": 8, "cache": "disk"}, "unknown cache 'disk'"),
    ],
)
def test_unusable_options(numbered, arguments, text):
    with pytest.raises(InputError, match=text):
        pipeline(numbered(10), **arguments)


def test_an_empty_data_set_and_a_negative_position(numbered):
    with pytest.raises(InputError, match="no examples"):
        pipeline(numbered(10).take(0), 4)
    with pytest.raises(InputError, match="at least 0"):
        pipeline(numbered(10), 4).iterate(-1)
    with pytest.raises(InputError, match="from 0"):
        pipeline(numbered(10), 4).batch(-1)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"image": np.zeros((8, 4, 4, 1), np.uint8), "label": np.zeros(8, int)}, r"got dict; make one of arrays"),
        ((np.zeros((8, 4, 4, 1), np.uint8), np.zeros(8, int)), r"got tuple; make one of arrays"),
        (np.zeros((8, 4, 4, 1), np.uint8), r"got ndarray; make one of arrays: jt\.data\.Dataset\.from_arrays"),
        ("digits/upright", r"got str; load it: jt\.data\.load"),
        (None, r"got NoneType; "),
    ],
)
def test_what_is_no_data_set_is_told_the_way_to_one(given, text):
    for make in (pipeline, eval_batches, Episodes):
        with pytest.raises(InputError, match=f"{make.__name__} takes a jt.data.Dataset, {text}"):
            make(given, 4, **({"shots": 1} if make is Episodes else {}))
