"""`jaxtransfer launch`: processes that start together, and none that is left when one has failed."""

import os
import signal
import textwrap
import threading
import time

import pytest

from jaxtransfer.cli import launch, main
from jaxtransfer.cli.together import LOST

HEAD = "import os, signal, sys, time\nindex = int(os.environ['JAX_PROCESS_ID'])\n"


@pytest.fixture
def started(tmp_path, capsys):
    """Runs a script of a few lines in processes; returns the exit code, the lines on stdout, sorted, and stderr."""

    def go(text, *options):
        script = tmp_path / "script.py"
        script.write_text(HEAD + textwrap.dedent(text))
        capsys.readouterr()
        code = main(["launch", *options, "--", str(script), "word"])
        out, err = capsys.readouterr()
        return code, sorted(out.splitlines()), err

    return go


def test_each_process_knows_the_others(started, monkeypatch):
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    text = """
        names = "JAX_NUM_PROCESSES", "JAX_NUM_CPU_DEVICES", "JAX_PLATFORMS"
        print(index, sys.argv[1], *(os.environ.get(name) for name in names))
        print("[Gloo] Rank 0 is connected")
    """
    assert started(text, "--processes", "3") == (0, [f"{i} word 3 None cpu" for i in range(3)], "")
    assert started(text, "--devices", "2") == (0, [f"{i} word 2 2 cpu" for i in range(2)], "")
    one, other = started("print(os.environ['JAX_COORDINATOR_ADDRESS'])")[1]
    assert one == other
    assert one.startswith("localhost:")


@pytest.mark.slow
def test_the_first_failure_is_the_exit_code_and_the_others_are_ended(started, monkeypatch):
    monkeypatch.setattr(launch, "_GRACE", 0.2)
    begin = time.monotonic()
    code, _, err = started("if index: sys.exit(7)\ntime.sleep(60)")
    assert code == 7
    assert "did not notice" in err
    assert started("sys.exit(3)")[::2] == (3, "")
    code, _, err = started("if index: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)")
    assert code == LOST
    assert "process 1 of 2 was ended by SIGKILL" in err
    assert time.monotonic() - begin < 50


def test_a_signal_reaches_all_processes(started, tmp_path):
    text = """
        def stop(*_):
            print("told", index, flush=True)
            sys.exit(143)

        signal.signal(signal.SIGTERM, stop)
        open(f"{sys.argv[0]}.{index}", "w").close()
        time.sleep(60)
    """

    def once_both_are_there():
        while len(list(tmp_path.glob("script.py.?"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before, sender = signal.getsignal(signal.SIGTERM), threading.Thread(target=once_both_are_there, daemon=True)
    sender.start()
    code, out, _ = started(text)
    assert (code, out) == (143, ["told 0", "told 1"])
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("launch", "--processes", "2"), "needs a command after --"),
        (("launch", "--processes", "0", "--", "pretrain"), "--processes must be"),
        (("launch", "--devices", "0", "--", "pretrain"), "--devices must be"),
        (("inspect", "--distributed"), "inspect has no option --distributed, which is one of pretrain"),
    ],
)
def test_what_can_not_be_launched_is_told(capsys, words, message):
    assert main(list(words)) == 2
    assert message in capsys.readouterr().err
