"""The version, and completions by the tab key in shells."""

import shutil
import subprocess

import pytest

import jaxtransfer as jt
from jaxtransfer.cli import main

_TRY = """
source completions
try() {
  COMP_WORDS=("$@"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()
  _tyro_jaxtransfer jaxtransfer "${COMP_WORDS[$COMP_CWORD]}" "${COMP_WORDS[$((COMP_CWORD - 1))]}"
  echo "${COMPREPLY[*]}"
}
try jaxtransfer ev
try jaxtransfer evaluate runs/a --wo
try jaxtransfer pretrain --data digits/upright --optim
complete -p jaxtransfer
"""


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxtransfer {jt.__version__}\n"
    assert jt.__version__.split(".")[0].isdigit()
    assert main(["--version", "evaluate"]) == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_commands_options_and_files(capsys, tmp_path):
    assert main(["--tyro-print-completion", "bash"]) == 0
    (tmp_path / "completions").write_text(capsys.readouterr().out)
    done = subprocess.run(["bash", "-c", _TRY], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == ""
    *found, registered = done.stdout.splitlines()
    assert found == ["evaluate", "--worst", "--optimizer"]
    assert registered == "complete -o default -F _tyro_jaxtransfer jaxtransfer"  # else the names of files


def test_zsh_gets_a_function_of_its_own(capsys, tmp_path):
    assert main(["--tyro-print-completion", "zsh"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("#compdef jaxtransfer\n")
    (tmp_path / "_jaxtransfer").write_text(text)
    if shutil.which("zsh"):
        assert subprocess.run(["zsh", "-n", tmp_path / "_jaxtransfer"]).returncode == 0
