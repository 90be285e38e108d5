"""The experiment on sentences: what it refuses, and its tiny form."""

import dataclasses
import json

import pytest

import jaxtransfer as jt
from experiments import finetune_sentences


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("ful",)}, "unknown method 'ful'"),
        ({"methods": ()}, "--methods needs at least one"),
        ({"lr": 0.0}, "--lr must be positive"),
        ({}, "--data: name a table of sentences"),
        ({"model": "resnet20"}, "unknown text encoder 'resnet20'"),
    ],
)
def test_what_cant_be_is_refused_before_anything_is_read(options, message):
    with pytest.raises(jt.InputError, match=message):
        finetune_sentences.main(finetune_sentences.Experiment(**options))


def test_the_interval_of_three_seeds():
    assert finetune_sentences.half_width([1.0, 2.0, 3.0]) == pytest.approx(4.30 / 3**0.5)
    assert finetune_sentences.half_width([1.0]) == float("inf")


@pytest.mark.slow
def test_tiny(tmp_path):
    experiment = finetune_sentences.Experiment(out=tmp_path, seeds=1, tiny=True)
    first = finetune_sentences.main(experiment)
    assert set(first["runs"].values()) == {"trained"}
    assert (tmp_path / "results.png").read_bytes()[:4] == b"\x89PNG"
    assert "| l2-sp |" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["accuracy"].keys() == finetune_sentences.METHODS.keys()
    again = finetune_sentences.main(experiment)
    assert set(again["runs"].values()) == {"already done"}
    assert again["accuracy"] == first["accuracy"]
    with pytest.raises(jt.InputError, match="holds a run of another configuration"):
        finetune_sentences.main(dataclasses.replace(experiment, lr=0.1))
