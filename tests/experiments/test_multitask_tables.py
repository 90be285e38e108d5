"""MultiMNIST and CMU faces in their tiny forms: how pictures are made and split, what tables say, that cells resume."""

import dataclasses
import json

import numpy as np
import pytest

import jaxtransfer as jt
from experiments import cells, cmu_faces_tasks, multi_mnist
from experiments.cmu_faces_tasks import split
from jaxtransfer.cli.registry import multitask

pytestmark = pytest.mark.usefixtures("offline")


def test_digits_lie_over_each_other(rng):
    images = rng.integers(0, 256, (5, 28, 28, 1)).astype(np.uint8)
    both = multi_mnist.overlaid(jt.data.Dataset.from_arrays(images, np.arange(5)), seed=3)
    partner = np.random.default_rng(3).permutation(5)
    np.testing.assert_array_equal(both.column("left"), np.arange(5))
    np.testing.assert_array_equal(both.column("right"), partner)
    for one, left, right in zip(both.column("image"), images, images[partner], strict=True):
        for y in range(36):
            for x in range(36):
                inked = [left[y, x, 0]] if max(y, x) < 28 else []
                inked += [right[y - 8, x - 8, 0]] if min(y, x) >= 8 else []
                assert one[y, x, 0] == max(inked, default=0)


@pytest.mark.parametrize("seed", [0, 1])
def test_new_people_test_all_but_who_they_are(seed):
    faces = cmu_faces_tasks._noise().with_columns({"number": np.arange(48)})
    parts = split(faces, 2, seed)
    train, test = parts["train"], parts["test"]
    numbers = np.concatenate([part.column("number") for part in parts.values()])
    assert sorted(numbers) == list(range(48))
    new = test.column("has_pose") == 1
    assert len(np.unique(test.column("person")[new])) == 2
    assert not set(train.column("person")) & set(test.column("person")[new])
    np.testing.assert_array_equal(test.column("has_person"), 1 - new)
    assert np.sum(~new) == 4  # a sixth of eight, at least one, of each of the others
    assert set(test.column("person")[~new]) == set(train.column("person"))
    with pytest.raises(jt.InputError, match="--held-out must be below the 6 people; got 6"):
        split(faces, 6, 0)


def test_what_a_table_says():
    def one(left, right):
        return {"left": left, "right": right, "seconds": 2.0}

    results = {
        "equal": {"0": one(90.0, 80.0), "1": one(92.0, 82.0)},
        "pcgrad": {"0": one(95.5, 91.0), "1": one(94.9, 92.8)},
        "famo": {"0": one(99.0, 80.0)},
        "imtl": {},
    }
    assert cells.means_of(results, "left") == {"equal": 91.0, "pcgrad": pytest.approx(95.2), "famo": 99.0}
    assert cells.not_below(results, ("left", "right"), "equal") == ["pcgrad"]
    assert cells.not_below(results, ("left", "right"), "imtl") == []
    header, rows = cells.table_of(results, ("left", "right"))
    assert header == ["method", "left", "right", "mean", "seconds"]
    assert rows[0] == ["equal", "91.00 (90.00, 92.00)", "81.00 (80.00, 82.00)", "86.00", "2"]
    assert rows[2:] == [["famo", "99.00", "80.00", "89.50", "2"], ["imtl", "", "", "", ""]]
    told = multi_mnist.verdict(results)
    assert "not below on both: pcgrad (1)" in told[0]
    assert "pcgrad: 95.20 / 91.90, below" in told[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "methods"), [(multi_mnist, ("equal", "pcgrad")), (cmu_faces_tasks, ("uncertainty",))]
)
def test_it_runs_and_resumes(tmp_path, capsys, experiment, methods):
    tiny = experiment.Experiment(out=tmp_path, tiny=True, seeds=1, methods=methods)
    results = experiment.main(tiny)
    assert list(results) == list(methods)
    for by_seed in results.values():
        assert all(0 <= by_seed["0"][task] <= 100 for task in experiment.TASKS)
    if "pcgrad" in results:
        assert -1 <= results["pcgrad"]["0"]["cosines"]["left and right"] <= 1
    assert methods[0] in capsys.readouterr().out
    assert f"| {methods[-1]} |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "results.json").read_text())["results"] == results
    assert experiment.main(tiny) == results
    with pytest.raises(jt.InputError, match="other settings"):
        experiment.main(dataclasses.replace(tiny, rate=1.0))


def test_methods_are_the_rules_of_the_command():
    named = {name.replace("-", "_") for name in multitask.METHODS}
    assert {*multi_mnist.RULES, "uncertainty"} == {"random_weights" if name == "random" else name for name in named}


@pytest.mark.slow
@pytest.mark.parametrize("experiment", [multi_mnist, cmu_faces_tasks])
def test_other_methods_run(tmp_path, experiment):
    methods = tuple(name for name in experiment.METHODS if name not in ("equal", "pcgrad", "uncertainty"))
    results = experiment.main(experiment.Experiment(out=tmp_path, tiny=True, seeds=1, methods=methods))
    assert list(results) == list(methods)


def test_nonsense_is_refused(tmp_path):
    for experiment, changes, message in (
        (multi_mnist, {"methods": ("pcgrd",)}, "unknown method 'pcgrd'"),
        (multi_mnist, {"methods": ()}, "--methods needs at least one name"),
        (multi_mnist, {"steps": 0}, "--steps must be positive; got 0"),
        (cmu_faces_tasks, {"batch_size": 0}, "--batch-size must be positive; got 0"),
    ):
        with pytest.raises(jt.InputError, match=message):
            experiment.main(experiment.Experiment(out=tmp_path, **changes))
