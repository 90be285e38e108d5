"""The lists of --help and of what is known are the registries: a row that is added shows, and its name is taken."""

import ast
import re
from pathlib import Path

import pytest

import jaxtransfer as jt
from jaxtransfer.cli import COMMANDS, main
from jaxtransfer.cli.registry import distillation, fewshot, finetuning, selfsupervised
from jaxtransfer.cli.registry.row import Row, listed

FAMILIES = {
    "finetune": ("--method", finetuning.METHODS, "full"),
    "distill": ("--loss", distillation.LOSSES, "kd"),
    "contrast": ("--method", selfsupervised.METHODS, "simclr"),
    "meta": ("--method", fewshot.METHODS, "prototypical"),
}
WORDS = {
    "finetune": ("--from", "nowhere"),
    "distill": ("--teacher", "nowhere"),
    "contrast": ("--data-dir", "nowhere"),
    "meta": ("--tasks", "8", "--data-dir", "nowhere"),
}


def help_of(capsys, command):
    """The text of --help without its frame, words one space apart."""
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


@pytest.mark.parametrize("command", FAMILIES)
def test_a_row_is_in_the_help_and_among_the_choices(capsys, refused, monkeypatch, tmp_path, command):
    option, registry, default = FAMILIES[command]
    words = (command, *WORDS[command], "--data", "digits/upright", "--out", tmp_path / "out", option)
    before = help_of(capsys, command)
    assert " ".join(listed(registry).split()) in before
    assert f"(default: {default})" in before
    assert "wizardry" not in before
    assert "unknown" in refused(*words, "wizardry")
    row = Row(registry[default].build, "do magic", registry[default].facts, "Merlin 2027")
    monkeypatch.setitem(registry, "wizardry", row)
    assert "- wizardry: do magic (Merlin 2027)." in help_of(capsys, command)
    message = refused(*words, "wizardry")  # it goes on to what else is wrong
    assert "unknown" not in message
    assert "nowhere" in message
    assert "did you mean 'wizardry'" in refused(*words, "wizardy")


def test_rows_of_the_same_words_stand_together():
    rows = {
        "a": Row(len, "count", None, "One 2001"),
        "b": Row(len, "count", None, "Two 2002"),
        "c": Row(len, "weigh", None),
        "d": Row(len, "count", None, "One 2001"),
    }
    assert listed(rows) == "- a, b: count (One 2001, Two 2002).\n- c: weigh.\n- d: count (One 2001)."


def test_an_option_names_the_methods_that_have_it(capsys, monkeypatch):
    queue = selfsupervised.METHODS["moco"]
    assert "(moco, nnclr; default: usual, or what the data allow)" in help_of(capsys, "contrast")
    monkeypatch.setitem(selfsupervised.METHODS, "later", queue)
    assert "(moco, nnclr, later; default: usual, or what the data allow)" in help_of(capsys, "contrast")


def test_no_command_asks_for_a_name():
    """What a run knows decides, and rows' facts: no comparison with a command's or a method's name."""
    names = {*COMMANDS, *(name for _, registry, _ in FAMILIES.values() for name in registry)}
    asked = []
    for path in Path(jt.__file__).parent.joinpath("cli").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                texts = {one.value for one in ast.walk(node) if isinstance(one, ast.Constant)}
                asked += [f"{path.name}:{node.lineno}: {found}" for found in sorted(map(str, texts)) if found in names]
    assert not asked
