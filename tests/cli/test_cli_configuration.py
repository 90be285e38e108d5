"""A configuration that is JSON of another shape ends every command that reads a run in one line."""

import json
import os
import shutil

import cv2
import numpy as np
import pytest

from jaxtransfer.cli import main


@pytest.fixture
def broken(source, tmp_path):
    """Makes a run whose configuration is other text."""

    def make(text):
        out = tmp_path / "broken"
        if not out.exists():
            shutil.copytree(source, out)
        (out / "config.json").write_text(text)
        return out

    return make


@pytest.fixture
def commands(refused, tmp_path):
    """Runs every command that reads a run; returns what each refuses with."""
    picture = tmp_path / "picture.png"
    cv2.imwrite(str(picture), np.zeros((8, 8), np.uint8))

    def go(directory):
        more = ("--data", "digits/noisy", "--steps", "2", "--batch-size", "16", "--out", tmp_path / "out")
        return [
            refused("evaluate", directory),
            refused("predict", directory, picture),
            refused("finetune", "--from", directory, *more),
            refused("distill", "--teacher", directory, *more),
            refused("cache-teacher", directory, "--out", tmp_path / "cache"),
        ]

    return go


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["[]", "7", "null", '"run"', "true", "[{}]", "NaN", "", "{", "[" * 100_000, "\ufeff{}"]
)
def test_what_is_no_object(broken, commands, refused, text):
    directory = broken(text)
    again = ("pretrain", "--data", "digits/upright", "--steps", "20", "--batch-size", "32", "--out", directory)
    for message in (*commands(directory), refused(*again)):
        assert "cannot read the configuration" in message


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("command", 7),
        ("command", ["pretrain"]),
        ("class_names", []),
        ("class_names", "abc"),
        ("class_names", 10),
        ("class_names", None),
        ("class_names", list(range(10))),
        ("class_names", {"0": "zero"}),
        ("model", 3),
        ("model", ["small-cnn"]),
        ("model", {}),
        ("model", "smal-cnn"),
        ("image_shape", 8),
        ("image_shape", [8, 8]),
        ("image_shape", [8, 8, 2]),
        ("image_shape", [0, 8, 1]),
        ("image_shape", [8, -8, 1]),
        ("image_shape", ["8", "8", "1"]),
        ("image_shape", [10**12, 8, 1]),
        ("image_shape", [8.0, 8, 1]),
        ("mean", "0.3"),
        ("mean", [float("nan")]),
        ("mean", []),
        ("mean", [0.1, 0.2]),
        ("mean", None),
        ("std", [0.0]),
        ("std", [-1]),
        ("std", [[0.3]]),
        ("data", 7),
        ("data", None),
        ("split", ["train"]),
        ("eval_split", {}),
        ("shots", "5"),
        ("seed", "0"),
        ("seed", -1),
        ("resize", "yes"),
        ("knows", "classes"),
        ("knows", ["everything"]),
        ("model_options", ["width"]),
        ("outputs", 0),
        ("heads", 1),
        ("average", 7),
        ("maximize", None),
        ("matmul_precision", "best"),
    ],
)
def test_an_entry_of_another_shape_is_named(broken, refused, source, entry, value):
    config = json.loads((source / "config.json").read_text())
    message = refused("evaluate", broken(json.dumps(config | {entry: value})))
    assert entry.partition("_")[0] in message
    assert "smal-cnn" in message or f"{entry!r} should be " in message


def test_every_command_reads_it_checked(broken, commands, source):
    config = json.loads((source / "config.json").read_text())
    for message in commands(broken(json.dumps(config | {"class_names": 10}))):
        assert "'class_names' should be a list of names, and is 10" in message


@pytest.mark.parametrize("says", [True, False], ids=["says what it knows", "of an earlier version"])
def test_entries_of_other_commands(broken, refused, source, says):
    config = json.loads((source / "config.json").read_text())
    assert config.pop("knows") == ["classes"]
    few_shot = config | ({"knows": ["episodes"]} if says else {"command": "meta"})
    few_shot |= {"method": ["simclr"], "shots": 1}
    assert "'method' should be one of prototypical" in refused("evaluate", broken(json.dumps(few_shot)))
    few_shot["method"] = "maml"
    assert "its configuration lacks 'statistics'" in refused("evaluate", broken(json.dumps(few_shot)))
    views = config | ({"knows": ["features"], "heads": True} if says else {"command": "contrast"})
    views.pop("shots")
    assert "its configuration lacks 'shots'" in refused("evaluate", broken(json.dumps(views)))


@pytest.mark.parametrize(
    "change", [{"class_names": ["a", "b"]}, {"model": "mlp"}, {"model": "conv4"}, {"image_shape": [8, 8, 3]}]
)
def test_weights_of_another_model(broken, refused, source, change):
    config = json.loads((source / "config.json").read_text()) | change
    config |= {"mean": config["mean"] * 3, "std": config["std"] * 3} if "image_shape" in change else {}
    message = refused("evaluate", broken(json.dumps(config)))
    assert "are not of the model that its configuration describes" in message


def test_a_run_of_an_earlier_version_goes_on(run, source, broken):
    """Its configuration said neither its format nor what it knows; the same command is no other one for that."""
    config = json.loads((source / "config.json").read_text())
    older = {name: value for name, value in config.items() if name not in ("format", "knows")}
    directory = broken(json.dumps(older))
    words = ("pretrain", "--data", "digits/upright", "--steps", "20", "--batch-size", "32", "--out", directory)
    assert run(*words)[0][0].startswith("already done: ")
    assert json.loads((directory / "config.json").read_text()) == config
    (directory / "config.json").write_text(json.dumps(older | {"lr": 0.5}))
    assert main([str(word) for word in words]) == 2


def test_a_pipe_is_no_configuration(broken, commands, refused):
    directory = broken("{}")
    (directory / "config.json").unlink()
    os.mkfifo(directory / "config.json")
    for message in commands(directory):
        assert "it is no regular file" in message


def test_a_run_of_the_library_that_says_what_it_is_can_be_evaluated(run, source, broken):
    config = json.loads((source / "config.json").read_text()) | {"command": "mine", "note": {"any": [None]}}
    for entry in ("eval_split", "shots", "resize"):
        config.pop(entry, None)
    assert json.loads(run("evaluate", broken(json.dumps(config)), "--split", "test[:9]")[0][0])["examples"] == 9
