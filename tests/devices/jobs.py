"""Processes of a job, as tests start them and wait for them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import jaxtransfer as jt
from jaxtransfer.cli.launch import free_port
from jaxtransfer.devices import processes
from jaxtransfer.runs import checkpoints

ROOT = Path(jt.__file__).parents[1]


def start(*words, count=2, devices=2, **more):
    """Starts the processes of a job, of a Python program each; without a launcher, to see how each one ends."""
    address = f"localhost:{free_port()}"
    made = []
    for index in range(count):
        told = {processes.ADDRESS: address, processes.COUNT: str(count), processes.INDEX: str(index)}
        environment = {**os.environ, **told, "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT), **more}
        words = [str(word) for word in words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        made.append(subprocess.Popen([sys.executable, *words], env=environment, **pipes))
    return made


def ended(jobs, timeout=300):
    """Waits for the processes; returns the exit code and stderr of each."""
    try:
        told = [job.communicate(timeout=timeout)[1] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    return [job.returncode for job in jobs], told


def until(condition, jobs, timeout=240):
    """Waits for what the processes do; fails where one of them ends before."""
    end = time.monotonic() + timeout
    while not condition():
        assert all(job.poll() is None for job in jobs), ended(jobs)
        assert time.monotonic() < end
        time.sleep(0.02)


def leaves(out, step=None):
    """The arrays of a run's newest checkpoint by path."""
    return checkpoints.read(Path(out) / "checkpoints", step).leaves


def records(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def assert_alike(one, other, tolerance=1e-5, *, scores=True):
    """Compares the checkpoints and the records of two runs; returns the largest difference of a leaf."""
    mine, theirs = leaves(one), leaves(other)
    assert mine.keys() == theirs.keys()
    largest = 0.0
    for path, leaf in mine.items():
        np.testing.assert_allclose(theirs[path], leaf, rtol=0, atol=tolerance, err_msg=path)
        largest = max(largest, float(np.max(np.abs(theirs[path].astype(float) - leaf.astype(float)), initial=0)))
    for mine, theirs in zip(records(one), records(other), strict=True):
        assert mine.keys() == theirs.keys()
        if not scores and "eval/loss" in mine:
            continue
        for name, value in mine.items():
            assert theirs[name] == pytest.approx(value, rel=1e-4, abs=tolerance), name
    return largest
