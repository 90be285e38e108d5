"""`jaxtransfer contrast`: every method, resumption, what starts from it, and what is refused."""

import json
import shutil

import numpy as np
import pytest

import jaxtransfer as jt
from jaxtransfer.cli import main
from jaxtransfer.cli.registry.selfsupervised import METHODS
from jaxtransfer.runs import checkpoints

SMALL = ("--data", "digits/upright", "--split", "train[:200]", "--eval-split", "test[:64]", "--steps", "4")
SMALL = (*SMALL, "--eval-every", "2", "--batch-size", "16", "--no-flip", "--projection", "16", "8", "--model", "mlp")


@pytest.fixture(scope="module")
def views(own_cache, tmp_path_factory):
    """A tiny run; copy it before changing it."""
    out = tmp_path_factory.mktemp("runs") / "views"
    assert main(("contrast", *SMALL, "--out", str(out))) == 0
    return out


def test_a_run_and_its_report(views):
    records = [json.loads(line) for line in (views / "metrics.jsonl").read_text().splitlines()]
    assert {"train/simclr", "train/probe", "train/accuracy"} <= set(records[0])
    assert {"eval/accuracy", "eval/loss"} <= set(records[-1])
    report = (views / "report.md").read_text()
    assert all(fact in report for fact in ("| knn |", "| linear_probe |", "| alignment |", "embedding.png"))
    assert (views / "embedding.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_run_is_done_once_and_resumes(run, views, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(views, again)
    lines, _ = run("contrast", *SMALL, "--out", again)
    assert lines[0].startswith("already done")
    shutil.rmtree(again / "checkpoints" / "step_000000004")
    run("contrast", *SMALL, "--out", again)
    ours, theirs = (checkpoints.read(path / "checkpoints", 4).leaves for path in (again, views))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)


def test_a_run_of_an_earlier_version_is_one_of_features(run, views, tmp_path):
    """Its command told so, and that heads stand on its encoder."""
    older = tmp_path / "older"
    shutil.copytree(views, older)
    config = json.loads((older / "config.json").read_text())
    for entry in ("format", "knows", "heads"):
        config.pop(entry)
    (older / "config.json").write_text(json.dumps(config))
    before, now = (jt.load_run(one) for one in (older, views))
    assert before.knows == now.knows == ("features",)
    assert jt.tree.leaves_by_path(before.params).keys() == jt.tree.leaves_by_path(now.params).keys()
    assert not any("projection" in path for path in jt.tree.leaves_by_path(now.params))


@pytest.mark.slow
def test_others_start_from_it(run, refused, views, tmp_path):
    lines, _ = run("evaluate", views)
    found = json.loads(lines[-1])
    assert found["examples"] == 64
    assert {"knn", "linear_probe", "uniformity"} <= set(found)
    words = ("--data", "digits/inverted", "--steps", "2", "--batch-size", "16", "--eval-split", "test[:64]")
    run("finetune", "--from", views, *words, "--method", "l2-sp", "--out", tmp_path / "tuned")
    run("evaluate", tmp_path / "tuned", "--split", "test[:64]")
    out = tmp_path / "out"
    tuning = ("finetune", "--from", views, *words, "--out", out)
    assert "which learned without classes; finetune it first" in refused(*tuning, "--keep-head")
    assert "weighs by the source's own loss" in refused(*tuning, "--method", "l2-sp-fisher")
    assert "predict names classes" in refused("predict", views, tmp_path)
    assert "compares classes" in refused("distill", "--teacher", views, *words, "--out", out)
    assert "are scores of classes" in refused("cache-teacher", views, "--out", out)
    assert "--ways is for runs of meta" in refused("evaluate", views, "--ways", "5")
    assert not out.exists() or not (out / "config.json").exists()


@pytest.mark.slow
def test_a_single_class_has_no_probe(run, folder, tmp_path):
    images = folder(classes=1, each=40)
    words = ("--data", f"folder:{images}", "--image-shape", "8", "8", "3", "--batch-size", "8", "--steps", "6")
    lines, _ = run("contrast", *words, "--model", "mlp", "--out", tmp_path / "out")
    assert "alignment" in lines[-1]
    assert "knn" not in lines[-1]
    assert json.loads((tmp_path / "out" / "representation.json").read_text())["step"] == 6


@pytest.mark.slow
def test_the_usual_queue_is_cut_to_what_the_data_allow(run, tmp_path):
    _, told = run("contrast", *SMALL, "--steps", "1", "--method", "moco", "--out", tmp_path / "out")
    assert told[0] == "--queue: 184, not 4096, as with a batch of 16 it must not exceed the 200 images"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["queue"] == 184
    assert "| queue | 184 |" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.slow
