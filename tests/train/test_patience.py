"""A source that gives no batch is told and ends the run; one that is slow, a compilation, an evaluation do not."""

import signal
import subprocess
import sys
import threading
import time

import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.runs import checkpoints
from jaxtransfer.train.patience import Patience

OBJECTIVE = jt.classification(jt.models.mlp(3, hidden=()))


FOREVER = threading.Event().wait


def batch(i):
    return {"image": np.full((6, 4), i, np.float32), "label": np.arange(6, dtype=np.int32) % 3}


class Source:
    """Batches, of which one does not come, by whatever way a thread waits; or comes late."""

    def __init__(self, at=None, wait=FOREVER, late=0.0):
        self.at, self.wait, self.late = at, wait, late

    def iterate(self, start):
        for i in range(start, 99):
            if i == self.at:
                self.wait()
            time.sleep(self.late)
            yield batch(i)


class Evaluation:
    """One batch, and after it none, nor an end."""

    def __iter__(self):
        yield batch(0)
        threading.Event().wait()


def fit(data, out=None, **options):
    return jt.fit(OBJECTIVE, optax.sgd(0.1), data, **{"steps": 6, "data_patience": 0.05, "out": out, **options})


@pytest.mark.parametrize("wait", [FOREVER, lambda: time.sleep(99)])
def test_a_batch_that_does_not_come_is_told_and_ends_the_run(tmp_path, caplog, wait):
    handlers = [signal.getsignal(number) for number in (signal.SIGURG, signal.SIGINT)]
    with pytest.raises(jt.StuckDataError, match=r"batch 5 of the training data did not come in 0\.5 s\. .*same call"):
        fit(Source(4, wait), tmp_path / "run", save_every=2)
    told = [record.getMessage() for record in caplog.records]
    assert 3 <= len(told) <= 10
    assert all(one.startswith("waiting for batch 5 of the training data, 0.") for one in told)
    assert all(one.endswith("so far; the run ends after 0.5 s") for one in told)
    assert [signal.getsignal(number) for number in (signal.SIGURG, signal.SIGINT)] == handlers
    assert checkpoints.steps(tmp_path / "run" / "checkpoints") == [2]  # two batches are made ahead
    assert int(fit(Source(), tmp_path / "run", save_every=2).state.step) == 6


def test_the_first_batch_and_those_of_an_evaluation_are_named():
    with pytest.raises(jt.StuckDataError, match="batch 1 of the training data"):
        fit(Source(0))
    with pytest.raises(jt.StuckDataError, match="batch 2 of the evaluation data"):
        fit(Source(), eval_data=Evaluation())


def test_a_thread_of_a_pipeline_that_waits_is_noticed():
    examples = jt.data.Dataset.from_columns(
        {"image": np.zeros((9, 2, 2, 1), np.float32), "label": np.zeros(9, np.int32)}
    )
    done = threading.Event()

    def augment(batch, rng):
        done.wait(30)
        return batch

    try:
        with pytest.raises(jt.StuckDataError, match="batch 1 of the training data"):
            fit(jt.data.pipeline(examples, 3, augment=augment))
    finally:
        done.set()  # else the interpreter waits for the thread


@pytest.mark.slow
def test_slow_batches_compilation_and_evaluation_are_no_alarm(caplog):
    class Slow:
        def __iter__(self):
            for i in range(30):
                time.sleep(0.05)
                yield batch(i)

    def measure(state):
        time.sleep(1.5)
        return {"x": 1.0}

    fitted = fit(Source(late=0.05), data_patience=1.0, eval_data=Slow(), eval_every=30, measure=measure, steps=30)
    assert int(fitted.state.step) == 30
    assert caplog.records == []


def test_whoever_takes_the_signal_or_another_thread_is_only_told(caplog):
    come = threading.Event()

    def after_the_patience():
        while len(caplog.records) < 12:
            time.sleep(0.01)
        come.set()

    def late():
        threading.Thread(target=after_the_patience, daemon=True).start()
        assert come.wait(60)

    before = signal.signal(signal.SIGURG, handler := lambda *_: None)
    try:
        fit(Source(2, late))
        assert signal.getsignal(signal.SIGURG) is handler
    finally:
        signal.signal(signal.SIGURG, before)
    come.clear()
    caplog.clear()
    thread = threading.Thread(target=lambda: fit(Source(2, late)))
    thread.start()
    thread.join(60)
    assert len(caplog.records) >= 12
    assert "ends" not in caplog.records[-1].getMessage()


def test_a_signal_that_comes_when_the_batch_is_there_does_nothing():
    with Patience(5) as patience:
        with patience.on("x", 1):
            patience._over = patience._awaited
        signal.raise_signal(signal.SIGURG)
        assert list(patience.each([1, 2], "x")) == [1, 2]


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), "3", [1.0]])
def test_no_patience_is_refused(seconds):
    with pytest.raises(jt.InputError, match="data_patience must be positive"):
        fit(Source(), data_patience=seconds)


COMMAND = """
import threading
from jaxtransfer.data import dataset
read, calls = dataset.Dataset.read, []
def stuck(self, rows):
    calls.append(1)
    if len(calls) > 8:
        threading.Event().wait()
    return read(self, rows)
dataset.Dataset.read = stuck
from jaxtransfer.cli import run
run()
"""


@pytest.mark.slow
def test_a_command_ends_although_its_threads_wait(tmp_path):
    words = ["pretrain", "--data", "digits/upright", "--model", "mlp", "--steps", "99", "--out", str(tmp_path / "run")]
    words += ["--data-patience", "0.2", "--eval-every", "50"]
    ended = subprocess.run([sys.executable, "-c", COMMAND, *words], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 75
    assert "waiting for batch" in ended.stderr
    assert "jaxtransfer: error: batch" in ended.stderr
    assert "Traceback" not in ended.stderr
