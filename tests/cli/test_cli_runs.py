"""The commands end to end: runs, reports, what goes to which stream, and runs that were killed."""

import json
import os
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest

import jaxtransfer as jt
from jaxtransfer import models
from jaxtransfer.cli import COMMANDS, main
from jaxtransfer.cli.registry.finetuning import METHODS
from jaxtransfer.runs import checkpoints
from jaxtransfer.version import VERSION

REAL_DATA = os.environ.get("TFDS_DATA_DIR", "")  # which the other commands here don't see
SMALL = ("--steps", "4", "--batch-size", "16", "--eval-split", "test[:64]")


def test_a_run_directory_is_complete(source):
    config = json.loads((source / "config.json").read_text())
    assert config["data"] == "digits/upright"
    assert config["class_names"] == [str(digit) for digit in range(10)]
    records = [json.loads(line) for line in (source / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "eval/accuracy" in r] == list(range(2, 21, 2))
    assert checkpoints.steps(source / "checkpoints")[-1] == 20
    report = (source / "report.md").read_text()
    for fact in ("| model | small-cnn |", "| lr | 0.001 |", "| step 20 (last) |", "## Time", "![learning curves]"):
        assert fact in report
    picture = cv2.imread(str(source / "curves.png"))
    assert picture is not None
    assert picture.shape[1] > 1000
    assert len(np.unique(picture.astype(int) @ [1, 256, 65536])) > 20  # colours


def told(lines):
    """All that a command tells but that it begins, which it says after a second."""
    return [line for line in lines if not line.startswith(f"jaxtransfer {VERSION}: ")]


@pytest.mark.slow
def test_the_same_command_again_is_done(run, source):
    before = {file: file.read_bytes() for file in source.glob("*.json*")}
    words = ("pretrain", "--data", "digits/upright", "--steps", "20", "--batch-size", "32", "--out", source)
    out, err = run(*words)
    assert out[0] == f"already done: {source} has its 20 steps"
    assert out[-1] == f"report: {source}/report.md"
    assert told(err) == []
    assert before == {file: file.read_bytes() for file in source.glob("*.json*")}


def test_streams_of_a_training(run, tmp_path):
    out, err = run("pretrain", "--data", "digits/upright", *SMALL, "--eval-every", "2", "--out", tmp_path / "out")
    assert [line.split()[:2] for line in told(err)] == [["step", "2"], ["step", "4"]]
    assert "accuracy" in told(err)[0]
    assert out[0].startswith("best evaluation, at step ")
    assert out[-1].startswith("report: ")


@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=() if name == "l2-sp" else pytest.mark.slow) for name in sorted(METHODS)],
)
def test_every_method_runs(run, source, tmp_path, method):
    out = tmp_path / "out"
    words = ("finetune", "--from", source, "--data", "digits/noisy", *SMALL, "--shots", "3", "--eval-every", "2")
    run(*words, "--method", method, "--out", out)
    report = (out / "report.md").read_text()
    assert f"| method | {method} |" in report
    assert ("| strength |" in report) == (METHODS[method].facts.strength is not None)
    assert ("| head_strength |" in report) == (method in ("l2-sp", "l2-sp-fisher", "delta"))
    assert "| step 4 (last) |" in report or method == "lp-ft"
    assert cv2.imread(str(out / "curves.png")) is not None
    start, end = (checkpoints.read(folder / "checkpoints").leaves for folder in (source, out))
    moved = {p for p in end if p.startswith("params/") and p in start and not np.array_equal(start[p], end[p])}
    assert any("/head/" in path for path in moved)
    assert (method == "linear-probe") == all("/head/" in path for path in moved)
    if method == "lp-ft":
        stage = out / "stage-1-linear-probe"
        assert f"[{stage.name}]({stage.name}/report.md)" in report
        assert (stage / "curves.png").exists()
    evaluated = json.loads(run("evaluate", out, "--split", "test[:64]")[0][0])
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    best = max(r["eval/accuracy"] for r in records if "eval/accuracy" in r)
    assert evaluated["accuracy"] == pytest.approx(best, abs=1e-6)
    assert evaluated["examples"] == 64


@pytest.mark.slow
def test_a_fine_tuned_run_is_a_source_too(run, source, tmp_path):
    words = ("--data", "digits/rotated", *SMALL, "--steps", "2")
    run("finetune", "--from", source, *words, "--method", "lp-ft", "--out", tmp_path / "a")
    run(
        "finetune", "--from", tmp_path / "a", *words, "--method", "l2-sp-fisher", "--keep-head", "--out", tmp_path / "b"
    )
    out, _ = run("evaluate", tmp_path / "b", "--data", "digits/rotated", "--split", "test")
    assert json.loads(out[0])["examples"] == 596


@pytest.mark.slow
def test_pmap_with_fewer_examples_than_devices(run, tmp_path):
    words = ("pretrain", "--data", "digits/upright", "--steps", "2", "--batch-size", "16", "--eval-split", "test[:3]")
    run(*words, "--mode", "pmap", "--model", "linear", "--augment", "crop", "mixup", "--out", tmp_path / "out")


