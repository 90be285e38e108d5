"""Each experiment runs in its tiny form, writes what it promises, and resumes."""

import contextlib
import dataclasses
import io
import json
import math
import os

import cv2
import numpy as np
import pytest

import jaxtransfer as jt
from experiments import (
    cross_domain_retrieval,
    distill_cifar10,
    finetune_cifar,
    finetune_folder,
    omniglot_fewshot,
    simclr_cifar10,
)
from experiments.benchmarks import distillation, info_nce, l2_sp, maml, multitask_step, step_wait, teacher_cache

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny experiment that has run: its options, its results and what it printed; add to it, change nothing."""
    out = tmp_path_factory.mktemp("finetune_cifar")
    data = {"source": "digits/upright", "target": "digits/noisy"}
    experiment = finetune_cifar.Experiment(out=out, **data, methods=("scratch", "l2-sp"), seeds=1, tiny=True)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        results = finetune_cifar.main(experiment)
    return experiment, results, printed.getvalue()


def accuracies(results):
    return [value for values in results["target"]["accuracy"].values() for value in values]


@pytest.mark.slow
def test_finetune_cifar(trained):
    tiny, results, printed = trained
    assert set(results["runs"].values()) == {"trained"}
    assert list(results["target"]["accuracy"]) == ["scratch", "l2-sp"]
    assert all(math.isfinite(value) and 0 <= value <= 100 for value in accuracies(results))
    assert "digits/upright → digits/noisy" in printed
    page = (tiny.out / "report.md").read_text()
    assert all(f"| {method} |" in page for method in tiny.methods)
    assert "(results.png)" in page
    assert (tiny.out / "results.png").read_bytes()[:4] == PNG
    assert json.loads((tiny.out / "results.json").read_text())["target"] == results["target"]


@pytest.mark.slow
def test_finetune_cifar_resumes(trained):
    tiny, results, _ = trained
    again = finetune_cifar.main(dataclasses.replace(tiny, methods=(*tiny.methods, "lp-ft")))
    assert again["runs"] == {
        "source": "already done",
        "scratch-seed0": "already done",
        "l2-sp-seed0": "already done",
        "lp-ft-seed0": "trained",
    }
    assert accuracies(again)[:2] == accuracies(results)
    assert again["source"] == results["source"]

    with pytest.raises(jt.InputError, match="another configuration"):
        finetune_cifar.main(dataclasses.replace(tiny, strength=0.5))


@pytest.mark.parametrize("method", ["linear-probe", "full", "layerwise-decay"])
def test_stages_of_each_method(method):
    recipe = finetune_cifar.PRESETS["resnet20"]
    kit = finetune_cifar.Kit(jt.models.small_cnn(3), recipe)
    (stage,) = finetune_cifar.METHODS[method](kit)
    assert stage.share == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "resnet21"}, "did you mean 'resnet20'"),
        ({"model": "resnet21"}, "unknown model"),
        ({"methods": ("full", "l2sp")}, "did you mean 'l2-sp'"),
        ({"methods": ()}, "at least one"),
        ({"seeds": 0}, "--seeds must be at least 1; got 0"),
        ({"tiny": False, "steps": 1}, "--steps must be at least 2; got 1"),
        ({"tiny": False, "shots": 0}, "--shots must be at least 1; got 0"),
    ],
)
def test_finetune_cifar_refuses(tmp_path, changes, message):
    experiment = finetune_cifar.Experiment(**{"out": tmp_path / "out", "tiny": True, **changes})
    with pytest.raises(jt.InputError, match=message):
        finetune_cifar.main(experiment)
    assert not experiment.out.exists()


@pytest.mark.skipif("TFDS_DATA_DIR" not in os.environ, reason="needs cifar10 and cifar100 in TFDS_DATA_DIR")
def test_finetune_cifar_on_cifar(tmp_path):
    experiment = finetune_cifar.Experiment(out=tmp_path, methods=("linear-probe",), seeds=1, tiny=True)
    (accuracy,) = accuracies(finetune_cifar.main(experiment))
    assert 0 <= accuracy <= 100


@pytest.mark.slow
def test_finetune_folder_from_a_run(trained, tmp_path, capsys):
    source = trained[0].out / "source"
    options = {"domain": "noisy", "steps": 2, "batch_size": 8, "shots": 2}
    experiment = finetune_folder.Experiment(out=tmp_path / "moved", source=source, **options)
    result = finetune_folder.main(experiment)
    assert (result["model"], result["image_shape"], result["step"]) == ("small-cnn", [8, 8, 1], 2)
    assert result["examples"] == [20, 200]
    assert math.isfinite(result["eval/loss"])
    capsys.readouterr()
    assert finetune_folder.main(experiment) == result
    assert "already done" in capsys.readouterr().out
    assert (experiment.out / "curves.png").read_bytes()[:4] == PNG
    assert "| accuracy |" in (experiment.out / "report.md").read_text()


@pytest.mark.slow
def test_finetune_folder_makes_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(finetune_folder, "device_mesh", lambda: None)  # to compile for eight devices takes long
    result = finetune_folder.main(finetune_folder.Experiment(out=tmp_path / "out", tiny=True))
    assert result["model"] == "resnet18"
    assert result["examples"] == [20, 40]
    assert 0 <= result["eval/accuracy"] <= 1


def test_digits_as_images(tmp_path):
    finetune_folder.write_digits(tmp_path, "rotated", side=20, per_class=2)
    files = sorted(tmp_path.glob("*/*/*.png"))
    assert len(files) == 2 * 10 * 2
    assert all(cv2.imread(str(file)).shape == (20, 20, 3) for file in files)
    with pytest.raises(jt.InputError, match="unknown domain"):
        finetune_folder.write_digits(tmp_path, "upside-down", side=20, per_class=2)


@pytest.mark.parametrize(("size", "model"), [(64, "resnet18"), (65, "resnet18-imagenet")])
def test_stem_by_image_size(size, model, numbered_images):
    assert finetune_folder._architecture(None, numbered_images(size))["model"] == model


@pytest.fixture
def numbered_images(rng):
    def make(side):
        images = rng.integers(0, 256, (2, side, side, 3)).astype("uint8")
        return jt.data.Dataset.from_arrays(images, [0, 1])

    return make


@pytest.mark.slow
def test_cost_of_l2_sp(capsys):
    result = l2_sp.main(l2_sp.Cost(tiny=True))
    assert json.loads(capsys.readouterr().out) == result
    assert result["pairs"] == 3
    assert all(math.isfinite(result[key]) for key in ("cost_percent", "ms_with", "compile_s_with"))
    with pytest.raises(jt.InputError, match="--pairs"):
        l2_sp.main(l2_sp.Cost(pairs=0))


@pytest.mark.slow
def test_waiting_for_data(offline, capsys):
    result = step_wait.main(step_wait.Wait(tiny=True))
    assert json.loads(capsys.readouterr().out) == result
    assert result["data"] == "noise"
    assert 0 <= result["data_wait_fraction"] <= result["running_wait_fraction"] <= 1


@pytest.mark.slow
@pytest.mark.optimised
def test_the_cost_of_balancing(capsys):
    result = multitask_step.main(multitask_step.Cost(tiny=True))
    assert json.loads(capsys.readouterr().out) == {**result, "rules": list(result["rules"])}
    assert result["equal"]["against"] == "sum"
    assert result["equal"]["flops"] <= 1.02
    assert result["mgda"]["flops"] <= 1.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("experiments.finetune_cifar", ("--source", "no-such-data")),
        pytest.param("experiments.finetune_folder", ("--from", "no/such/run"), marks=pytest.mark.slow),
        pytest.param("experiments.distill_cifar10", ("--student", "no-such-model"), marks=pytest.mark.slow),
    ],
)
def test_unusable_input_is_one_line(module, tmp_path, name, words):
    code, out, err = module(name, "--out", tmp_path / "out", *words)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith(f"{name.split('.')[1]}: error: ")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["prototypical", "maml"])
def test_omniglot_fewshot(tmp_path, monkeypatch, capsys, method):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (300, 28, 28, 1), dtype=np.uint8), np.repeat(np.arange(15), 20)
    characters = jt.data.split_classes(jt.data.Dataset.from_arrays(images, labels), (5, 5, 5))
    monkeypatch.setattr(omniglot_fewshot, "characters", lambda command: characters)
    tiny = omniglot_fewshot.OmniglotFewShot(methods=(method,), out=tmp_path, tiny=True)
    results = omniglot_fewshot.main(tiny)
    assert method in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert 0 < results[method]["accuracy"]["mean"] < 0.6  # noise has no classes
    if method == "maml":
        assert len(results["maml"]["by_steps"]) == 6
        assert (tmp_path / "adaptation.png").read_bytes()[:4] == PNG


@pytest.mark.slow
@pytest.mark.parametrize(("given", "row"), [(1, 4), (None, 0)])
def test_maml_benchmark(capsys, given, row):
    rows = maml.main(maml.MamlBenchmark(repeats=1, tasks=2, devices=given, rows=(row,)))
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
    assert rows[0]["devices"] == (given or 2)  # of eight, as many as share two tasks
    assert all(row["seconds"] > 0 for row in rows)


@pytest.mark.slow
def test_cost_of_distillation(capsys):
    result = distillation.main(distillation.Cost(tiny=True))
    assert json.loads(capsys.readouterr().out) == result
    assert result["first_loss"]["ours"] == pytest.approx(result["first_loss"]["by_hand"], rel=1e-4)
    assert result["convolutions"]["ours"] == result["convolutions"]["by_hand"] == 11  # 3 of the teacher, 8 to train
    assert result["teacher_copies"]["ours"] == result["teacher_copies"]["by_hand"] == 1
    assert math.isfinite(result["ratio"]["median"])
    with pytest.raises(jt.InputError, match="--pairs"):
        distillation.main(distillation.Cost(pairs=0))


@pytest.mark.slow
def test_cost_of_a_cached_teacher(capsys):
    result = teacher_cache.main(teacher_cache.Cost(tiny=True))
    assert json.loads(capsys.readouterr().out) == result
    for kind in ("step", "whole"):
        assert set(result[kind]["ms"]) == {"labels", "cached"}
        assert math.isfinite(result[kind]["ratio"]["cached"]["median"])
    with pytest.raises(jt.InputError, match="--batch-size must be at least 1; got 0"):
        teacher_cache.main(teacher_cache.Cost(batch_size=0))


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A tiny experiment with a teacher that has run, and its results; change nothing."""
    out = tmp_path_factory.mktemp("distill_cifar10")
    experiment = distill_cifar10.Experiment(out=out, data="digits/upright", seeds=1, tiny=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill_cifar10, "device_mesh", lambda: None)  # eight devices take long to compile for
        with contextlib.redirect_stdout(io.StringIO()):
            results = distill_cifar10.main(experiment)
        yield experiment, results


