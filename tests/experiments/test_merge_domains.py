"""Experts merged: the tiny form trains, merges by each method, resumes; scales are chosen by held-out labels."""

import json

import numpy as np
import pytest

import jaxtransfer as jt
from experiments import merge_domains
from experiments.merge_domains import METHODS, SCALES, Bench, Experiment, table_of

pytestmark = pytest.mark.usefixtures("offline")


@pytest.mark.slow
def test_it_merges_and_resumes(tmp_path):
    tiny = Experiment(out=tmp_path, tiny=True, methods=("uniform average",))
    results = merge_domains.main(tiny)
    assert set(results) == {
        "base", "expert of upright", "expert of rotated", "each expert at home", "joint", "uniform average",
    }  # fmt: skip
    home = results["each expert at home"]
    assert home["digits/rotated"] == results["expert of rotated"]["digits/rotated"]
    assert home["mean"] == pytest.approx((home["digits/upright"] + home["digits/rotated"]) / 2)
    assert "not renewed" in results["uniform average"]
    assert "| uniform average |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "results.json").read_text())["results"] == results
    steps = sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("checkpoints/step_*"))
    assert merge_domains.main(tiny) == results
    assert sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("checkpoints/step_*")) == steps


@pytest.mark.slow
def test_every_method_runs(tmp_path):
    results = merge_domains.main(Experiment(out=tmp_path, tiny=True))
    for method in METHODS:
        assert any(name.partition(",")[0] == method for name in results)
    assert all(0 <= value <= 100 for own in results.values() for value in own.values())


@pytest.mark.slow
def test_nothing_is_held_out_and_trained_on(tmp_path):
    bench = Bench(Experiment(out=tmp_path, tiny=True, domains=("digits/noisy", "digits/upright")))
    assert all("label" not in one.entries for one in bench.unlabelled.values())
    for name in bench.train:
        rows = [one.column("image").reshape(len(one), -1) for one in (bench.train[name], bench.held[name])]
        assert len(rows[0]) + len(rows[1]) == len(jt.data.load(name, "train"))
    noisy = [{row.tobytes() for row in one["digits/noisy"].column("image")} for one in (bench.train, bench.held)]
    assert not noisy[0] & noisy[1]


@pytest.mark.slow
def test_the_scale_is_that_of_the_best_held_out_score(tmp_path, monkeypatch):
    bench = Bench(Experiment(out=tmp_path, tiny=True))
    monkeypatch.setattr(bench, "renewed", lambda variables: variables)
    monkeypatch.setattr(bench, "_accuracy", lambda scale, batches: -abs(scale - SCALES[1]))
    assert bench.chosen(lambda scale: scale) == (SCALES[1], ", scale 0.5")


def test_the_table():
    own = {"a/x": 50.0, "a/y": 70.04, "mean": 60.02}
    header, rows = table_of({"one": own, "two": {**own, "not renewed": 12.3}})
    assert header == ["network", "x", "y", "mean", "mean, statistics not renewed"]
    assert rows == [["one", "50.0", "70.0", "60.0", ""], ["two", "50.0", "70.0", "60.0", "12.3"]]
    assert np.all([len(row) == len(header) for row in rows])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("tie",)}, "unknown method"),
        ({"domains": ("digits/noisy",)}, "--domains are two or more"),
        ({"steps": 0}, "--steps must be positive"),
    ],
)
def test_what_it_refuses(tmp_path, changes, message):
    with pytest.raises(jt.InputError, match=message):
        merge_domains.main(Experiment(**{"out": tmp_path / "out", **changes}))
    assert not (tmp_path / "out").exists()