@pytest.mark.slow
def test_early_stopping_is_done_when_repeated(run, tmp_path):
    words = ("pretrain", "--data", "digits/upright", "--model", "linear", "--steps", "40", "--batch-size", "16")
    words = (*words, "--eval-every", "1", "--patience", "1", "--lr", "1e-9", "--out", tmp_path / "out")
    run(*words)
    out, _ = run(*words)
    assert out[0].startswith("already done: ")
    assert checkpoints.steps(tmp_path / "out" / "checkpoints")[-1] < 40


@pytest.mark.slow
def test_predict_agrees_with_evaluate(run, source, tmp_path):
    test = jt.data.load("digits/upright", "test").take(80)
    for number, example in enumerate(test.read(np.arange(80))["image"]):
        place = tmp_path / "digits" / str(int(test.labels[number]))
        place.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(place / f"{number}.png"), example)
    (tmp_path / "digits" / "0" / "._hidden.png").write_bytes(b"what other systems leave")
    out, err = run("predict", source, tmp_path / "digits", "--batch-size", "32", "--top", "2")
    assert err == []
    lines = [json.loads(line) for line in out]
    assert len(lines) == 80
    right = np.mean([line["class"] == line["image"].split("/")[-2] for line in lines])
    words = ("evaluate", source, "--data", f"folder:{tmp_path / 'digits'}", "--split", "all", "--resize")
    evaluated = json.loads(run(*words)[0][0])
    assert evaluated["examples"] == 80
    assert right == pytest.approx(evaluated["accuracy"], abs=1e-6)
    assert right == pytest.approx(
        json.loads(run("evaluate", source, "--split", "test[:80]")[0][0])["accuracy"], abs=1e-6
    )
    assert [len(line["top"]) for line in lines] == [2] * 80
    assert lines[0]["top"][0]["probability"] >= lines[0]["top"][1]["probability"]


