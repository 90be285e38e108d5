"""Ants and bees in the tiny form, on digits of two kinds: the probe's head is what fine-tuning starts from."""

import json

import numpy as np
import pytest

import jaxtransfer as jt
from experiments import hymenoptera
from experiments.hymenoptera import Bench, Experiment

pytestmark = pytest.mark.usefixtures("offline")


@pytest.mark.slow
def test_it_runs_and_resumes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hymenoptera, "device_mesh", lambda: None)  # to compile for eight devices takes long
    tiny = Experiment(out=tmp_path, tiny=True, seeds=1, batch_size=4)
    results = hymenoptera.main(tiny)
    assert set(results) == set(hymenoptera.METHODS)
    assert all(0 <= one["accuracy"] <= 100 for by_seed in results.values() for one in by_seed.values())
    assert "linear-probe" in capsys.readouterr().out
    assert "| fine-tune |" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["results"] == results
    again = hymenoptera.main(tiny)
    assert [again[m]["0"]["accuracy"] for m in again] == [results[m]["0"]["accuracy"] for m in results]


@pytest.mark.slow
def test_the_probe_is_a_head(tmp_path):
    bench = Bench(Experiment(out=tmp_path, tiny=True))
    rng = np.random.default_rng(0)
    for part, data in (("train", bench.train), ("test", bench.test)):
        values = rng.normal(size=(len(data), 6)).astype(np.float32)
        values[:, 0] += 2 * data.labels
        bench._features[part] = jt.representation.Embedded(values, data.labels)
    accuracy, head = bench.probe(0)
    test = bench.features("test")
    right = (test.features @ head["kernel"] + head["bias"]).argmax(1) == test.labels
    assert 100 * right.mean() == pytest.approx(accuracy)
    assert head["kernel"].shape == (6, 2)
    assert head["kernel"].dtype == head["bias"].dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"methods": ("probe",)}, "unknown method"), ({"seeds": 0}, "--seeds must be positive"), ({"rate": 0}, "--rate")],
)
def test_refusals(tmp_path, changes, message):
    with pytest.raises(jt.InputError, match=message):
        hymenoptera.main(Experiment(**{"out": tmp_path / "out", "tiny": True, **changes}))
    assert not (tmp_path / "out").exists()
