"""A signal lets a step finish and be saved; what is resumed ends bit for bit as the unbroken run."""

import hashlib
import os
import signal
import threading
import time

import chex
import jax
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.runs import checkpoints
from jaxtransfer.train.interrupt import Interrupted, noticed

OBJECTIVE = jt.classification(jt.models.mlp(3, hidden=(4,)))
NUMBERS = (signal.SIGINT, signal.SIGTERM)
ENDS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}


def batch(i):
    rng = np.random.default_rng([3, i])
    return {"image": rng.normal(size=(6, 4)).astype(np.float32), "label": rng.integers(0, 3, 6).astype(np.int32)}


class Sends:
    """Data that send a signal when one of their batches is asked for, maybe several times."""

    def __init__(self, number, at, times=1):
        self.number, self.at, self.times = number, at, times

    def iterate(self, start):
        for i in range(start, 99):
            if i == self.at:
                for _ in range(self.times):
                    os.kill(os.getpid(), self.number)
            yield batch(i)


PLAIN = Sends(None, None)
EVAL = [batch(1000), batch(1001), batch(1002)]


def fit(out, data=PLAIN, **options):
    options = {"steps": 12, "key": 3, "eval_data": EVAL, "eval_every": 6, "log_every": 4, **options}
    return jt.fit(OBJECTIVE, optax.adam(0.05), data, out=out, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    return fit(out), (out / "metrics.jsonl").read_bytes()


@pytest.fixture(autouse=True)
def handlers_stay():
    before = [signal.getsignal(number) for number in NUMBERS]
    yield
    assert [signal.getsignal(number) for number in NUMBERS] == before


def assert_ends_as(whole, fitted, out):
    chex.assert_trees_all_equal(fitted.state.params, whole[0].state.params)
    chex.assert_trees_all_equal(fitted.state.opt_state, whole[0].state.opt_state)
    assert fitted.history == whole[0].history
    assert fitted.best == whole[0].best
    assert (out / "metrics.jsonl").read_bytes() == whole[1]


@pytest.mark.parametrize(
    "at", [pytest.param(2, marks=pytest.mark.slow), 5, pytest.param(8, marks=pytest.mark.slow), 11]
)
@pytest.mark.parametrize("number", NUMBERS)
def test_the_step_is_saved_and_the_run_ends_as_the_unbroken_one(tmp_path, whole, number, at, caplog):
    with pytest.raises(ENDS[number], match=rf"stopped by {number.name} after step \d+, which is saved in .*run") as end:
        fit(tmp_path / "run", Sends(number, at))
    if number == signal.SIGTERM:
        assert end.value.code == 143
    saved = checkpoints.steps(tmp_path / "run" / "checkpoints")[-1]
    assert at - 2 <= saved <= at + 1  # two batches are made ahead
    with caplog.at_level("INFO", logger="jaxtransfer"):
        resumed = fit(tmp_path / "run")
    at_once = (
        f"{signal.Signals(number).name}: the step under way is finished and saved first; once more ends it at once"
    )
    assert caplog.messages == [at_once, f"{tmp_path / 'run'}: resumes from step {saved} of 12"]
    assert_ends_as(whole, resumed, tmp_path / "run")


@pytest.mark.slow
def test_time_and_again(tmp_path, whole):
    for at in (2, 4, 7, 11):
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "run", Sends(signal.SIGINT, at))
    assert_ends_as(whole, fit(tmp_path / "run"), tmp_path / "run")


class Evaluation:
    """Batches of an evaluation, one of which comes with a signal."""

    def __init__(self, at):
        self.at, self.read = at, 0

    def __iter__(self):
        for one in EVAL:
            self.read += 1
            if self.read == self.at:
                os.kill(os.getpid(), signal.SIGINT)
            yield one


@pytest.mark.slow
@pytest.mark.parametrize(("at", "step"), [(1, 6), (2, 6), (5, 12)])
def test_an_evaluation_is_not_waited_for_and_made_up_for(tmp_path, whole, at, step):
    data = Evaluation(at)
    with pytest.raises(KeyboardInterrupt, match=f"after step {step}, which is saved"):
        fit(tmp_path / "run", eval_data=data)
    assert data.read == at
    records = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert not any(f'"step": {step}, "eval' in line for line in records)
    resumed = fit(tmp_path / "run")
    assert_ends_as(whole, resumed, tmp_path / "run")
    assert checkpoints.read(tmp_path / "run" / "checkpoints", step).meta["eval/loss"] > 0  # which may be the best
    assert fit(tmp_path / "run").timing == {}


