"""The hospitals in the tiny form: what is known is not trained again, a table is written, bad use is one line."""

import dataclasses
import json

import numpy as np
import pytest

import jaxtransfer as jt
from experiments import heart_hospitals
from experiments.heart_hospitals import CATEGORIES, METHODS, NUMBERS, Experiment, drawn, read


def test_the_regression_learns_one_hospital_and_is_kept(tmp_path, capsys):
    experiment = Experiment(out=tmp_path, tiny=True, methods=("logistic",))
    results = heart_hospitals.main(experiment)
    assert list(results["logistic"]) == ["north → south", "south → north"]
    assert all(one["0"][0] > 60 for one in results["logistic"].values())
    assert "| logistic |" in (tmp_path / "report.md").read_text()
    kept = json.loads((tmp_path / "results.json").read_text())
    kept["results"]["logistic"]["north → south"]["0"] = [12.5, 12.5]
    (tmp_path / "results.json").write_text(json.dumps(kept))
    assert heart_hospitals.main(experiment)["logistic"]["north → south"]["0"] == [12.5, 12.5]
    with pytest.raises(jt.InputError, match="made with other settings"):
        heart_hospitals.main(dataclasses.replace(experiment, rate=0.1))


@pytest.mark.slow
def test_all_methods_run_and_resume(tmp_path):
    first = heart_hospitals.main(Experiment(out=tmp_path, tiny=True, seeds=1))
    assert list(first) == list(METHODS)
    assert all(0 <= one["0"][0] <= 100 for by_pair in first.values() for one in by_pair.values())
    again = heart_hospitals.main(Experiment(out=tmp_path, tiny=True, seeds=2))
    assert again["dan"]["north → south"]["0"] == first["dan"]["north → south"]["0"]
    assert sorted(again["dan"]["north → south"]) == ["0", "1"]


def test_a_cholesterol_of_nothing_is_missing(tmp_path):
    frame = drawn()
    frame.loc[3, "chol"] = 0
    frame.to_csv(tmp_path / "table.tsv", sep="\t", index=False)
    found = read(tmp_path / "table.tsv")
    assert list(np.flatnonzero(found["chol"].isna())) == [3]
    assert list(found.columns) == ["domain", "label", *NUMBERS, *CATEGORIES]


def test_what_cant_be_is_refused(tmp_path):
    for changes, message in (
        ({"methods": ("dam",)}, "unknown method 'dam'"),
        ({"seeds": 0}, "--seeds must be positive"),
        ({}, "--table names the hospitals' TSV file"),
    ):
        with pytest.raises(jt.InputError, match=message):
            heart_hospitals.main(Experiment(**{"out": tmp_path / "out", **changes}))
    drawn().drop(columns="thal").to_csv(tmp_path / "table.tsv", sep="\t", index=False)
    with pytest.raises(jt.InputError, match="no column 'thal'"):
        read(tmp_path / "table.tsv")
    assert not (tmp_path / "out").exists()
