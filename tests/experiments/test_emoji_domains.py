"""Emoji of four vendors in the tiny form: emoji are held out of all vendors alike, each method trains and resumes."""

import dataclasses
import json

import numpy as np
import pytest

import jaxtransfer as jt
from experiments import emoji_domains
from experiments.emoji_domains import TOLD, VENDORS, Bench, Experiment

pytestmark = pytest.mark.usefixtures("offline")


@pytest.mark.slow
def test_a_third_of_each_group_is_held_out(tmp_path):
    bench = Bench(Experiment(out=tmp_path, tiny=True))
    held, labels = bench.held_out(0), bench.emoji["noto"].labels
    for group in np.unique(labels):
        own = labels == group
        assert held[own].sum() == round(own.sum() / 3)
    assert np.any(held != bench.held_out(1))
    assert all(np.array_equal(one.column("emoji"), np.arange(60)) for one in bench.emoji.values())


@pytest.mark.slow
@pytest.mark.parametrize("methods", [("erm", "mcc"), ("mldg", "dann")])
def test_it_runs_and_resumes(tmp_path, methods, capsys):
    tiny = Experiment(out=tmp_path, tiny=True, methods=methods)
    results = emoji_domains.main(tiny)
    for by_method in (results["last"], results["averaged"]):
        assert list(by_method) == list(methods)
        for by_vendor in by_method.values():
            assert list(by_vendor) == list(VENDORS[:2])
            assert all(set(one["0"]) == set(TOLD) for one in by_vendor.values())
            assert all(0 <= value <= 100 for one in by_vendor.values() for value in one["0"].values())
    assert methods[0] in capsys.readouterr().out
    assert f"| {methods[1]} *, averaged |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "results.json").read_text())["last"] == results["last"]
    again = emoji_domains.main(tiny)
    assert (again["last"], again["averaged"]) == (results["last"], results["averaged"])
    assert not again["seconds"]


def test_refusals(tmp_path):
    for changes, message in (
        ({"methods": ("emr",)}, "unknown method"),
        ({"vendors": ("apple",)}, "unknown vendor"),
        ({"methods": ()}, "--methods needs"),
        ({"rate": 0}, "--rate must be positive"),
    ):
        with pytest.raises(jt.InputError, match=message):
            emoji_domains.main(dataclasses.replace(Experiment(out=tmp_path), **changes))
