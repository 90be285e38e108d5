"""CIFAR-10 → CIFAR-100 in its tiny form: every method runs, the strength is chosen off the test set, it resumes."""

import dataclasses
import json
import math

import numpy as np
import pytest

import jaxtransfer as jt
from experiments import finetune_cifar100
from experiments.finetune_cifar100 import Bench, Experiment, settled

pytestmark = pytest.mark.usefixtures("offline")


@pytest.mark.slow
def test_every_method_runs_and_resumes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(finetune_cifar100, "device_mesh", lambda: None)  # to compile for eight devices takes long
    tiny = Experiment(out=tmp_path, tiny=True, strengths=(0.01, 1.0))
    results = finetune_cifar100.main(tiny)
    accuracies = results["accuracy"]["5"]
    assert set(accuracies) == set(finetune_cifar100.METHODS)
    assert all(0 <= value <= 100 for by_seed in accuracies.values() for value in by_seed.values())
    assert results["strength"]["5, seed 0"] in tiny.strengths
    assert "linear-probe" in capsys.readouterr().out
    page = (tmp_path / "report.md").read_text()
    assert all(f"| {method} |" in page for method in accuracies)
    assert (tmp_path / "strength.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "results.json").read_text())["accuracy"] == results["accuracy"]

    again = finetune_cifar100.main(tiny)
    assert again["accuracy"] == results["accuracy"]
    assert not again["seconds"], "a run was trained again"
    with pytest.raises(jt.InputError, match="another configuration"):
        finetune_cifar100.main(dataclasses.replace(tiny, decay=0.1, methods=("full",), rate=0.3, finetune_rate=0.3))


@pytest.mark.slow
def test_the_probe_and_what_is_held_out(tmp_path):
    """The head of the probe is what lp-ft starts from; the held-out rows are apart from those that are trained on."""
    bench = Bench(settled(Experiment(out=tmp_path, tiny=True), finetune_cifar100.METHODS))
    rows = bench.rows(5, 0)
    accuracy, head = bench.probe(rows, 5, 0)
    assert 10 < accuracy <= 100
    kit = finetune_cifar100.Kit(bench.model, bench.pretrained, bench.experiment, 3, probe=lambda: head)
    start = finetune_cifar100.METHODS["lp-ft"](kit).start
    columns = bench.features("test")
    logits = columns.column("features") @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    assert 100 * np.mean(logits.argmax(1) == columns.labels) == pytest.approx(accuracy)
    np.testing.assert_array_equal(start["params"]["head"]["kernel"], head["kernel"])
    body = {k: v for k, v in start["params"].items() if k != "head"}
    assert body.keys() == bench.pretrained["params"].keys() - {"head"}

    labels = bench.train_data.labels
    assert np.bincount(labels[rows]).tolist() == [5] * 10
    assert len(set(rows.tolist())) == 50
    seen = []
    bench.fit = lambda name, method, rows, test, *rest: seen.append((rows, test)) or math.log(1 + len(seen))
    best = bench.choose(5, 0)
    assert best == bench.experiment.strengths[-1]
    fitted, held = seen[0]
    assert (len(fitted), len(held)) == (40, 10)
    left = np.setdiff1d(rows, fitted)
    np.testing.assert_array_equal(held.read(np.arange(10))["image"], bench.train_data.read(left)["image"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("l2sp",)}, "did you mean 'l2-sp'"),
        ({"methods": ()}, "at least one"),
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"tiny": False}, "--weights"),
        ({"tiny": False, "weights": "x", "epochs": (1,)}, "one number for each"),
        ({"tiny": False, "weights": "x", "model": "vgg"}, "resnet56"),
        ({"strengths": (-1.0,)}, "negative"),
        ({"rate": 0.0}, "--rate must be positive"),
        ({"choose_at": 7}, "--choose-at is one of"),
    ],
)
def test_refusals(tmp_path, changes, message):
    with pytest.raises(jt.InputError, match=message):
        finetune_cifar100.main(Experiment(**{"out": tmp_path / "out", "tiny": True, **changes}))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_help(module):
    code, out, _ = module("experiments.finetune_cifar100", "--help")
    assert code == 0
    assert all(option in out for option in ("--weights", "--strengths", "--choose-at", "--tiny"))
