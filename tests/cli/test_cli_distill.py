"""`jaxtransfer distill`: every loss, the report, the cache, generations, and what is refused."""

import json
import shutil

import pytest

from jaxtransfer.cli.registry.distillation import LOSSES
from jaxtransfer.runs import checkpoints

SMALL = (
    "--data",
    "digits/upright",
    "--steps",
    "4",
    "--eval-every",
    "2",
    "--batch-size",
    "16",
    "--eval-split",
    "test[:64]",
)


@pytest.fixture(scope="module")
def cache(source, tmp_path_factory):
    from jaxtransfer.cli import main

    out = tmp_path_factory.mktemp("caches") / "cache"
    assert main(("cache-teacher", str(source), "--out", str(out))) == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_runs(run, source, tmp_path, loss):
    out = tmp_path / "out"
    run("distill", "--teacher", source, *SMALL, "--loss", loss, "--out", out)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert f"train/{loss}" in records[0]
    assert {"eval/accuracy", "eval/agreement", "eval/teacher/accuracy"} <= set(records[-1])


@pytest.mark.slow
def test_the_report_has_both_networks(run, source, tmp_path):
    out = tmp_path / "out"
    words = ("distill", "--teacher", source, *SMALL, "--model", "mlp", "--out", out)
    run(*words)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert "train/kd" in records[0]
    assert {"eval/accuracy", "eval/agreement", "eval/teacher/accuracy"} <= set(records[-1])
    report = (out / "report.md").read_text()
    for fact in (
        "| teacher/accuracy |",
        "| agreement |",
        "## Size and speed",
        "| student | 85,002 |",
        "| teacher (small-cnn) |",
    ):
        assert fact in report
    assert (out / "curves.png").exists()
    config = json.loads((out / "config.json").read_text())
    assert config["command"] == "distill"
    assert (config["weight"], config["label_weight"], config["temperature"]) == (0.9, 0.1, 4.0)
    lines, _ = run(*words)
    assert lines[0] == f"already done: {out} has its 4 steps"
    lines, _ = run("evaluate", out)
    assert json.loads(lines[0])["step"] in (2, 4)


@pytest.mark.slow
def test_the_cache_takes_the_place_of_the_teacher(run, source, cache, tmp_path):
    words = ("distill", "--teacher", source, *SMALL, "--shots", "5")
    run(*words, "--out", tmp_path / "live")
    run(*words, "--cache", cache, "--out", tmp_path / "cached")
    live, cached = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("live", "cached")
    )
    for one, two in zip(live, cached, strict=True):
        assert one.keys() == two.keys()
        assert all(one[key] == pytest.approx(two[key], rel=1e-3, abs=1e-5) for key in one)


@pytest.mark.slow
def test_generations_and_several_teachers(run, source, tmp_path):
    out = tmp_path / "out"
    words = ("distill", "--teacher", source, source, *SMALL, "--label-weight", "0", "--generations", "2", "--out", out)
    _, err = run(*words)
    assert [line.split()[0] for line in err if "step" in line] == ["generation-1"] * 1 + ["generation-2"] * 1
    assert checkpoints.steps(out / "checkpoints")[-1] == 2
    assert (out / "stage-1-generation-1" / "report.md").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--loss", "kdd"), "unknown loss 'kdd' (did you mean 'kd'?); known: attention-transfer, "),
        (("--model", "resnet21"), "unknown model 'resnet21'"),
        (("--temperature", "0"), "--temperature must be positive and finite; got 0.0"),
        (("--weight", "-1"), "--weight must be at least 0"),
        (("--generations", "0"), "--generations must be at least 1"),
        (("--loss", "hint", "--taps", "stage9"), "unknown output of the student 'stage9' (did you mean 'stage"),
        (("--loss", "hint", "--taps", "stage1=stage9"), "unknown output of the teacher 'stage9'"),
        (("--loss", "hint", "--model", "mlp"), "the two networks have none of the same name; choose with --taps"),
        (("--loss", "crd", "--taps", "features", "logits"), "--loss crd compares one pair of outputs; got 2"),
        (("--cache", "CACHE", "--augment", "flip"), "wrong under --augment flip"),
        (("--cache", "CACHE", "--generations", "2"), "--cache holds the outputs of one teacher"),
        (("--cache", "CACHE", "--loss", "rkd"), "(cache-teacher --outputs writes more) 'features'; known: logits"),
        (("--cache", "nowhere"), "nowhere"),
    ],
)
def test_refused(refused, source, cache, tmp_path, words, says):
    words = [str(cache) if word == "CACHE" else word for word in words]
    assert says in refused("distill", "--teacher", source, *SMALL, *words, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.slow
def test_other_classes_are_refused_where_classes_are_compared(refused, run, source, folder, tmp_path):
    data = f"folder:{folder(shape=(8, 8, 1))}"
    words = (
        "distill",
        "--teacher",
        source,
        "--data",
        data,
        "--split",
        "all[:20]",
        "--eval-split",
        "all[20:]",
        "--steps",
        "2",
    )
    more = ("--batch-size", "8", "--resize")
    assert f"--loss kd compares classes: {source} knows 10, " in refused(*words, *more, "--out", tmp_path / "a")
    run(*words, *more, "--loss", "rkd", "--out", tmp_path / "b")


@pytest.mark.slow
def test_another_teacher_in_the_same_place(refused, run, source, tmp_path):
    out, teacher = tmp_path / "out", shutil.copytree(source, tmp_path / "teacher")
    words = ("distill", "--teacher", teacher, *SMALL, "--out", out)
    run(*words)
    best = json.loads((out / "config.json").read_text())["teacher_steps"][0]
    shutil.rmtree(teacher / "checkpoints" / f"step_{best:09d}")
    message = refused(*words)
    assert "holds a run of another configuration" in message
    assert "teacher_weights" in message