def test_predict_goes_on_after_a_bad_file(source, folder, capsys):
    images = folder()
    names = ["0.png", "cut.png", "gone.png", "pipe.png", "9.png"]
    whole = (images / "class0" / "0.png").read_bytes()
    (images / "class0" / "cut.png").write_bytes(whole[: len(whole) // 2])
    os.mkfifo(images / "class0" / "pipe.png")
    assert main(["predict", str(source), *(str(images / "class0" / name) for name in names), "--batch-size", "2"]) == 2
    out, err = capsys.readouterr()
    lines = {line["image"].split("/")[-1]: line for line in map(json.loads, out.splitlines())}
    assert list(lines) == names
    assert [name for name, line in lines.items() if "error" in line] == ["cut.png", "gone.png", "pipe.png"]
    assert f"cannot decode the image {images / 'class0' / 'cut.png'}" in lines["cut.png"]["error"]
    assert "probability" in lines["0.png"]
    assert "probability" in lines["9.png"]
    assert len(err.splitlines()) == 1
    assert err.startswith("jaxtransfer: error: 3 of 5 images could not be read, the others are classified")


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_predict_takes_grey_colour_and_alpha(run, source, tmp_path, channels):
    """An alpha channel is dropped, and colour becomes its luma: what the file shows is what counts."""
    value = np.random.default_rng(0).integers(0, 256, (8, 8, 1), dtype=np.uint8)
    image = np.concatenate([np.repeat(value, min(channels, 3), axis=2), value[..., : channels // 4]], axis=2)
    assert image.shape[2] == channels
    assert cv2.imwrite(str(tmp_path / "one.png"), image)
    assert cv2.imwrite(str(tmp_path / "grey.png"), value)
    one, grey = (json.loads(run("predict", source, tmp_path / f"{name}.png")[0][0]) for name in ("one", "grey"))
    assert one["top"] == grey["top"]


def test_listings(run, monkeypatch):
    monkeypatch.setattr(models, "ZOO", {name: models.ZOO[name] for name in ("linear", "small-cnn", "conv4")})
    names = [line.split()[0] for line in run("datasets")[0]]
    assert {"name", "digits/upright", "digits/noisy"} <= set(names)
    rows = {line.split()[0]: line for line in run("models")[0]}
    assert "24,058" in rows["small-cnn"]
    assert "24,058" not in {line.split()[0]: line for line in run("models", "--classes", "3")[0]}["small-cnn"]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_teaches_in_80_columns(capsys, command):
    assert main([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for word in {"": COMMANDS, "finetune": METHODS, "pretrain": ("required", "digits/upright")}.get(command, ()):
        assert word in text
    if command not in ("", "datasets", "models"):
        assert f"Example: jaxtransfer {command} " in text


@pytest.mark.slow
def test_the_process_itself(source, tmp_path):
    """Exit code and streams of the real process; a reader that stops early meets no traceback."""
    words = [sys.executable, "-m", "jaxtransfer"]
    done = subprocess.run([*words, "evaluate", source, "--split", "test[:16]"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["examples"] == 16
    done = subprocess.run([*words, "evaluate", tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*words, "datasets"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def _kill_after(words, metrics, step):
    """Runs a command in a process of its own and kills it once it has evaluated at `step`."""
    process = subprocess.Popen([sys.executable, "-m", "jaxtransfer", *words], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (metrics.exists() and f'{{"step": {step}, "eval' in metrics.read_text()):
        assert process.poll() is None, "the run ended before it was to be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def _assert_same_runs(one, other):
    ends = [checkpoints.read(folder / "checkpoints") for folder in (one, other)]
    assert ends[0].step == ends[1].step
    assert ends[0].leaves.keys() == ends[1].leaves.keys()
    for path, leaf in ends[0].leaves.items():
        np.testing.assert_array_equal(leaf, ends[1].leaves[path], err_msg=path)
    for file in sorted(one.rglob("metrics.jsonl")):
        assert file.read_bytes() == (other / file.relative_to(one)).read_bytes()


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(run, tmp_path):
    words = ["pretrain", "--data", "digits/upright", "--steps", "48", "--batch-size", "16", "--eval-every", "6"]
    words += ["--eval-split", "test[:64]", "--out"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    _kill_after([*words, str(killed)], killed / "metrics.jsonl", 18)
    left = checkpoints.steps(killed / "checkpoints")
    assert left
    assert left[-1] < 48
    out, err = run(*words, killed)
    assert not out[0].startswith("already done")
    err = told(err)
    assert err[0] == f"{killed}: resumes from step {left[-1]} of 48"
    assert int(err[1].split()[1]) in (left[-1] + 6, left[-1] + 12)
    run(*words, whole)
    _assert_same_runs(killed, whole)


SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_saves_the_step_and_the_same_command_goes_on(run, capsys, monkeypatch, tmp_path, number, code):
    words = ["pretrain", "--data", "digits/upright", "--model", "linear", "--steps", "12", "--batch-size", "16"]
    words += ["--eval-every", "6", "--eval-split", "test[:64]", "--out"]
    killed, whole, made = tmp_path / "killed", tmp_path / "whole", jt.data.Pipeline._part
    handlers = [signal.getsignal(one) for one, _ in SIGNALS]

    def part(self, own, i):
        if i == 9:
            os.kill(os.getpid(), number)  # from whichever thread makes the batch
        return made(self, own, i)

    with monkeypatch.context() as patched:
        patched.setattr(jt.data.Pipeline, "_part", part)
        assert main([*words, str(killed)]) == code
    err = capsys.readouterr().err
    at_once, line = [line for line in told(err.splitlines()) if not line.startswith("step ")]
    name = signal.Signals(number).name
    assert at_once == f"{name}: the step under way is finished and saved first; once more ends it at once"
    step = checkpoints.steps(killed / "checkpoints")[-1]
    assert line == (
        f"jaxtransfer: stopped by {signal.Signals(number).name} after step {step}, which is saved in {killed}; resume "
        f"with the same command from there"
    )
    assert 1 <= step < 12
    assert [signal.getsignal(one) for one, _ in SIGNALS] == handlers
    _, err = run(*words, killed)
    assert told(err)[0] == f"{killed}: resumes from step {step} of 12"
    run(*words, whole)
    _assert_same_runs(killed, whole)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_to_the_process(run, tmp_path, number, code):
    words = ["pretrain", "--data", "digits/upright", "--model", "linear", "--steps", "4000", "--batch-size", "16"]
    words += ["--eval-every", "2000", "--eval-split", "test[:64]", "--out", str(tmp_path / "run")]
    process = subprocess.Popen([sys.executable, "-m", "jaxtransfer", *words], stderr=subprocess.PIPE, text=True)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and '"step": 80' in metrics.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert len(told(err.splitlines())) == 2
    assert "resume with the same command" in err
    (step,) = checkpoints.steps(tmp_path / "run" / "checkpoints")
    assert 80 <= step < 2000  # between two evaluations


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage-1-linear-probe", "."])
def test_a_killed_lp_ft_resumes_to_the_same_bits(run, source, tmp_path, stage):
    words = ["finetune", "--from", str(source), "--data", "digits/noisy", "--method", "lp-ft", "--steps", "80"]
    words += ["--batch-size", "32", "--eval-every", "5", "--eval-split", "test[:64]", "--out"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    _kill_after([*words, str(killed)], killed / stage / "metrics.jsonl", 15)
    run(*words, killed)
    run(*words, whole)
    _assert_same_runs(killed, whole)


@pytest.mark.skipif(not REAL_DATA, reason="needs TFDS_DATA_DIR with cifar10 and cifar100")
def test_cifar(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", REAL_DATA)
    words = ("--split", "train[:512]", "--eval-split", "test[:256]", "--steps", "3", "--batch-size", "64")
    run("pretrain", "--data", "cifar10", *words, "--out", tmp_path / "a")
    run("finetune", "--from", tmp_path / "a", "--data", "cifar100", *words, "--out", tmp_path / "b")
    assert "… (100 in all)" in (tmp_path / "b" / "report.md").read_text()
    out, _ = run("evaluate", tmp_path / "b")
    assert json.loads(out[0])["examples"] == 256
    assert json.loads(out[0])["split"] == "test[:256]"