def test_parts_of_a_batch_have_statistics_of_their_own(run, tmp_path):
    words = ("contrast", *SMALL, "--steps", "1", "--method", "moco", "--queue", "64")
    run(*words, "--split-statistics", "4", "--out", tmp_path / "parts")
    run(*words, "--out", tmp_path / "whole")
    parts, whole = (jt.load_run(tmp_path / name) for name in ("parts", "whole"))
    assert parts.config["split_statistics"] == 4
    assert "split_statistics" not in whole.config  # as before there was such an option: those runs can be resumed
    ends = [checkpoints.read(one.directory / "checkpoints").leaves for one in (parts, whole)]
    changed = [path for path in ends[0] if not np.allclose(ends[0][path], ends[1][path])]
    assert any("/projection/" in path for path in changed)  # the head has batch norm


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(run, tmp_path, method):
    crops = ("--crops", "2") if METHODS[method].facts.crops else ()
    micro = ("--micro-batch", "16") if method == "info-nce" else ()
    queue = ("--queue", "64") if METHODS[method].facts.queue else ()
    run("contrast", *SMALL[:-2], "--method", method, *crops, *micro, *queue, "--out", tmp_path / "out")
    first = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert f"train/{method.replace('-', '_')}" in first
    found = json.loads((tmp_path / "out" / "representation.json").read_text())
    assert set(found) == {"step", "knn", "linear_probe", "uniformity", "alignment"}
    assert found["linear_probe"] > 0.5
    run("finetune", "--from", tmp_path / "out", "--data", "digits/noisy", "--steps", "2", "--out", tmp_path / "tuned")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--method", "simclir"), "unknown method 'simclir' (did you mean 'simclr'?); known: barlow-twins,"),
        (("--model", "mpl"), "unknown model 'mpl'"),
        (("--batch-size", "20"), "--batch-size must be a multiple of the 8 devices; got 20"),
        (("--temperature", "0"), "--temperature must be positive and finite; got 0.0"),
        (("--method", "byol", "--temperature", "0.5"), "--temperature: byol has none; leave it out"),
        (("--queue", "64"), "--queue: simclr has none; leave it out"),
        (("--method", "moco", "--prototypes", "64"), "--prototypes: moco has none; leave it out"),
        (("--split-statistics", "2"), "--split-statistics: simclr has none; leave it out"),
        (("--method", "moco", "--split-statistics", "3"), "--split-statistics must divide --batch-size 16; got 3"),
        (
            ("--method", "moco", "--split-statistics", "2", "--mode", "pmap"),
            "--split-statistics must be a multiple of the 8 devices under pmap; got 2",
        ),
        (("--size", "6"), "mlp takes images of one size, and is evaluated on whole ones, (8, 8, 1): leave --size out"),
        (("--crops", "2"), "--crops: simclr compares two views; small ones are for swav, dino"),
        (("--size", "2"), "--size must be at least 4; got 2"),
        (("--least", "1.5"), "--least is a share of the area, in (0, 1]; got 1.5"),
        (("--strength", "-1"), "--strength must be at least 0; got -1.0"),
        (("--projection", "8", "0"), "--projection: sizes are at least 1; got 8 0"),
        (("--micro-batch", "24"), "a batch of 16 doesn't divide into micro-batches of 24"),
        (("--method", "moco", "--queue", "8"), "the queue holds 8 vectors, fewer than a batch of 16; make it larger"),
        (
            ("--method", "nnclr", "--queue", "185"),
            "--queue: 185 vectors and a batch of 16 are more than the 200 images, so an image would meet itself; take "
            "at most 184",
        ),
        (
            ("--batch-size", "208"),
            "--batch-size: 208 of 200 images would hold some of them twice, each its own negative; take at most 200",
        ),
        (("--method", "moco", "--batch-size", "104"), "--batch-size: moco needs a queue of a batch or more"),
    ],
)
def test_refused_before_it_begins(refused, tmp_path, words, expected):
    assert expected in refused("contrast", *SMALL, "--out", tmp_path / "out", *words)
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.slow
def test_neighbours_in_training_choose_the_checkpoint(run, refused, tmp_path, folder):
    out = tmp_path / "out"
    words = ("contrast", "--data", "digits/upright", "--eval-split", "test[:64]", "--batch-size", "32", "--no-flip")
    run(*words, "--steps", "6", "--eval-every", "3", "--knn-every", "2", "--out", out)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = {record["step"]: record["eval/knn_accuracy"] for record in records if "eval/knn_accuracy" in record}
    assert list(found) == [2, 4, 6]
    assert all(0 <= value <= 1 for value in found.values())
    best = max(found, key=lambda step: (found[step], -step))
    facts = json.loads(run("evaluate", out, "--split", "test[:64]")[0][0])
    assert facts["step"] == best
    assert facts["knn"] == pytest.approx(found[best], abs=1e-6)
    one = ("contrast", "--data", f"folder:{folder(classes=1)}", "--batch-size", "8", "--steps", "2")
    assert "--knn-every: neighbours tell classes apart" in refused(*one, "--knn-every", "1", "--out", tmp_path / "one")
    assert not (tmp_path / "one" / "config.json").exists()