@pytest.mark.slow
def test_distill_cifar10(taught):
    tiny, results = taught
    assert set(results) == {"teacher", "student", "gain", "seconds"}
    (alone,), (helped,) = results["student"]["labels alone"], results["student"]["with the teacher"]
    assert all(0 <= value <= 100 for value in (results["teacher"], alone, helped))
    assert results["gain"] == pytest.approx(helped - alone)
    assert json.loads((tiny.out / "results.json").read_text()) == results
    assert "| with the teacher |" in (tiny.out / "report.md").read_text()
    assert (tiny.out / "curves.png").read_bytes()[:4] == PNG


@pytest.mark.slow
def test_distill_cifar10_resumes(taught, monkeypatch):
    def no_step(*args, **kwargs):
        raise AssertionError("trained again")

    tiny, results = taught
    monkeypatch.setattr(jt.TrainStep, "placed", no_step)
    again = distill_cifar10.main(tiny)
    assert {**again, "seconds": 0} == {**results, "seconds": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": "resnet21"}, "unknown model 'resnet21'"),
        ({"teacher": "resnet57"}, "unknown model 'resnet57'"),
        ({"seeds": 0}, "--seeds must be at least 1; got 0"),
    ],
)
def test_distill_cifar10_refuses(tmp_path, changes, message):
    experiment = distill_cifar10.Experiment(**{"out": tmp_path / "out", "data": "digits/upright", **changes})
    with pytest.raises(jt.InputError, match=message):
        distill_cifar10.main(experiment)
    assert not experiment.out.exists()


