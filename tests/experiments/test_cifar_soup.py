"""Soups in the tiny form: runs train and resume, the greedy soup is not worse than its best run on labels held out."""

import json

import pytest

import jaxtransfer as jt
from experiments import cifar_soup
from experiments.cifar_soup import Bench, Experiment, table_of

pytestmark = pytest.mark.usefixtures("offline")


@pytest.mark.slow
def test_it_runs_and_resumes(tmp_path):
    tiny = Experiment(out=tmp_path, tiny=True, rates=(0.01, 0.03))
    results = cifar_soup.main(tiny)
    names = list(results)
    assert names[:3] == ["linear probe", "run 0, rate 0.01", "run 1, rate 0.03"]
    (greedy,) = (own for name, own in results.items() if name.startswith("greedy soup"))
    (best,) = (own for name, own in results.items() if name.startswith("best run"))
    assert greedy["held out"] >= best["held out"] == max(results[name]["held out"] for name in names[1:3])
    assert "not renewed" in results["uniform soup"]
    assert "| uniform soup |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "soup.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "results.json").read_text())["results"] == results
    assert cifar_soup.main(tiny) == results


@pytest.mark.slow
def test_the_classes_are_the_first_ones_and_held_out_labels_are_not_trained_on(tmp_path):
    bench = Bench(Experiment(out=tmp_path, tiny=True, model="resnet8", data="digits/noisy", classes=4))
    assert bench.train_data.class_names == bench.test.class_names == ("0", "1", "2", "3")
    assert {*bench.train_data.labels, *bench.held.labels} == {0, 1, 2, 3}
    images = [{row.tobytes() for row in one.column("image")} for one in (bench.train_data, bench.held)]
    assert not images[0] & images[1]
    assert sum(map(len, images)) == 100


def test_the_table():
    own = {"held out": 50.0, "test": 40.06}
    header, rows = table_of({"one": own, "two": {**own, "not renewed": 3.0}})
    assert rows == [["one", "50.0", "40.1", ""], ["two", "50.0", "40.1", "3.0"]]
    assert len(header) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "--weights is the published file"),
        ({"tiny": True, "rates": (0.1,)}, "--rates are two or more"),
        ({"weights": "x", "model": "vgg"}, "--model is a CIFAR ResNet"),
        ({"tiny": True, "rates": (0.1, -1.0)}, "positive"),
    ],
)
def test_what_it_refuses(tmp_path, changes, message):
    with pytest.raises(jt.InputError, match=message):
        cifar_soup.main(Experiment(**{"out": tmp_path / "out", **changes}))
    assert not (tmp_path / "out").exists()
