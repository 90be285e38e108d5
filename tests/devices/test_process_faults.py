"""What can go wrong in a job of two processes, made to go wrong: nothing is lost but the steps since the last save."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import commands
from jobs import assert_alike, ended, start, until

from jaxtransfer.cli.together import LOST
from jaxtransfer.runs import checkpoints

PROGRAM = Path(commands.__file__).with_name("endless.py")
STEPS = 40
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The unbroken run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    codes, told = ended(start(PROGRAM, out, STEPS), timeout=600)
    assert codes == [0, 0], told
    return out


def saved(out):
    return checkpoints.steps(Path(out) / "checkpoints")


def goes_on(out, whole, **options):
    """Runs the command to its end, and compares with the unbroken run, bit by bit."""
    codes, told = ended(start(PROGRAM, out, STEPS, **options), timeout=600)
    assert codes == [0] * len(codes), told
    assert_alike(whole, out, tolerance=0)
    return told[0]


def lines_of(text):
    return [line for line in text.splitlines() if line.startswith("jaxtransfer: ")]


def test_killed_at_random_instants_it_ends_as_the_unbroken_run(tmp_path, whole):
    seed = time.time_ns() % 2**32
    rng, out, killed = np.random.default_rng(seed), tmp_path / "run", 0
    for trial in range(5):
        jobs, whom = start(PROGRAM, out, STEPS, "wait=30"), [[0], [1], [0, 1]][trial % 3]
        least = max(saved(out), default=0) + int(rng.integers(0, 12)) * (trial > 0)
        while trial > 0 and max(saved(out), default=0) < least and jobs[0].poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3 if trial else 20))  # the first one while they start
        for one in whom:
            jobs[one].kill()
        codes, told = ended(jobs, timeout=120)  # those that have not met yet wait for each other as well
        if codes == [0, 0]:
            break
        killed += 1
        for code, text in zip(codes, told, strict=True):
            if code not in (-signal.SIGKILL, 0):
                assert code == LOST or (code == -signal.SIGABRT and whom == [0]), (seed, codes, told)
                said = ("lost process", "lost another one", "another task died", "did not all come")
                assert any(words in text for words in said), (seed, told)
    assert killed, "it ended before it could be killed"
    goes_on(out, whole)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_checkpoint_is_set_aside_by_the_first_and_both_go_on_before_it(tmp_path, whole, damage):
    out = tmp_path / "run"
    codes, told = ended(start(PROGRAM, out, STEPS - 4), timeout=600)
    assert codes == [0, 0], told
    before = saved(out)
    for step in before if damage == "both" else before[-1:]:
        folder = out / "checkpoints" / f"step_{step:09d}"
        file = max((one for one in folder.rglob("*") if one.is_file()), key=lambda one: one.stat().st_size)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        if damage == "missing":
            file.unlink()
        else:
            file.write_bytes(content[: len(content) // 2] if damage == "truncated" else content)
    told = goes_on(out, whole)
    aside = sorted(path.name for path in (out / "checkpoints").glob("*.damaged-*"))
    damaged = before if damage == "both" else before[-1:]
    assert aside == [f"step_{step:09d}.damaged-1" for step in damaged]
    assert told.count("set aside as") == len(damaged)
    goes_on_from = [] if damage == "both" else [f"resumes from step {before[-2]} of {STEPS}"]
    assert [line.split(": ")[-1] for line in told.splitlines() if "resumes from" in line] == goes_on_from


def filled(file):
    """Writes until the disk is full."""
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as fill:
        while True:
            fill.write(b"x" * 1000)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_full_disk_ends_both_and_costs_what_was_not_saved(tmp_path, whole):
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], check=False).returncode:
        pytest.skip("may not mount")
    try:
        jobs = start(PROGRAM, place / "run", STEPS)
        until(lambda: len(saved(place / "run")) > 1, jobs)
        filled(place / "fill")
        codes, told = ended(jobs, timeout=60)
        assert codes[0] == 2, told
        assert codes[1] in (2, LOST), told
        assert "No space left on device" in lines_of(told[0])[-1]
        assert "Traceback" not in told[0] + told[1]
        assert saved(place / "run")
        (place / "fill").unlink()
        goes_on(place / "run", whole)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("kind", ["below a file", "read-only"])
def test_a_folder_that_can_not_be_written_is_told_once(tmp_path, kind):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "run"
    if kind == "read-only":
        out = tmp_path / "mounted" / "run"
        out.parent.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(out.parent)]
        if os.geteuid() != 0 or subprocess.run(words, check=False).returncode:
            pytest.skip("may not mount")
    try:
        codes, told = ended(start(PROGRAM, out, STEPS), timeout=120)
    finally:
        if kind == "read-only":
            subprocess.run(["umount", "-l", str(out.parent)], check=True)
    assert codes == [2, 2], told
    (line,) = lines_of(told[0])
    assert f"cannot write to the run directory {out}" in line
    assert told[1] == ""


def test_a_loss_that_is_not_finite_is_told_once_with_its_term(tmp_path):
    codes, told = ended(start(PROGRAM, tmp_path / "run", STEPS, "spoiled"), timeout=120)
    assert codes == [2, 2], told
    (line,) = lines_of(told[0])
    assert "not finite" in line
    assert "'odd'" in line
    assert "nan" in line
    assert told[1] == ""


@pytest.mark.parametrize("index", [0])
def test_data_that_do_not_come_to_one_end_both(tmp_path, index):
    codes, told = ended(start(PROGRAM, tmp_path / "run", STEPS, f"stuck={index}"), timeout=300)
    assert codes == [LOST, LOST], told
    assert f"process {index} of 2 waits for batch 9 of the training data, 1 s so far" in told[index]
    assert "batch 9 of the training data did not come in 10 s" in lines_of(told[index])[-1]
    assert "--data-patience" in lines_of(told[index])[-1]
    assert "lost process" in told[1 - index]
    assert saved(tmp_path / "run")[-1] == 6  # two batches are made ahead


def test_a_run_of_one_process_goes_on_in_two(tmp_path, whole):
    out = tmp_path / "run"
    codes, told = ended(start(PROGRAM, out, STEPS // 2, "alone", count=1, devices=1), timeout=600)
    assert codes == [0], told
    codes, told = ended(start(PROGRAM, out, STEPS), timeout=600)
    assert codes == [0, 0], told
    assert f"resumes from step {STEPS // 2} of {STEPS}" in told[0]
    assert_alike(whole, out)


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_whose_others_do_not_come_waits_for_so_long_and_says_so(tmp_path, index):
    begin = time.monotonic()
    jobs = start(PROGRAM, tmp_path / "run", STEPS, "wait=5")
    jobs[1 - index].kill()
    jobs[1 - index].wait()
    codes, told = ended(jobs, timeout=120)
    assert codes[index] == LOST, told
    (line,) = lines_of(told[index])
    assert line.startswith(f"jaxtransfer: error: process {index} of 2 waited 5 s at localhost:")
    assert "Traceback" not in told[index]
    assert not (tmp_path / "run").exists()
    assert time.monotonic() - begin > 5
