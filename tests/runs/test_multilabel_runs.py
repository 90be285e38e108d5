"""Runs whose labels hold together: what they note, and what is made of them by sigmoids."""

import csv
import json

import cv2
import jax
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.cli import main

NAMES = ["ant", "bee", "cat"]
pytestmark = pytest.mark.usefixtures("undrawn")


def fitted(out, columns, class_names, label="label", **options):
    """A run of one step on images of 4×4; its model and its images."""
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 1), dtype=np.uint8)
    data = jt.data.Dataset.from_columns({"image": images, **columns}, class_names=class_names)
    net = jt.models.normalize(jt.models.mlp(3, hidden=()), 0.5, 0.25)
    objective = options.pop("objective", jt.multilabel_classification)(net, label=label)
    jt.fit(objective, optax.sgd(0.1), jt.data.pipeline(data, 6), steps=1, out=out, model=net, dataset=data, **options)
    return images


@pytest.fixture(scope="module")
def hot():
    return np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 0], [0, 1, 1]])


@pytest.fixture(scope="module")
def tagged(hot, tmp_path_factory):
    """A run whose labels are in a column of another name."""
    out = tmp_path_factory.mktemp("runs") / "tags"
    return out, fitted(out, {"labels": hot}, {"labels": NAMES}, "labels")


def sigmoids(out, images):
    run = jt.load_run(out)
    logits = run.model.apply(run.variables, images, train=False, key=None)[0]["logits"]
    return 1 / (1 + np.exp(-np.asarray(logits, np.float64)))


@pytest.mark.slow
def test_the_names_are_those_of_the_column_that_is_read(tagged, hot, tmp_path):
    run = jt.load_run(tagged[0])
    assert (run.knows, run.class_names) == (("labels",), tuple(NAMES))
    assert "3 labels" in repr(run)
    fitted(tmp_path / "usual", {"label": hot}, {"label": NAMES})
    assert jt.load_run(tmp_path / "usual").knows == ("labels",)
    fitted(tmp_path / "unnamed", {"label": hot}, {})
    assert jt.load_run(tmp_path / "unnamed").class_names == ("0", "1", "2")
    fitted(
        tmp_path / "one",
        {"label": [0] * 6, "kind": hot.sum(1) % 3},
        {"kind": NAMES},
        "kind",
        objective=jt.classification,
    )
    run = jt.load_run(tmp_path / "one")
    assert (run.knows, run.class_names) == (("classes",), tuple(NAMES))
    fitted(tmp_path / "apart", dict(zip(NAMES, hot.T, strict=True)), {}, NAMES)
    assert jt.load_run(tmp_path / "apart").class_names == tuple(NAMES)
    with pytest.raises(jt.InputError, match="has 2 class names, and is read as 3 labels"):
        fitted(tmp_path / "two", {"label": hot}, {"label": ["no", "yes"]})


@pytest.mark.slow
def test_other_outputs_and_columns_name_nothing_of_the_logits(hot, tmp_path):
    """Heads beside the logits have other classes; labels made of those of the data set keep their names."""
    kinds = {"label": [0, 1, 2, 0, 1, 2], "color": [0, 1] * 3, "noisy": np.array([0, 1, 2, 2, 1, 0])}
    names = {"label": NAMES, "color": ["red", "blue"]}

    def noted(number, objective, **columns):
        fitted(tmp_path / str(number), {**kinds, **columns}, names, objective=objective)
        run = jt.load_run(tmp_path / str(number))
        return run.knows, run.class_names

    def color(net):
        return jt.classification(net, output="features", label="color").named("color")

    known = (("classes",), tuple(NAMES))
    assert noted(0, lambda net, label: color(net)) == known
    assert noted(1, lambda net, label: color(net) + jt.classification(net)) == known
    assert noted(2, lambda net, label: jt.classification(net, label="noisy")) == known


def test_predict_gives_the_sigmoid_of_each_label(tagged, tmp_path, capsys):
    out, images = tagged
    cv2.imwrite(str(tmp_path / "a.png"), images[0])
    expected = dict(zip(NAMES, sigmoids(out, images[:1])[0], strict=True))
    assert main(["predict", str(out), str(tmp_path / "a.png")]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line.keys() == {"image", "labels"}
    assert line["labels"] == pytest.approx(expected, abs=2e-6)
    table = tmp_path / "a.csv"
    assert main(["predict", str(out), str(tmp_path / "a.png"), "--top", "2", "--out", str(table)]) == 0
    (row,) = csv.DictReader(table.read_text().splitlines())
    best = sorted(NAMES, key=lambda name: -expected[name])
    assert [row["label"], row["label_2"]] == best[:2]
    assert float(row["probability_2"]) == pytest.approx(expected[best[1]], abs=2e-6)


def test_a_program_gives_the_sigmoid_of_each_label(tagged, tmp_path):
    pytest.importorskip("flatbuffers")
    out, images = tagged
    jt.export_program(out, tmp_path / "net", platforms=("cpu",))
    program = jax.export.deserialize(bytearray((tmp_path / "net" / "program.jax").read_bytes()))
    got = program.call(dict(np.load(tmp_path / "net" / "weights.npz")), images)["probabilities"]
    np.testing.assert_allclose(got, sigmoids(out, images), atol=1e-6)
    about = json.loads((tmp_path / "net" / "about.json").read_text())
    assert (about["probabilities"], about["class_names"]) == ("sigmoid", NAMES)


@pytest.mark.parametrize(
    "words",
    [
        ("evaluate", "RUN"),
        ("finetune", "--from", "RUN", "--keep-head", "--data", "digits/upright", "--out", "x"),
        ("distill", "--teacher", "RUN", "--data", "digits/upright", "--out", "x"),
    ],
)
def test_commands_of_classes_refuse_it(tagged, words, capsys):
    assert main([str(tagged[0]) if word == "RUN" else word for word in words]) == 2
    assert "a run of labels that hold together" in capsys.readouterr().err


def test_weights_that_leave_it_and_come_back_are_of_labels(tagged, tmp_path, capsys):
    """Through a file of safetensors, and through `convert`; also of Hugging Face's `problem_type`."""
    file = tmp_path / "a" / "model.safetensors"
    jt.export_weights(tagged[0], file)
    net = jt.models.mlp(3, hidden=())
    image = jax.ShapeDtypeStruct((1, 4, 4, 1), np.float32)
    loaded = jt.load_pretrained(file, net, inputs=image)
    assert (loaded.labels, loaded.class_names) == (True, tuple(NAMES))
    run = jt.pretrained.run_of(loaded, image_shape=(4, 4, 1))
    assert run.knows == ("labels",)
    assert main(["inspect", str(file)]) == 0
    assert "3 labels: ant, bee, cat" in capsys.readouterr().out
    (tmp_path / "config.json").write_text(json.dumps({"problem_type": "multi_label_classification"}))
    assert jt.pretrained.facts.beside(tmp_path / "model.bin").labels


def test_a_run_of_before_labels_were_known_is_resumed_and_noted_anew(hot, tmp_path):
    def go():
        fitted(tmp_path / "a", {"label": hot}, {"label": NAMES})

    go()
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "knows": ["classes"]}))
    go()
    assert jt.load_run(tmp_path / "a").knows == ("labels",)
