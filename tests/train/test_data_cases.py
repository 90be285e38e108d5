"""Four users with data of their own, each from loading to evaluation in ten lines.

The real data are read where they are at hand (`TFDS_DATA_DIR`, and the tables beside it); the same lines run on data of
the same form that are made here, always.
"""

import os
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt

DATA = Path(os.environ["TFDS_DATA_DIR"]).parent if os.environ.get("TFDS_DATA_DIR") else None
HEART, SENTENCES = "plain/heart_disease_4_hospitals.tsv", "sst2.tsv"


def at_hand(name, *marks):
    absent = DATA is None or not (DATA / name).exists()
    return pytest.param(name, marks=[pytest.mark.skipif(absent, reason=f"the data {name} are not here"), *marks])


def path_of(name, make, tmp_path):
    """The file of the real data, or one that is made."""
    return make(tmp_path) if name == "made" else DATA / name


def hospitals(folder):
    """Two hospitals; one measures in another unit, and each lacks some values."""
    rng, rows = np.random.default_rng(0), ["domain\tage\tchol\tca\tnum\tlabel"]
    for place, scale in (("cleveland", 1.0), ("hungarian", 1.2)):
        for number in range(120):
            x = rng.normal(size=3)
            ill = int(x.sum() > 0)
            values = [f"{50 + 9 * x[0]:.1f}", f"{scale * (240 + 50 * x[1]):.0f}", f"{x[2]:.2f}"]
            values[2] = "" if number % 7 == 0 else values[2]
            values[1] = "" if place == "hungarian" and number % 11 == 0 else values[1]
            rows.append("\t".join([place, *values, str(3 * ill), str(ill)]))
    (folder / "heart.tsv").write_text("\n".join(rows) + "\n")
    return folder / "heart.tsv"


@pytest.mark.parametrize("name", ["made", at_hand(HEART)])
def test_a_table_of_several_hospitals(name, tmp_path):
    path = path_of(name, hospitals, tmp_path)
    how = {"label": "label", "drop": ("num",), "split_by": "domain", "train": "cleveland"}
    train = jt.data.load(f"table:{path}", "cleveland", **how)
    test = jt.data.load(f"table:{path}", "hungarian", **how)
    model = jt.models.mlp(train.classes, hidden=(16,))
    objective = jt.classification(model, view="features")
    batches = jt.data.eval_batches(test, 64)
    fitted = jt.fit(objective, optax.adam(3e-3), jt.data.pipeline(train, 32), steps=60)
    assert jt.evaluate(objective, fitted.state, batches)["accuracy"] > 0.72  # the real one 0.79, of 64 % healthy
    assert train.entries["features"].names == test.entries["features"].names
    assert "ca is missing" in train.entries["features"].names
    assert np.isfinite(test.column("features")).all()


class Words(nn.Module):
    """The mean of the word vectors, and a linear layer."""

    words: int
    classes: int

    @nn.compact
    def __call__(self, tokens):
        """Returns features and logits of `tokens` [B, T], 0 where there is no word."""
        there = (tokens > 0)[..., None].astype(jnp.float32)
        mean = jnp.sum(nn.Embed(self.words, 32)(tokens) * there, 1) / jnp.maximum(jnp.sum(there, 1), 1)
        return {"features": mean, "logits": nn.Dense(self.classes)(mean)}


def sentences(folder):
    rng, rows = np.random.default_rng(0), ["split\tlabel\ttext"]
    good, bad, other = (
        ["fine", "good", "great", "best"],
        ["dull", "bad", "poor", "worst"],
        ["a", "film", "the", "plot", "it's", "and"],
    )
    for split, count in (("train", 200), ("test", 60)):
        for _ in range(count):
            label = int(rng.integers(2))
            said = [*rng.choice(other, rng.integers(2, 8)), *rng.choice(good if label else bad, 2)]
            rows.append(f"{split}\t{label}\t{' '.join(rng.permutation(said))}")
    (folder / "reviews.tsv").write_text("\n".join(rows) + "\n")
    return folder / "reviews.tsv"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["made", at_hand(SENTENCES, pytest.mark.slow)])
