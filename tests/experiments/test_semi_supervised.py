"""Digits from few labels in the tiny form: every method runs, is written down, and is found done."""

import json

import pytest

import jaxtransfer as jt
from experiments import semi_supervised
from experiments.semi_supervised import Experiment

pytestmark = pytest.mark.usefixtures("offline")


@pytest.mark.slow
def test_it_runs_and_resumes(tmp_path, capsys):
    tiny = Experiment(out=tmp_path, tiny=True)
    results = semi_supervised.main(tiny)
    assert tuple(results) == semi_supervised.METHODS
    assert all(0 <= one["accuracy"] <= 100 for by_seed in results.values() for one in by_seed.values())
    assert "fixmatch" in capsys.readouterr().out
    assert "| flexmatch |" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["results"] == results
    again = semi_supervised.main(tiny)
    assert [again[m]["0"]["accuracy"] for m in again] == [results[m]["0"]["accuracy"] for m in results]


def test_bad_options_are_one_line():
    with pytest.raises(jt.InputError, match=r"unknown method 'fixmach' .did you mean 'fixmatch'"):
        semi_supervised.main(Experiment(methods=("fixmach",)))
    with pytest.raises(jt.InputError, match="--shots"):
        semi_supervised.main(Experiment(shots=0))
