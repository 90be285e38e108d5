"""Tasks of several data sets as one, labels that are missing, and how often each task is seen."""

import itertools
from typing import Any

import numpy as np
import pytest

import jaxtransfer as jt
from jaxtransfer.data.sources import ListSource


def made(rng, count, classes, *, side=4, name="set"):
    images = rng.integers(0, 256, (count, side, side, 1)).astype(np.uint8)
    labels = np.arange(count) % classes
    return jt.data.Dataset.from_arrays(images, labels, name=name, split="train")


def with_gaps(rng, labels, names=("no", "yes")):
    """A data set as tfds reads one, whose class is -1 where there is none."""
    image = rng.integers(0, 256, (len(labels), 4, 4, 1)).astype(np.uint8)
    examples = [{"image": one, "smile": label} for one, label in zip(image, labels, strict=True)]
    entries = {
        "image": jt.data.Entry((4, 4, 1), np.dtype(np.uint8)),
        "smile": jt.data.Entry((), np.dtype(np.int32), names),
    }
    return jt.data.Dataset("faces", "train", source=ListSource(examples), entries=entries), image


def test_examples_stand_one_after_another_each_with_the_label_of_its_task(rng):
    one, two = made(rng, 5, 3, name="a"), made(rng, 3, 2, name="b")
    both = jt.data.joined(letters=one, digits=two)
    assert len(both) == 8
    assert both.entries["letters"].class_names == ("0", "1", "2")
    assert both.entries["task"].class_names == ("letters", "digits")
    order = [6, 0, 4, 7, 0]
    batch = both.read(order)
    images = np.concatenate([one.column("image"), two.column("image")])
    np.testing.assert_array_equal(batch["image"], images[order])
    np.testing.assert_array_equal(batch["letters"], [0, 0, 1, 0, 0])
    np.testing.assert_array_equal(batch["has_letters"], [0, 1, 1, 0, 1])
    np.testing.assert_array_equal(batch["digits"], [1, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch["has_digits"], [1, 0, 0, 1, 0])
    np.testing.assert_array_equal(batch["task"], [1, 0, 0, 1, 0])
    np.testing.assert_array_equal(both[7]["image"], images[7])
    held = both.decoded()
    assert held.in_memory
    np.testing.assert_array_equal(held.read(order)["image"], batch["image"])
    assert jt.data.fingerprint(both)["examples"] == 8


def test_missing_labels_are_told_and_never_dropped(rng):
    data, image = with_gaps(rng, [1, -1, 0, -1, 1])
    with pytest.raises(jt.InputError, match="-1"):
        data.column("smile")
    known = jt.data.known_labels(data, ("smile",))
    assert len(known) == 5
    batch = known.read([4, 1, 2])
    np.testing.assert_array_equal(batch["smile"], [1, 0, 0])
    np.testing.assert_array_equal(batch["has_smile"], [1, 0, 1])
    np.testing.assert_array_equal(batch["image"], image[[4, 1, 2]])
    assert known.entries["smile"].class_names == ("no", "yes")
    chosen = jt.data.known_labels(data.select([1, 4]), ("smile",))
    np.testing.assert_array_equal(chosen.column("has_smile"), [0, 1])
    whole = with_gaps(rng, [1, 0])[0]
    assert jt.data.known_labels(whole, ("smile",)) is whole
    both = jt.data.joined({"face": data, "other": data}, label="smile")
    np.testing.assert_array_equal(both.column("has_face"), [1, 0, 1, 0, 1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(both.column("has_other"), [0, 0, 0, 0, 0, 1, 0, 1, 0, 1])
    with pytest.raises(jt.InputError, match="example 1 has 'smile' 7"):
        jt.data.known_labels(with_gaps(rng, [-1, 7])[0], ("smile",))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 5.0, float("inf")])
def test_weights_are_powers_of_the_sizes(rng, temperature):
    both = jt.data.joined(a=made(rng, 40, 2), b=made(rng, 9, 3), c=made(rng, 1, 1))
    weights = jt.data.temperature_weights(both, temperature)
    sizes = np.array([40, 9, 1])
    powers = sizes ** (1 / temperature)
    shares = [weights[both.column("task") == number].sum() for number in range(3)]
    np.testing.assert_allclose(shares, powers / powers.sum(), rtol=1e-12)
    for number in range(3):
        own = weights[both.column("task") == number]
        np.testing.assert_allclose(own, own[0])


def test_tasks_are_seen_by_their_shares_and_a_run_goes_on_where_it_stopped(rng):
    both = jt.data.joined(a=made(rng, 48, 2), b=made(rng, 12, 3))
    weights = jt.data.temperature_weights(both, 2.0)  # shares 2/3 and 1/3
    batches = jt.data.pipeline(both, 12, balance=weights, threads=0)
    whole = both.with_columns({"row": np.arange(60)})
    numbered = jt.data.pipeline(whole, 12, balance=weights, threads=0)
    for epoch in range(4):
        rows = np.concatenate([numbered.batch(5 * epoch + number)["row"] for number in range(5)])
        counts = np.bincount(rows, minlength=60)
        assert set(counts[:48]) <= {0, 1}  # 40 / 48 each
        assert set(counts[48:]) <= {1, 2}  # 20 / 12 each
        assert abs(counts[48:].sum() - 20) <= 4
    rows = [batch["image"] for batch in itertools.islice(batches.iterate(0), 9)]
    for number, batch in enumerate(itertools.islice(batches.iterate(7), 2), 7):
        np.testing.assert_array_equal(batch["image"], rows[number])
        np.testing.assert_array_equal(batch["task"], batches.batch(number)["task"])
    by_class = jt.data.temperature_weights(made(rng, 30, 3), float("inf"), by="label")
    np.testing.assert_allclose(by_class, 1 / 30)


def test_what_has_no_meaning_is_refused(rng):
    one = made(rng, 5, 3)
    both = jt.data.joined(a=one)
    text: Any = "mnist"
    for call, message in (
        (lambda: jt.data.joined(), "got none"),
        (lambda: jt.data.joined(image=one), "can't be called 'image'"),
        (lambda: jt.data.joined(weight=one, other=one), "can't be called 'weight'"),
        (lambda: jt.data.joined(task=one), "can't be called 'task'"),
        (lambda: jt.data.joined({"a": one, "has_a": one}), "can't be called 'has_a'"),
        (lambda: jt.data.joined(a=one, b=made(rng, 2, 2, side=5)), "must be alike"),
        (lambda: jt.data.joined(a=text), "joined takes a jt.data.Dataset"),
        (lambda: jt.data.joined(a=one, label="lable"), "no column 'lable'"),
        (lambda: jt.data.known_labels(one, ("image",)), "one class per example"),
        (lambda: jt.data.temperature_weights(both, 0.0), "must be positive; got 0.0"),
        (lambda: jt.data.temperature_weights(both, float("nan")), "must be positive; got nan"),
        (lambda: jt.data.temperature_weights(both, 1.0, by="has_a"), "a column of classes"),
        (lambda: jt.data.temperature_weights(one, 1.0), "no column 'task'"),
    ):
        with pytest.raises(jt.InputError, match=message):
            call()