def test_sentences(name, tmp_path):
    path = path_of(name, sentences, tmp_path)
    train = jt.data.load(f"table:{path}", "train", label="label", tokens="text")
    test = jt.data.load(f"table:{path}", "test", label="label", tokens="text")
    model = jt.models.linen(Words(train.entries["tokens"].classes, train.classes))
    objective = jt.classification(model, view="tokens")
    steps = 60 if name == "made" else 300
    fitted = jt.fit(objective, optax.adam(1e-2), jt.data.pipeline(train, 64), steps=steps)
    found = jt.evaluate(objective, fitted.state, jt.data.eval_batches(test, 256))
    assert found["accuracy"] > (0.9 if name == "made" else 0.78)
    assert len(test) == (60 if name == "made" else 1821)


def pictures(split, size, image, classes, shape=()):
    """Images that show the first of the labels by their brightness, those of pixels by each pixel's."""
    rng = np.random.default_rng([len(split), size])
    labels = {key: rng.integers(0, count, (size, *shape)) for key, count in classes.items()}
    shown = next(iter(labels.values())).reshape(size, *(shape or (1, 1)), 1)
    pixels = (rng.integers(0, 40, (size, *image)) + 60 * shown).astype(np.uint8)
    names = {key: [f"{key} {k}" for k in range(count)] for key, count in classes.items()}
    return jt.data.Dataset.from_columns({"image": pixels, **labels}, class_names=names, split=split)


FACES = ("person", "pose", "expression", "eyes")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["made", at_hand("tfds/cmu_faces", pytest.mark.slow)])
def test_several_labels(name):
    def load(split):
        if name != "made":
            return jt.data.load("cmu_faces", split, label=FACES)
        return pictures(split, 60, (12, 10, 1), dict(zip(FACES, (3, 4, 4, 2), strict=True)))

    train, test = load("train"), load("test")
    body = jt.models.mlp(2, hidden=(64,))
    heads = {label: jt.models.head(train.entries[label].classes) for label in FACES}
    model = jt.models.normalize(jt.models.with_heads(body, **heads), 0.4, 0.3)
    terms = [jt.classification(model, output=label, label=label).named(label) for label in FACES]
    objective = sum(terms)  # one run of the body
    fitted = jt.fit(objective, optax.adam(1e-3), jt.data.pipeline(train, 32), steps=100)
    found = jt.evaluate(objective, fitted.state, jt.data.eval_batches(test, 64))
    assert {f"{label}/accuracy" for label in FACES} <= found.keys()
    assert found["person/accuracy"] > (0.9 if name == "made" else 0.5)


class Dense(nn.Module):
    """A class for each pixel of what it and its neighbours look like."""

    classes: int

    @nn.compact
    def __call__(self, image):
        """Returns `pixels` [B, H, W, classes]."""
        x = nn.relu(nn.Conv(16, (5, 5))(image.astype(jnp.float32) / 255))
        return {"pixels": nn.Conv(self.classes, (3, 3))(x)}


def segmentation(model, void):
    """(1/n) Σᵢ of the mean cross-entropy over the pixels of image i that are not void, and the share that is right."""
    forward = jt.Forward.of(model)

    def loss(outputs, params, state, batch, ctx):
        scores, labels = jax.nn.log_softmax(outputs[forward]["pixels"]), batch["ground"].astype(jnp.int32)
        there = (labels != void).astype(scores.dtype)
        count = jnp.maximum(jnp.sum(there, (1, 2)), 1)
        entropy = -jnp.take_along_axis(scores, labels[..., None], -1)[..., 0]
        value = ctx.mean(jnp.sum(entropy * there, (1, 2)) / count, batch.get("mask"))
        right = jnp.sum((jnp.argmax(scores, -1) == labels) * there, (1, 2)) / count
        return value.value, state, {"segmentation": value, "pixels": ctx.mean(right, batch.get("mask"))}

    return jt.Objective("segmentation", (forward,), loss)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["made", at_hand("tfds/camvid", pytest.mark.slow)])
def test_classes_of_pixels(name):
    def load(split):
        if name != "made":
            return jt.data.load("camvid", split, columns={"ground": "segmentation"}, image_shape=(30, 40, 3))
        return pictures(split, 30, (15, 20, 3), {"ground": 4}, (15, 20))

    train, test = load("train"), load("test")
    model = jt.models.linen(Dense(train.entries["ground"].classes))
    objective = segmentation(model, void=train.entries["ground"].classes - 1)
    fitted = jt.fit(objective, optax.adam(1e-2), jt.data.pipeline(train, 16), steps=40 if name == "made" else 200)
    found = jt.evaluate(objective, fitted.state, jt.data.eval_batches(test, 16))
    shares = np.bincount(test.column("ground").ravel())[:-1]
    assert found["pixels"] > (0.9 if name == "made" else 1.5 * shares.max() / shares.sum())
