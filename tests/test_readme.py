"""The README's own code and commands run as they stand."""

import re
import shlex
from pathlib import Path

import cv2
import jax
import numpy as np
import optax
import pytest

from jaxtransfer.cli import COMMANDS, _parse, main

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
def test_python(capsys, tmp_path, monkeypatch, whole):
    """As it stands, or with short trainings in all blocks but the first, which transfers."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for number, block in enumerate(blocks("python")):
        code = block if whole or number == 0 else re.sub(r"steps=\d{2,3}\b", "steps=10", block)
        exec(compile(code, "README.md", "exec"), names)
    assert names["fitted"].best["eval/accuracy"] > 0.6
    assert int(names["state"].step) == 1
    assert float(names["penalty"]) == 0.0
    assert "reinitialized" in capsys.readouterr().out


@pytest.mark.parametrize("formula", re.findall(r"^\| .* \| `(.*)` \|$", README.split("## Ten lines")[0], flags=re.M))
def test_formulas(formula):
    import jaxtransfer as jt

    model, anchor = jt.models.small_cnn(10), {"model": {}}
    names = {name: getattr(jt, name) for name in jt.__all__} | {"optax": optax}
    names |= {"model": model, "w0": anchor, "alpha": 0.1, "beta": 0.01, "lam": 2.0, "schedule": lambda step: step}
    names |= {"fisher_diagonal": lambda *_: anchor, "objective": None, "state": None, "batches": None}
    names |= {"student": jt.models.mlp(10, name="student"), "teacher": jt.frozen(model, {"params": {}})}
    names |= {"phi": model, "psi": jt.models.mlp(10, name="psi"), "v": [1.0] * 10}
    names |= {"net": model, "v0": {"params": {}}, "eta": 1e-3, "both": model}  # what a step would need isn't looked at
    names |= {"with_heads": jt.models.with_heads, "head": jt.models.head}
    names |= {"base": model.init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.uint8))}
    names |= {"logits": np.zeros((100, 10)), "labels": np.arange(100)}
    assert isinstance(eval(formula, names), jt.Objective)


COMMAND_LINES = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("jaxtransfer ")]


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_commands_are_understood(line):
    words = shlex.split(line)[1:]
    assert isinstance(_parse(words), COMMANDS[words[0]])


@pytest.mark.slow
def test_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cv2.imwrite("photo.png", np.full((20, 20, 3), 128, np.uint8))
    assert len(COMMAND_LINES) >= 6
    for line in COMMAND_LINES:
        assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err


def test_what_is_added_has_its_room():
    """The files and folders of the table "where to add what" are there."""
    table = README.split("## Where to add what")[1]
    named = re.findall(r"`((?:jaxtransfer|tests|experiments)/[^`]*)`", table)
    assert len(named) > 15
    for path in named:
        assert (Path(__file__).parents[1] / path).exists(), path


def test_targets():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
