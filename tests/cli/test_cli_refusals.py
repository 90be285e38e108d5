"""What can't be used ends in exit code 2 and one line that says what was expected, what came, and the remedy."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest

from jaxtransfer.cli import main
from jaxtransfer.cli.registry.finetuning import METHODS
from jaxtransfer.runs import arrays, checkpoints
from jaxtransfer.version import VERSION

SMALL = ("--steps", "4", "--batch-size", "16", "--eval-split", "test[:64]")
DIGITS = ("pretrain", "--data", "digits/upright", *SMALL)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--model", "smal-cnn"), "unknown model 'smal-cnn' (did you mean 'small-cnn'?); known: conv4,"),
        (("--data", "digits/uprite"), "unknown data set 'digits/uprite' (did you mean 'digits/upright'?); known: "),
        (("--data", "nosuchset"), "unknown data set 'nosuchset'; known: digits/inverted,"),
        (("--split", "trian"), "unknown split of digits/upright 'trian' (did you mean 'train'?); known: test, train"),
        (("--eval-split", "val"), "unknown split of digits/upright 'val'; known: test, train"),
        (("--split", "train[:0]"), "cannot open split 'train[:0]' of digits/upright"),
        (("--optimizer", "adamm"), "unknown optimizer 'adamm' (did you mean 'adam'?); known: adam, lars, sgd"),
        (
            ("--augment", "flip", "crp"),
            "unknown augmentation 'crp' (did you mean 'crop'?); known: color, crop, cutmix,",
        ),
        (("--model", "minilm-l6"), "minilm-l6 takes the tokens of texts, and commands take images"),
        (("--mode", "jitt"), "unknown mode 'jitt' (did you mean 'jit'?); known: jit, pmap"),
        (("--steps", "0"), "--steps must be at least 1; got 0"),
        (("--batch-size", "0"), "--batch-size must be at least 1; got 0"),
        (("--batch-size", "20"), "--batch-size must be a multiple of the 8 devices; got 20"),
        (("--lr", "-1"), "--lr must be positive and finite; got -1.0"),
        (("--lr", "nan"), "--lr must be positive and finite; got nan"),
        (("--lr", "inf"), "--lr must be positive and finite; got inf"),
        (("--weight-decay", "-1"), "--weight-decay must be at least 0; got -1.0"),
        (("--label-smoothing", "1.5"), "--label-smoothing must be at least 0 and below 1; got 1.5"),
        (("--shots", "0"), "--shots must be at least 1; got 0"),
        (("--shots", "100000"), "class '0' has 119 examples, 100000 per class asked; ask for fewer"),
        (("--seed", "-1"), "--seed must be at least 0; got -1"),
        (("--seed", "4294967296"), "--seed must be below 2**32"),
        (("--eval-every", "0"), "--eval-every must be at least 1; got 0"),
        (("--patience", "0"), "--patience must be at least 1; got 0"),
        (("--keep", "0"), "--keep must be at least 1; got 0"),
        (("--data-dir", "/no/such"), "there is no folder /no/such"),
        (("--model", "vit-ti-16"), "digits/upright doesn't fit vit-ti-16: expected images divisible into 16×16"),
        (("--image-shape", "16", "16", "2"), "channels, got (16, 16, 2)"),
    ],
)
def test_pretrain_refuses_before_it_begins_and_leaves_the_directory_free(refused, tmp_path, words, expected):
    assert expected in refused(*DIGITS, "--out", tmp_path / "out", *words)
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "",
            "expected a command, got nothing: one of pretrain, finetune, distill, cache-teacher, contrast, meta, ",
        ),
        ("--data x", "expected a command, before --data: one of pretrain,"),
        ("pretrian --data x", "unknown command 'pretrian' (did you mean 'pretrain'?); known: adapt, cache-teacher,"),
        ("pretrian --help", "unknown command 'pretrian' (did you mean 'pretrain'?)"),
        ("tune", "unknown command 'tune' (did you mean 'finetune'?)"),
        ("pretrain --data x", "pretrain needs --out DIR; "),
        ("pretrain", "pretrain needs --data NAME and --out DIR; "),
        ("finetune --data x --out y", "finetune needs --from SOURCE; "),
        ("distill --data x --out y", "distill needs --teacher RUN ...; "),
        ("evaluate", "evaluate needs RUN; "),
        ("pretrain --data x --ouut y", "pretrain has no option --ouut (did you mean --out?); "),
        ("pretrain --data x --out y --step 3", "pretrain has no option --step (did you mean --steps?); "),
        ("pretrain --data x --out y --step=3", "pretrain has no option --step (did you mean --steps?); "),
        ("pretrain --data x --out y --keep-head", "pretrain has no option --keep-head, which is one of finetune; "),
        ("pretrain --data x --out y -s", "pretrain has no option -s; "),
        ("pretrain --data x --out y --steps many", "--steps: expected a whole number, got 'many'; "),
        ("pretrain --data x --out y --steps=1e3", "--steps: expected a whole number, got '1e3'; "),
        ("pretrain --data x --out y --lr fast", "--lr: expected a number, got 'fast'; "),
        ("pretrain --data x --out y --image-shape 8 8", "--image-shape needs 3 values (H W C); got 8 8; "),
        ("pretrain --data --out y", "--data needs a value (NAME); got none; "),
        ("pretrain x --data x --out y", "pretrain has no use for the word 'x'; options begin with --; "),
        ("evaluate x y", "evaluate has no use for the word 'y'"),
        ("finetune --from x --data x --out y --resize=no", "--resize is a switch and takes no value; got --resize=no"),
    ],
)
def test_words_that_no_command_is_made_of(refused, words, expected):
    message = refused(*words.split())
    assert expected in message
    assert "--help" in message
    assert not set("│╭╰─") & set(message)


def test_words_that_look_odd_but_are_right(refused):
    assert "there is no folder" in refused("datasets", "--data_dir", "/no/such")
    assert "there is no folder" in refused("datasets", "--data-dir=/no/such")
    assert "at least 1; got -3" in refused("models", "--classes", "-3")
    assert "positive and finite; got -inf" in refused(*DIGITS, "--out", "y", "--lr", "-inf")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--steps 1000000000000000000000000000000", "--steps must be at most 2147483647; got 1000000000000000000"),
        ("--batch-size 1000000000000", "--batch-size must be at most 2147483647; got 1000000000000"),
        ("--batch-size 2000000000", "so many images 8×8×1 take 596 GiB, and this machine has"),
        ("--image-shape 100000 100000 3", "at most 134,217,728 pixels, got (100000, 100000, 3)"),
        ("--image-shape 10000 10000 3 --batch-size 4096", "take 5,722 GiB, and this machine has"),
        ("--shots 1000000000000000000000", "--shots must be at most 2147483647; got 1000000000000000000000"),
        (f"--steps {'9' * 5000}", "--steps: expected a whole number, got '99999"),
    ],
)
def test_sizes_that_no_machine_has(refused, tmp_path, words, expected):
    assert expected in refused(*DIGITS, "--out", tmp_path / "out", *words.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_larger_batch_than_there_are_examples(run, refused, source):
    whole, few = (json.loads(run("evaluate", source, "--split", "test[:9]", *more)[0][0]) for more in ((), _HUGE))
    assert few["examples"] == 9
    assert few["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert "--generations 9 share --steps" in refused(
        "distill", "--teacher", source, "--data", "digits/upright", *SMALL, "--generations", "9", "--out", "x"
    )


_HUGE = ("--batch-size", "2147483647")


def test_the_script_keeps_its_hooks_and_a_caller_gets_its_own_back(monkeypatch, capsys):
    import threading
    import tomllib
    from importlib import import_module
    from pathlib import Path

    import jaxtransfer

    project = Path(jaxtransfer.__file__).parents[1] / "pyproject.toml"
    module, _, name = tomllib.loads(project.read_text())["project"]["scripts"]["jaxtransfer"].partition(":")
    before = threading.excepthook, sys.unraisablehook
    assert main(["models", "--classes", "0"]) == 2
    assert (threading.excepthook, sys.unraisablehook) == before
    monkeypatch.setattr(threading, "excepthook", before[0])
    monkeypatch.setattr(sys, "unraisablehook", before[1])
    monkeypatch.setattr(sys, "argv", ["jaxtransfer", "models", "--classes", "0"])
    with pytest.raises(SystemExit, match="2"):
        getattr(import_module(module), name)()
    assert threading.excepthook is not before[0]
    assert sys.unraisablehook is not before[1]


def test_listing_a_folder_runs_none_of_its_code(run, refused, tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "data" / "letters" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(json.dumps({"name": "letters", "version": "1.0.0"}))
    (folder / "features.json").write_text(json.dumps({"pythonClassName": "planted.Feature", "jsonFeature": {}}))
    lines, _ = run("datasets", "--data-dir", tmp_path / "data")
    assert any("letters" in line and "planted.Feature" in " ".join(lines) for line in lines)
    words = ("--data", "letters", "--data-dir", tmp_path / "data", "--out", tmp_path / "out")
    assert "names the class 'planted.Feature'" in refused("pretrain", *words)
    assert not (tmp_path / "trace").exists()


def test_episodes_that_would_take_for_ever(refused):
    told = refused("evaluate", "x", "--episodes", "2000000000")
    assert told.startswith("--episodes must be at most 1000000, whose interval is about a tenth of a per cent wide")


def test_listing_refuses(refused, tmp_path):
    assert "there is no folder" in refused("datasets", "--data-dir", tmp_path / "none")
    assert "--classes must be at least 1" in refused("models", "--classes", "0")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--method", "lpft"), "unknown method 'lpft' (did you mean 'lp-ft'?); known: bss,"),
        (("--strength", "-1"), "--strength must be at least 0; got -1.0"),
        (("--head-strength", "nan"), "--head-strength must be at least 0; got nan"),
        (("--method", "lp-ft", "--steps", "1"), "the method has 2 phases and needs as many steps; got steps=1"),
    ],
)
def test_finetune_refuses_options(refused, source, tmp_path, words, expected):
    out = tmp_path / "out"
    assert expected in refused("finetune", "--from", source, "--data", "digits/noisy", *SMALL, "--out", out, *words)
    assert not (out / "config.json").exists()
    assert "lp-ft" in METHODS


def test_shapes_and_classes_that_do_not_fit(refused, source, folder, tmp_path):
    images, out = folder(), tmp_path / "out"
    words = ("--data", f"folder:{images}", "--steps", "4", "--batch-size", "16", "--out", out)
    misfit = "was trained on images (8, 8, 1), "
    assert misfit in refused("finetune", "--from", source, *words)
    assert "has (8, 8, 3); add --resize" in refused("evaluate", source, "--data", f"folder:{images}")
    classes = refused("evaluate", source, "--data", f"folder:{images}", "--resize")
    assert "knows 10 classes" in classes
    assert "has 3; finetune it" in classes
    kept = refused("finetune", "--from", source, *words, "--resize", "--keep-head")
    assert "--keep-head needs the same classes" in kept
    assert "has 10, " in kept
    assert not out.exists()


@pytest.mark.filterwarnings("default")
def test_the_same_number_of_other_classes_is_a_warning(run, source, folder):
    images = folder(classes=10, each=5)
    out, err = run("evaluate", source, "--data", f"folder:{images}", "--resize")
    assert err == [f"warning: class 0 is '0' in {source} and 'class0' in folder:{images}"]
    assert json.loads(out[0])["examples"] == 10


def test_folders_without_images(refused, source, tmp_path):
    (tmp_path / "empty").mkdir()
    for words in (("evaluate", source, "--data"), ("pretrain", "--out", tmp_path / "out", "--data")):
        assert "no images in" in refused(*words, f"folder:{tmp_path / 'empty'}")
        assert "there is no folder" in refused(*words, f"folder:{tmp_path / 'none'}")
    assert "no images in" in refused("predict", source, tmp_path / "empty")
    assert "there is no image" in refused("predict", source, tmp_path / "none.png")
    assert "expected image files" in refused("predict", source)


def test_a_corrupt_image_is_named(refused, source, folder, tmp_path):
    images = folder()
    (images / "class1" / "bad.png").write_bytes(b"\x89PNG rubbish")
    words = ("--data", f"folder:{images}", "--split", "all", "--eval-split", "all", "--steps", "2")
    for command in (
        ("pretrain", *words, "--batch-size", "8", "--out", tmp_path / "a"),
        ("finetune", "--from", source, *words, "--batch-size", "8", "--resize", "--out", tmp_path / "b"),
    ):
        assert f"cannot decode the image {images / 'class1' / 'bad.png'}" in refused(*command)
    assert not (tmp_path / "a" / "config.json").exists()


@pytest.mark.slow
def test_images_of_differing_sizes_get_a_shape_and_others_are_told_of_one(refused, run, source, folder, tmp_path):
    images = folder()
    shutil.copy(folder("larger", shape=(9, 8, 3)) / "class0" / "0.png", images / "class0" / "odd.png")
    words = ("pretrain", "--data", f"folder:{images}", "--split", "all", "--eval-split", "all", "--steps", "2")
    words = (*words, "--batch-size", "8", "--model", "linear", "--out", tmp_path / "out")
    contrast = ("contrast", *words[1:9], "--batch-size", "8", "--out", tmp_path / "other")
    message = refused(*contrast)
    assert "(9, 8, 3)" in message
    assert "--image-shape" in message
    run(*words, "--image-shape", 8, 8, 1)
    out, _ = run("evaluate", tmp_path / "out")
    assert json.loads(out[0])["examples"] == 31


@pytest.mark.slow
def test_out_that_is_taken(refused, source, tmp_path):
    before = (source / "config.json").read_bytes(), (source / "metrics.jsonl").read_bytes()
    message = refused(*DIGITS, "--out", source)
    assert "holds a run of another configuration" in message
    assert "steps: 20 there, 4 now" in message
    assert before == ((source / "config.json").read_bytes(), (source / "metrics.jsonl").read_bytes())
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("x")
    assert "holds 'thesis.tex'; choose an empty --out" in refused(*DIGITS, "--out", tmp_path / "foreign")
    (tmp_path / "file").write_text("x")
    assert "File exists; choose another --out" in refused(*DIGITS, "--out", tmp_path / "file")
    assert "Not a directory" in refused(*DIGITS, "--out", tmp_path / "file" / "below")
    assert "cannot write to the run directory" in refused(*DIGITS, "--out", "/proc/jaxtransfer")


def test_from_that_is_no_trained_run(refused, source, tmp_path):
    words = ("--data", "digits/noisy", *SMALL, "--out", tmp_path / "out")
    assert "expected a run directory" in refused("finetune", "--from", tmp_path / "none", *words)
    bare = tmp_path / "bare"
    shutil.copytree(source, bare, ignore=shutil.ignore_patterns("checkpoints"))
    assert "has no checkpoint yet; run its command again" in refused("finetune", "--from", bare, *words)
    (bare / "config.json").write_text('{"class_names": ["a"]}')
    assert "is no run of pretrain or finetune: its configuration lacks 'model'" in refused("evaluate", bare)
    (bare / "config.json").write_text("{")
    assert "cannot read the configuration" in refused("evaluate", bare)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_damaged_checkpoints(refused, run, source, tmp_path):
    damaged, whole = tmp_path / "damaged", json.loads(run("evaluate", source)[0][0])
    shutil.copytree(source, damaged)
    first, last = sorted((damaged / "checkpoints").iterdir())
    assert whole["step"] == 20
    _flip_a_byte(last)
    out, err = run("evaluate", damaged)
    assert json.loads(out[0])["step"] == 18
    assert len(err) == 1
    assert err[0].startswith(f"warning: checkpoint {last} is damaged")
    (last / "meta.json").write_text("{")
    assert json.loads(run("evaluate", damaged)[0][0])["step"] == 18
    _flip_a_byte(first)
    (last / "meta.json").unlink()
    shutil.copy(source / "checkpoints" / last.name / "meta.json", last / "meta.json")
    words = ("--data", "digits/noisy", *SMALL, "--out", tmp_path / "out")
    assert f"no checkpoint of {damaged} is whole" in refused("finetune", "--from", damaged, *words)
    # The run's own command trains it anew, to the same end.
    words = ("pretrain", "--data", "digits/upright", "--steps", "20", "--batch-size", "32", "--out", damaged)
    out, err = run(*words)
    assert sum(line.startswith("warning: ") for line in err) == 2
    assert (damaged / "metrics.jsonl").read_bytes() == (source / "metrics.jsonl").read_bytes()


def _flip_a_byte(folder):
    file = max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("model", [pytest.param("small-cnn", marks=pytest.mark.slow), "mlp"])
@pytest.mark.parametrize("every", ["1", "4"])
def test_a_loss_that_is_not_finite(refused, tmp_path, model, every):
    out = tmp_path / "out"
    words = (*DIGITS, "--model", model, "--lr", "1e30", "--optimizer", "sgd", "--eval-every", every, "--out", out)
    message = refused(*words)
    assert "is not finite at step 2: term 'classification'" in message or "is not finite after step" in message
    assert "ower the learning rate" in message
    saved = checkpoints.steps(out / "checkpoints")
    assert (f"the last good checkpoint is step {saved[-1]} in" if saved else "no checkpoint") in message
    for step in saved:
        checkpoints.read(out / "checkpoints", step)


@pytest.mark.slow
def test_a_full_disk(refused, run, tmp_path, monkeypatch):
    words = ("pretrain", "--data", "digits/upright", *SMALL, "--model", "linear", "--eval-every", "1", "--out")
    words = (*words, tmp_path / "out")
    orbax, count = arrays._orbax, iter(range(100))

    def full():
        if next(count) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return orbax()

    with monkeypatch.context() as patch:
        patch.setattr(arrays, "_orbax", full)
        message = refused(*words)
    assert "could not save step 3" in message
    assert "No space left on device" in message
    assert "Free some space" in message
    saved = checkpoints.steps(tmp_path / "out" / "checkpoints")
    assert saved == [1, 2]
    for step in saved:
        checkpoints.read(tmp_path / "out" / "checkpoints", step)
    run(*words)
    run(*words[:-1], tmp_path / "unbroken")
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == (tmp_path / "unbroken" / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_a_disk_that_is_really_full(run, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs rights")
    try:
        words = ("pretrain", "--data", "digits/upright", *SMALL, "--eval-every", "1", "--out", str(small / "out"))
        done = subprocess.run([sys.executable, "-m", "jaxtransfer", *words], capture_output=True, text=True)
        begun = ("step ", f"jaxtransfer {VERSION}: ")  # of some steps, and that it begins
        said = [line for line in done.stderr.splitlines() if not line.startswith(begun)]
        assert (done.returncode, len(said)) == (2, 1), done.stderr
        assert "No space left on device" in said[0]
        assert len(said[0]) < 600
        saved = checkpoints.steps(small / "out" / "checkpoints")
        assert saved
        for step in saved:
            checkpoints.read(small / "out" / "checkpoints", step)
        assert subprocess.run(["mount", "-o", "remount,size=64m", str(small)]).returncode == 0
        run(*words)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_errors_of_the_system_are_one_line(refused, monkeypatch, capsys):
    from jaxtransfer.cli import Models

    def raising(error):
        def run(self):
            raise error

        return run

    monkeypatch.setattr(Models, "run", raising(PermissionError(errno.EACCES, "Permission denied", "/x")))
    assert refused("models") == "Permission denied (/x); what was saved before is unharmed"
    monkeypatch.setattr(Models, "run", raising(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")))
    assert "choose a smaller --batch-size" in refused("models")
    monkeypatch.setattr(Models, "run", raising(ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")))
    assert "the device has too little memory" in refused("models")
    monkeypatch.setattr(Models, "run", raising(MemoryError()))
    assert refused("models") == ("this machine has too little memory; choose a smaller --batch-size, or smaller images")
    monkeypatch.setattr(Models, "run", raising(OverflowError("Python int too large to convert to C long")))
    assert refused("models").startswith("a number is too large: Python int too large")
    monkeypatch.setattr(Models, "run", raising(KeyboardInterrupt()))
    assert main(["models"]) == 130
    assert capsys.readouterr().err == "jaxtransfer: interrupted\n"
    monkeypatch.setattr(Models, "run", raising(RuntimeError("a mistake of ours")))
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        main(["models"])


@pytest.mark.slow
def test_a_run_of_another_length_says_what_its_schedule_means(refused, source, tmp_path):
    shutil.copytree(source, tmp_path / "run")
    words = ("pretrain", "--data", "digits/upright", "--batch-size", "32", "--out", tmp_path / "run", "--steps")
    message = refused(*words, "40")
    assert (
        "is a run of 20 steps, and got steps=40 with another optimizer: a schedule over all steps (a cosine" in message
    )
    assert "finetune --from" in message
    assert "run of 20 steps" in refused(*words, "10")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 20


@pytest.mark.slow
def test_a_source_that_was_trained_again_is_noticed(run, refused, source, tmp_path):
    """An anchor of other weights would make another penalty of the same command."""
    shutil.copytree(source, tmp_path / "source")
    tune = ("finetune", "--from", tmp_path / "source", "--data", "digits/noisy", *SMALL, "--method", "l2-sp")
    run(*tune, "--out", tmp_path / "out")
    shutil.rmtree(tmp_path / "source")
    run(*DIGITS, "--steps", "20", "--eval-every", "20", "--seed", "7", "--out", tmp_path / "source")
    message = refused(*tune, "--out", tmp_path / "out")
    assert "holds a run of another configuration (starting weights; frozen weights)" in message
