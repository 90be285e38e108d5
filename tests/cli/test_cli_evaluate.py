"""`evaluate` tells which classes fail and whether confidence can be trusted, on one line and in files."""

import csv
import json

import cv2
import jax
import numpy as np
import pytest
import sklearn.metrics as sk

import jaxtransfer as jt
from jaxtransfer.cli import main


def test_scores_and_files(run, source, tmp_path):
    out = tmp_path / "a" / "report"
    lines, err = run("evaluate", source, "--split", "test[:100]", "--batch-size", "64", "--out", out, "--worst", "3")
    facts = json.loads(lines[0])
    assert len(lines) == 1
    trained, test = jt.load_run(source), jt.data.load("digits/upright", "test").take(100)
    apply = jax.jit(lambda variables, x: trained.model.apply(variables, x, train=False, key=None)[0]["logits"])
    logits = np.asarray(apply(trained.variables, test.read(np.arange(100))["image"]), np.float64)
    probabilities, labels = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), test.labels
    guesses = logits.argmax(axis=1)
    expected = {
        "accuracy": sk.accuracy_score(labels, guesses),
        "top5": sk.top_k_accuracy_score(labels, logits, k=5, labels=range(10)),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, guesses),
        "macro_f1": sk.f1_score(labels, guesses, average="macro", zero_division=0),
        "nll": sk.log_loss(labels, probabilities, labels=range(10)),
        "brier": np.mean(np.sum((probabilities - np.eye(10)[labels]) ** 2, axis=1)),
    }
    assert {name: facts[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert facts["loss"] == pytest.approx(facts["nll"], rel=1e-5)
    written = json.loads((out / "evaluation.json").read_text())
    assert facts.items() <= written.items()
    gaps = [b["examples"] * abs(b["accuracy"] - b["confidence"]) for b in written["reliability"] if b["examples"]]
    assert facts["ece"] == pytest.approx(sum(gaps) / 100)
    table = list(csv.DictReader((out / "classes.csv").read_text().splitlines()))
    recalls = sk.recall_score(labels, guesses, labels=range(10), average=None)
    assert [float(row["accuracy"]) for row in table] == pytest.approx(list(recalls))
    confusion = np.array([row[1:] for row in csv.reader((out / "confusion.csv").read_text().splitlines())][1:], int)
    np.testing.assert_array_equal(confusion, sk.confusion_matrix(labels, guesses, labels=range(10)))
    for name in ("confusion.png", "reliability.png"):
        assert cv2.imread(str(out / name)) is not None
    rows = [line for line in err if line.startswith("│")]
    assert len(rows) == 3
    worst = np.argsort(recalls, kind="stable")[:3]
    assert [int(row.split()[1]) for row in rows] == list(worst)
    assert "7 more from" in err[-1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*predictions are among all")
def test_classes_without_examples_are_said(run, source, tmp_path):
    test = jt.data.load("digits/upright", "test").take(40)
    for number in np.flatnonzero(test.labels < 2):
        place = tmp_path / "images" / str(test.labels[number])
        place.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(place / f"{number}.png"), test.read([number])["image"][0])
    words = ("--data", f"folder:{tmp_path / 'images'}", "--split", "all", "--resize", "--worst", "10")
    lines, err = run("evaluate", source, *words)
    assert "8 without examples" in err[-1]
    assert json.loads(lines[0])["balanced_accuracy"] >= 0


def test_what_is_refused(refused, source, tmp_path):
    (tmp_path / "file").write_text("")
    assert "--out: expected a folder to write to" in refused("evaluate", source, "--out", tmp_path / "file")
    assert "--worst must be at least 0" in refused("evaluate", source, "--worst", "-1")


def test_a_run_that_diverged_says_so(source, tmp_path, capsys, monkeypatch):
    broken = jt.load_run(source)
    broken = broken._replace(params=jax.tree.map(lambda leaf: leaf * np.nan, broken.params))
    monkeypatch.setattr("jaxtransfer.cli.evaluate.load_run", lambda directory, **_: broken)
    assert main(["evaluate", str(source), "--split", "test[:20]"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "the logits of 20 of 20 examples are not finite" in err
    assert len(err.splitlines()) == 1