@pytest.mark.slow
def test_cross_domain_retrieval(tmp_path):
    options = {"out": tmp_path, "first": "digits/upright", "second": "digits/noisy", "tiny": True}
    results = cross_domain_retrieval.main(cross_domain_retrieval.Experiment(**options))
    assert set(results["recall"]) == {"digits/upright → digits/noisy", "digits/noisy → digits/upright"}
    assert all(0 <= value <= 100 for recall in results["recall"].values() for value in recall.values())
    assert (tmp_path / "embedding.png").read_bytes()[:4] == PNG
    assert "recall@1" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_simclr_cifar10(tmp_path):
    tiny = simclr_cifar10.Experiment(out=tmp_path, data="digits/upright", model="small-cnn", tiny=True)
    results = simclr_cifar10.main(tiny)
    assert all(0 <= results[name] <= 100 for name in ("knn", "linear probe"))
    assert list(results["shots"]) == ["SimCLR", "SimCLR, LP-FT", "scratch"]
    assert (tmp_path / "embedding.png").read_bytes()[:4] == PNG
    assert "nearest neighbours" in (tmp_path / "report.md").read_text()
    assert simclr_cifar10.main(tiny)["shots"] == results["shots"]  # which the runs remember
    with pytest.raises(jt.InputError, match="at least 1"):
        simclr_cifar10.main(dataclasses.replace(tiny, tiny=False, shots=0))


@pytest.mark.slow
def test_info_nce_benchmark(capsys):
    result = info_nce.main(info_nce.InfoNceBenchmark(tiny=True))
    (row,) = result["rows"]
    assert row["pairs"] == 64
    assert row["ours"]["seconds"] > 0
    assert row["plain"]["ratio"] > 0
    assert set(result["peak_mb"]["64"]) == {"nt_xent", "info_nce"}
    assert json.loads(capsys.readouterr().out) == result
