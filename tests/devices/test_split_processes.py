"""Weights that are split over the devices of several processes: the model of one, saved by all, read by any number."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxtransfer as jt
from jaxtransfer.cli.launch import free_port
from jaxtransfer.cli.together import LOST
from jaxtransfer.devices import processes
from jaxtransfer.runs import checkpoints

PROGRAM = Path(__file__).parent / "split_runs.py"
pytestmark = pytest.mark.slow


def run(out, kind, count=2, devices=2, timeout=600, **options):
    """Runs the program in so many processes; returns the exit code, the last line and the errors of each."""
    words = [sys.executable, str(PROGRAM), str(out), kind, *(f"{name}={value}" for name, value in options.items())]
    port, jobs = free_port(), []
    for index in range(count):
        told = {processes.ADDRESS: f"localhost:{port}", processes.COUNT: str(count), processes.INDEX: str(index)}
        more = {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(Path(jt.__file__).parents[1])}
        environment = {**os.environ, **more, **(told if count > 1 else {})}
        flags = [word for word in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in word]
        environment["XLA_FLAGS"] = " ".join(flags)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        jobs.append(subprocess.Popen(words, env=environment, **pipes))
    try:
        told = [job.communicate(timeout=timeout) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    return [job.returncode for job in jobs], [out.splitlines()[-1:] for out, _ in told], [err for _, err in told]


def done(*arguments, **options):
    """Runs, and returns what each process holds."""
    codes, said, errors = run(*arguments, **options)
    assert not any(codes), errors
    return [json.loads(lines[0]) for lines in said]


def leaves(out, step=None):
    return checkpoints.read(Path(out) / "checkpoints", step).leaves


def assert_close(one, other, tolerance=0.0):
    mine, theirs = leaves(one), leaves(other)
    assert mine.keys() == theirs.keys()
    for path, leaf in mine.items():
        np.testing.assert_allclose(theirs[path], leaf, rtol=0, atol=tolerance, err_msg=path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The run in one process, of one device, and the one that is split over two; to the same step."""
    folder = tmp_path_factory.mktemp("runs")
    held = {"one": done(folder / "one", "whole", count=1, devices=1), "two": done(folder / "two", "fsdp")}
    return folder, held


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """The run in one process, two steps longer, as if nothing had ended it."""
    out = tmp_path_factory.mktemp("longer") / "run"
    done(out, "whole", count=1, devices=1, steps=8)
    return out


def test_two_processes_of_two_devices_train_the_model_of_one(runs, tmp_path):
    folder, held = runs
    assert_close(folder / "one", folder / "two", 1e-5)
    (whole,) = held["one"]
    biases = 3 * 4 * (4 + 32 + 1)  # of the head and of the first layer, too small to be split, and Adam's count
    for process in held["two"]:
        assert process["step"] == 6
        assert whole["held"] / 4 <= process["held"] <= whole["held"] / 4 + biases
    mine, theirs = (
        [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    for one, two in zip(mine, theirs, strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5)
    files = {path.parent.parent.name for path in (folder / "two" / "checkpoints").rglob("d/*")}
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= files


@pytest.mark.parametrize("kind", ["mixed", "across"])
def test_layers_are_split_within_a_process_and_over_processes(runs, tmp_path, kind):
    done(tmp_path / kind, kind)
    assert_close(runs[0] / "one", tmp_path / kind, 1e-5)


@pytest.mark.parametrize(("begun", "kind", "count", "devices"), [
    ("two", "whole", 1, 1),
    ("two", "fsdp", 1, 2),
    ("two", "whole", 2, 2),
    ("one", "fsdp", 2, 2),
])  # fmt: skip
def test_a_run_goes_on_in_other_processes(runs, longer, tmp_path, begun, kind, count, devices):
    out = shutil.copytree(runs[0] / begun, tmp_path / begun)
    before = leaves(out)
    done(out, kind, count=count, devices=devices, steps=6, check=1)  # compares what it reads with the file, bit by bit
    assert all(np.array_equal(leaf, before[path]) for path, leaf in leaves(out).items())
    done(out, kind, count=count, devices=devices, steps=8)
    assert_close(longer, out, 1e-5)


@pytest.mark.parametrize("kind", ["truncated", "flipped", "missing"])
def test_a_damaged_part_is_named_and_the_save_before_is_used(runs, tmp_path, kind):
    out = shutil.copytree(runs[0] / "two", tmp_path / "two")
    part = max((out / "checkpoints" / "step_000000006" / "state" / "ocdbt.process_1" / "d").iterdir())
    content = bytearray(part.read_bytes())
    if kind == "missing":
        part.unlink()
    elif kind == "truncated":
        part.write_bytes(content[:-3])
    else:
        content[len(content) // 2] ^= 16
        part.write_bytes(content)
    codes, _, errors = run(out, "fsdp")
    assert codes == [0, 0], errors
    assert part.name in errors[0]
    assert "step_000000006.damaged-1, using the one before" in errors[0]
    assert_close(runs[0] / "two", out)


@pytest.mark.parametrize(("place", "who"), [("before", 1), ("written", 1), ("merging", 0), ("commit", 0)])
def test_a_process_killed_in_the_middle_of_a_save_costs_the_steps_since_the_last(runs, tmp_path, place, who):
    codes, _, errors = run(tmp_path / "run", "fsdp", die=place, who=who)
    assert codes[who] == -signal.SIGKILL, errors
    assert codes[1 - who] in (LOST, -signal.SIGABRT), errors
    assert checkpoints.steps(tmp_path / "run" / "checkpoints") == [2]
    assert (tmp_path / "run" / "checkpoints" / ".writing-4").is_dir()
    done(tmp_path / "run", "fsdp")
    assert_close(runs[0] / "two", tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob(".writing-*"))


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize(("place", "reason"), [("full", "No space left on device"), ("half", "File too large")])
def test_a_part_that_can_not_be_written_ends_all_and_costs_no_save(tmp_path, place, reason, who):
    codes, _, errors = run(tmp_path / "run", "fsdp", die=place, who=who, timeout=300)
    ends = [[2, 2], [2, LOST]] if place == "half" else [[2, 2]]  # the first may be gone before the other has ended
    assert codes in ends, errors
    assert "could not save step 4" in errors[0]
    assert reason in (errors[0] + errors[who] if place == "half" else errors[who])
    assert checkpoints.steps(tmp_path / "run" / "checkpoints") == [2]
    assert not list((tmp_path / "run" / "checkpoints").glob(".writing-*"))