def test_a_second_signal_ends_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt) as end:
        fit(tmp_path / "run", Sends(signal.SIGINT, 5, times=2))
    assert not isinstance(end.value, Interrupted)
    assert checkpoints.steps(tmp_path / "run" / "checkpoints") == []


def test_without_a_run_directory_nothing_changes():
    with pytest.raises(KeyboardInterrupt) as end:
        fit(None, Sends(signal.SIGINT, 5))
    assert not isinstance(end.value, Interrupted)


@pytest.mark.slow
def test_handlers_of_a_caller_stay(tmp_path):
    came = []
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in NUMBERS}
    try:
        for number in NUMBERS:
            assert int(fit(tmp_path / number.name, Sends(number, 5)).state.step) == 12
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert came == list(NUMBERS)


def test_another_thread_trains_without_handlers(tmp_path):
    done = []
    thread = threading.Thread(target=lambda: done.append(fit(tmp_path / "run")))
    thread.start()
    thread.join()
    assert int(done[0].state.step) == 12


@pytest.mark.slow
def test_a_call_of_several_steps_is_finished(tmp_path):
    def sampler(key, data):
        rows = jax.random.randint(key, (6,), 0, 12)
        return {name: column[rows] for name, column in data.items()}

    data = {name: np.concatenate([batch(0)[name], batch(1)[name]]) for name in ("image", "label")}
    options = {"data": data, "sample": sampler, "steps_per_call": 3, "log_every": 6, "steps": 18, "eval_every": 9}

    def interrupt(record):
        if record["step"] == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit, match="after step 9, which is saved"):
        fit(tmp_path / "run", log=interrupt, **options)
    want = fit(tmp_path / "whole", **options)
    got = fit(tmp_path / "run", **options)
    chex.assert_trees_all_equal(got.state.params, want.state.params)
    assert got.history == want.history


def long_call():
    """Half a second or more in which the main thread runs no Python, as in a compiled step."""
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)


def test_a_signal_is_answered_while_a_step_is_under_way(caplog):
    with noticed(active=True) as signals:
        begin = time.time()
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        long_call()
        took = time.time() - begin
        assert signals.seen == signal.SIGINT
    (record,) = caplog.records
    assert record.getMessage().startswith("SIGINT: the step under way is finished and saved first")
    assert record.created - begin < 0.05 + (took - 0.05) / 2


def test_two_signals_during_one_step_end_it_at_once(caplog):
    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)

    def steps():
        with noticed(active=True):
            threading.Timer(0.05, twice).start()
            for _ in range(100):
                long_call()

    begin = time.time()
    with pytest.raises(KeyboardInterrupt):
        steps()
    assert time.time() - begin < 60
    assert len(caplog.records) == 1


def test_a_pipe_of_somebody_else_stays_in_place(caplog):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    try:
        with noticed(active=True) as signals:
            os.kill(os.getpid(), signal.SIGTERM)
        assert os.read(reading, 9) == bytes([signal.SIGTERM])
    finally:
        assert signal.set_wakeup_fd(-1) == writing
        os.close(writing)
        os.close(reading)
    assert signals.seen == signal.SIGTERM
    assert len(caplog.records) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.filterwarnings("ignore")  # JAX warns of forks; this one runs nothing of it
def test_signals_of_forked_workers_are_their_own(caplog):
    reading, writing = os.pipe()
    with noticed(active=True) as signals:
        if not (worker := os.fork()):
            try:
                os.write(writing, b"!")
                time.sleep(20)
            finally:
                os._exit(0)
        os.read(reading, 1)
        os.kill(worker, signal.SIGTERM)  # as a pool ends its workers; Ctrl-C reaches them as well
        assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == -signal.SIGTERM
        time.sleep(0.1)
        assert (signals.seen, caplog.records) == (None, [])
        os.kill(os.getpid(), signal.SIGINT)  # the first one of this process
        assert signals.seen == signal.SIGINT
    os.close(reading)
    os.close(writing)
    assert len(caplog.records) == 1
