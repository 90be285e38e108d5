import collections

import chex
import jax
import numpy as np
import pytest

from jaxtransfer.data import RIGHT_ANGLES, Dataset, Episodes, split_classes
from jaxtransfer.errors import InputError

COUNTS = (9, 0, 12, 7, 20, 8)


@pytest.fixture
def coded():
    """A data set whose image of example i of class c shows i in its corner (0, 0) and c in (0, 1)."""

    def make(counts=COUNTS, side=4):
        label = np.repeat(np.arange(len(counts)), counts)
        label = np.random.default_rng(0).permutation(label)
        image = np.zeros((len(label), side, side, 1), np.uint8)
        image[:, 0, 0, 0], image[:, 0, 1, 0] = np.arange(len(label)), label
        return Dataset.from_arrays(image, label, class_names=[f"class{k}" for k in range(len(counts))])

    return make


def drawn(episodes, where, count):
    """`count` batches of episodes, from the host or from the device, as NumPy."""
    if where == "host":
        pipeline = episodes.batches(threads=0)
        return [pipeline.batch(i) for i in range(count)]
    data, sample = episodes.on_device()
    sample = jax.jit(sample)
    return [jax.tree.map(np.asarray, sample(jax.random.key(i), data)) for i in range(count)]


def upright(image):
    """Turns an image [4, 4, 1] back: its quarter turns, the example, the class."""
    for turn in range(4):
        back = np.rot90(image, -turn)
        if back[0, 1, 0] and not back[1:].any():
            return turn, int(back[0, 0, 0]), int(back[0, 1, 0])
    raise AssertionError("no example of the data set")


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("rotations", [(0,), RIGHT_ANGLES, (0, 2)])
def test_an_episode_has_its_ways_shots_and_queries(coded, where, rotations):
    dataset = coded((0, *COUNTS))  # class 0 shows nothing in the corner: it is absent
    episodes = Episodes(dataset, ways=4, shots=2, queries=3, tasks=3, rotations=rotations, seed=1)
    assert episodes.classes == 5 * len(rotations)
    seen = collections.Counter()
    for batch in drawn(episodes, where, 30):
        assert batch["support"]["image"].shape == (3, 8, 4, 4, 1)
        assert batch["support"]["image"].dtype == np.uint8
        assert batch["query"]["image"].shape == (3, 12, 4, 4, 1)
        assert batch["query"]["label"].dtype == np.int32
        np.testing.assert_array_equal(batch["support"]["label"], np.tile(np.repeat(np.arange(4), 2), (3, 1)))
        np.testing.assert_array_equal(batch["query"]["label"], np.tile(np.repeat(np.arange(4), 3), (3, 1)))
        for task in range(3):
            kinds, examples = {}, []
            for part in ("support", "query"):
                for image, label in zip(batch[part]["image"][task], batch[part]["label"][task], strict=True):
                    turn, example, kind = upright(image)
                    assert dataset.labels[example] == kind
                    assert kinds.setdefault(int(label), (turn, kind)) == (turn, kind)
                    examples.append((turn, example))
            assert len(set(kinds.values())) == 4, "two ways are one class"
            assert len(set(examples)) == len(examples), "an example is drawn twice"
            seen.update(kinds.values())
    assert {turn for turn, _ in seen} == set(rotations)
    assert {kind for _, kind in seen} == {1, 3, 4, 5, 6}


@pytest.mark.parametrize("where", ["host", "device"])
def test_classes_and_examples_are_uniform(coded, where):
    dataset = coded((0, 5, 9, 14))
    episodes = Episodes(dataset, ways=2, shots=1, queries=2, tasks=300)
    first, support, way = collections.Counter(), collections.Counter(), collections.Counter()
    for batch in drawn(episodes, where, 4):
        for task in range(300):
            for row in range(2):
                _, example, kind = upright(batch["support"]["image"][task, row])
                support[kind, example] += 1
                first[kind] += 1
                way[row, kind] += 1
    total = sum(first.values())
    for kind, size in ((1, 5), (2, 9), (3, 14)):
        assert first[kind] / total == pytest.approx(1 / 3, abs=0.04)
        assert way[0, kind] / (total / 2) == pytest.approx(1 / 3, abs=0.05)
        shares = [support[kind, example] / first[kind] for example in np.flatnonzero(dataset.labels == kind)]
        assert len(shares) == size
        np.testing.assert_allclose(shares, 1 / size, atol=0.06)


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.slow
def test_unbalanced_queries(coded, where):
    dataset = coded((0, 30, 40, 25, 35))
    uneven, total = {}, 0
    for balance in (None, 100.0, 0.5):
        episodes = Episodes(dataset, ways=3, shots=1, queries=5, tasks=100, balance=balance)
        spread = []
        for batch in drawn(episodes, where, 2):
            assert batch["query"]["label"].shape == (100, 15)
            for task in range(100):
                labels = batch["query"]["label"][task]
                examples = [upright(image)[1:] for image in batch["query"]["image"][task]]
                examples += [upright(image)[1:] for image in batch["support"]["image"][task]]
                assert len(set(examples)) == len(examples)
                kinds = collections.defaultdict(set)
                for label, (_, kind) in zip(labels, examples, strict=False):
                    kinds[int(label)].add(kind)
                assert all(len(kind) == 1 for kind in kinds.values())
                spread.append(np.bincount(labels, minlength=3))
        uneven[balance] = np.std(spread)
        total += len(spread)
        np.testing.assert_allclose(np.mean(spread, 0), 5, atol=1.0)
    assert uneven[None] == 0
    assert 0 < uneven[100.0] < uneven[0.5]
    assert total == 600


