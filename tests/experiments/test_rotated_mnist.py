"""Rotated MNIST in its tiny form: domains are rotated sixths, each method trains and resumes, a table is written."""

import dataclasses
import json

import numpy as np
import pytest

import jaxtransfer as jt
from experiments import rotated_mnist
from experiments.rotated_mnist import Bench, Experiment, rotated

pytestmark = pytest.mark.usefixtures("offline")


def test_images_turn_counter_clockwise(rng):
    images = rng.integers(0, 255, (3, 5, 5, 1)).astype(np.uint8)
    np.testing.assert_array_equal(rotated(images, 90), np.rot90(images, axes=(1, 2)))
    np.testing.assert_array_equal(rotated(images, 0), images)


def test_domains_are_disjoint_sixths(tmp_path):
    bench = Bench(Experiment(out=tmp_path, tiny=True))
    domains = bench.domains(0)
    assert list(domains) == ["rotated00", "rotated15", "rotated30", "rotated45", "rotated60", "rotated75"]
    assert [len(one) for one in domains.values()] == [20] * 6
    images, labels = bench._images()
    assert sorted(np.concatenate([one.labels for one in domains.values()])) == sorted(labels)
    upright = domains["rotated00"].column("image")
    assert all(any(np.array_equal(image, other) for other in images) for image in upright)
    assert not np.array_equal(bench.domains(1)["rotated00"].labels, domains["rotated00"].labels)


@pytest.mark.slow
@pytest.mark.parametrize("methods", [("erm", "group_dro", "vrex"), ("coral", "irm", "fishr"), ("mldg", "mixstyle")])
def test_it_runs_and_resumes(tmp_path, methods, capsys):
    tiny = Experiment(out=tmp_path, tiny=True, methods=methods)
    results = rotated_mnist.main(tiny)
    for column in rotated_mnist.COLUMNS:
        assert list(results[column]) == list(methods)
        for by_angle in results[column].values():
            assert list(by_angle) == ["0", "15"]
            assert all(0 <= by_seed["0"] <= 100 for by_seed in by_angle.values())
    assert methods[0] in capsys.readouterr().out
    assert f"| {methods[1]}, averaged |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "results.json").read_text())["last"] == results["last"]
    again = rotated_mnist.main(tiny)
    assert (again["last"], again["averaged"]) == (results["last"], results["averaged"])
    assert not again["seconds"]


def test_refusals(tmp_path):
    for changes, message in (
        ({"methods": ("emr",)}, "unknown method"),
        ({"angles": (10,)}, "--angles are some of"),
        ({"epochs": 0}, "--epochs must be positive"),
    ):
        with pytest.raises(jt.InputError, match=message):
            rotated_mnist.main(dataclasses.replace(Experiment(out=tmp_path), **changes))