def labels_only(counts):
    """A data set of plain images whose class is in every pixel."""
    label = np.repeat(np.arange(len(counts)), counts)
    image = np.broadcast_to(label.astype(np.uint8)[:, None, None, None], (len(label), 1, 1, 1))
    return Dataset.from_arrays(image, label)


@pytest.mark.parametrize("where", ["host", pytest.param("device", marks=pytest.mark.slow)])
def test_unbalanced_queries_draw_classes_however_many_examples_they_have(where):
    """By hand: shares of 1 / ways, counts as far apart as a Dirichlet distribution and multinomial draws make them."""
    spreads = {}
    for counts in ((400, 60, 60, 60, 60), (60, 60, 60, 60, 60)):
        (batch,) = drawn(Episodes(labels_only(counts), 5, 1, 10, tasks=500, balance=2.0), where, 1)
        kinds = batch["query"]["image"].reshape(500, 50)
        chosen = np.stack([np.sum(kinds == kind, axis=1) for kind in range(5)], axis=1)
        np.testing.assert_allclose(chosen.mean(0) / 50, 0.2, atol=0.02)
        spreads[counts] = np.std(chosen)
    p = 1 / 5
    variance = 50 * p * (1 - p) * (50 + 10) / (1 + 10)  # of a Dirichlet-multinomial distribution, Σ α = 10
    np.testing.assert_allclose(list(spreads.values()), variance**0.5, rtol=0.07)


def test_host_batches_are_a_function_of_seed_and_number(coded):
    make = lambda seed, **more: Episodes(coded(), ways=2, shots=1, queries=2, tasks=4, seed=seed).batches(**more)  # noqa: E731
    one, other = make(0), make(1)
    stream = one.iterate(start=2)
    for i in (2, 3):
        expected = make(0, threads=0).batch(i)
        chex.assert_trees_all_equal(next(stream), expected)
    assert stream.position == 4
    stream.close()
    assert any((one.batch(i)["query"]["image"] != other.batch(i)["query"]["image"]).any() for i in range(3))
    halves = [make(0, shard=(host, 2)).batch(5) for host in range(2)]
    joined = jax.tree.map(lambda *parts: np.concatenate(parts), *halves)
    chex.assert_trees_all_equal(joined, one.batch(5))


def test_the_test_set_is_fixed_and_finite(coded):
    episodes = Episodes(coded(), ways=2, shots=1, queries=2, tasks=4, seed=3)
    tests = episodes.test_set(20, threads=0)
    first, again = list(tests), list(tests)
    assert len(first) == len(tests) == 5
    chex.assert_trees_all_equal(first, again)
    with pytest.raises(InputError, match=r"21 episodes .* batches of 4"):
        episodes.test_set(21)
    with pytest.raises(InputError, match=r"numbered from 0 to 4, got 5"):
        tests.batch(5)
    with pytest.raises(TypeError, match="endless"):
        len(episodes.batches())


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"ways": 6}, r"5 classes with examples, 6 ways asked"),
        ({"shots": 5}, r"class 'class3' has 7 examples, an episode takes 8 \(5 shots and 3 queries\)"),
        ({"queries": 7}, r"class 'class3' has 7 examples, an episode takes 8"),
        ({"ways": 1}, "ways of at least 2, got 1"),
        ({"shots": 0}, "shots of at least 1, got 0"),
        ({"queries": -1}, "queries of at least 1, got -1"),
        ({"tasks": 0}, "tasks of at least 1, got 0"),
        ({"rotations": (0, 4)}, r"rotations are quarter turns .* got \(0, 4\)"),
        ({"rotations": ()}, "rotations are quarter turns"),
        ({"rotations": (0, 0)}, r"named once, got \(0, 0\)"),
        ({"rotations": (1, 2, 1)}, r"named once, got \(1, 2, 1\)"),
        ({"balance": 0.0}, "balance > 0"),
        ({"seed": -1}, "seed >= 0"),
    ],
)
def test_episodes_that_cannot_be(coded, wrong, says):
    with pytest.raises(InputError, match=says):
        Episodes(coded(), **{"ways": 3, "shots": 1, "queries": 3, **wrong})


def test_quarter_turns_need_square_images():
    dataset = Dataset.from_arrays(np.zeros((8, 4, 6, 1), np.uint8), np.arange(8) % 2)
    with pytest.raises(InputError, match="square images, got 4 × 6"):
        Episodes(dataset, ways=2, shots=1, queries=1, rotations=RIGHT_ANGLES)
    assert Episodes(dataset, ways=2, shots=1, queries=1, rotations=(0, 2)).classes == 4


def test_classes_of_the_parts_are_disjoint(coded):
    dataset = coded()
    parts = split_classes(dataset, (2, 1, 1), seed=4)
    kinds = [set(part.labels.tolist()) for part in parts]
    assert [len(kind) for kind in kinds] == [2, 1, 1]
    assert len(set.union(*kinds)) == 4
    assert 1 not in set.union(*kinds), "a class without examples was chosen"
    for part, kind in zip(parts, kinds, strict=True):
        assert part.class_names == dataset.class_names
        assert len(part) == sum(COUNTS[k] for k in kind)
    assert [set(p.labels.tolist()) for p in split_classes(dataset, (2, 1, 1), seed=4)] == kinds
    assert len({tuple(split_classes(dataset, (2,), seed=seed)[0].labels) for seed in range(8)}) > 1
    assert set(split_classes(dataset, (3,), seed=None)[0].labels.tolist()) == {0, 2, 3}
    with pytest.raises(InputError, match="5 classes with examples"):
        split_classes(dataset, (4, 2))
    with pytest.raises(InputError, match="at least 1 class"):
        split_classes(dataset, (4, 0))
