"""A training that is killed without warning and started again ends bit for bit as the unbroken one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import quick_compilation

SCRIPT = """
import sys
import jax, jax.numpy as jnp, numpy as np, optax
import jaxtransfer as jt

def init(key, inputs):
    return {"params": {"body": 0.5 * jax.random.normal(key, (4, 16)), "head": jnp.zeros((16, 3))}}

def apply(variables, inputs, *, train, key):
    x = jnp.tanh(inputs @ variables["params"]["body"])
    if train:
        x = jnp.where(jax.random.bernoulli(key, 0.8, x.shape), x, 0)
    return {"logits": x @ variables["params"]["head"]}, {}

class Data:
    def iterate(self, start):
        i = start
        while True:
            rng = np.random.default_rng(i)
            label = rng.integers(0, 3, 8).astype(np.int32)
            yield {"image": (rng.normal(size=(8, 4)) + np.eye(3, 4)[label]).astype(np.float32), "label": label}
            i += 1

objective = jt.classification(jt.Model(init, apply)) + 1e-3 * jt.l2()
evaluation = [next(Data().iterate(10**6))]
fitted = jt.fit(objective, optax.adam(0.01), Data(), steps=90, out=sys.argv[1], save_every=3, log_every=2,
                eval_data=evaluation, eval_every=30)
np.savez(sys.argv[1] + ".npz", **jt.tree.leaves_by_path(fitted.state.params))
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("kill") / "train.py"
    path.write_text(SCRIPT)
    return path


def start(script, out):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick_compilation.of_one_device()}
    return subprocess.Popen([sys.executable, str(script), str(out)], env=environment, stderr=subprocess.PIPE, text=True)


def finish(script, out):
    process = start(script, out)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    with np.load(f"{out}.npz") as weights:
        return {name: weights[name].tobytes() for name in weights}, (out / "metrics.jsonl").read_bytes()


@pytest.fixture(scope="module")
def unbroken(script, tmp_path_factory):
    return finish(script, tmp_path_factory.mktemp("unbroken") / "run")


def wait_for(condition, process, patience=60.0):
    end = time.monotonic() + patience
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"the training ended before it could be killed: {process.stderr.read()}")
        assert time.monotonic() < end, "the training did not come to where it is to be killed"


def steps(out: Path):
    return [int(path.name.split("_")[1]) for path in (out / "checkpoints").glob("step_?????????")]


def kill(script, out, *, after: int, delay: float = 0.0, writing: bool = False):
    """Starts the training and kills it after checkpoint `after`, or while the next one is being written."""
    process = start(script, out)
    wait_for(lambda: max(steps(out), default=0) >= after, process)
    time.sleep(delay)
    if writing:
        wait_for(lambda: any((out / "checkpoints").glob(".writing-*")), process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not Path(f"{out}.npz").exists()


@pytest.mark.slow
def test_killed_once(script, unbroken, tmp_path):
    out = tmp_path / "run"
    kill(script, out, after=6, delay=float(np.random.default_rng().uniform(0, 0.3)))
    assert 6 <= max(steps(out)) < 90
    assert finish(script, out) == unbroken


@pytest.mark.slow
def test_killed_five_times(script, unbroken, tmp_path):
    out, rng, written = tmp_path / "run", np.random.default_rng(), 0
    for number, after in enumerate((0, 6, 18, 33, 51)):
        writing = number % 2 == 1
        delay = 0.0 if writing else float(rng.uniform(0, 0.2)) + (number == 0) * float(rng.uniform(0, 2))
        kill(script, out, after=after, delay=delay, writing=writing)
        written += any((out / "checkpoints").glob(".writing-*"))
    assert written > 0  # at least one died in the middle of a checkpoint
    assert finish(script, out) == unbroken
    assert not list((out / "checkpoints").glob(".writing-*"))
    assert not list((out / "checkpoints").glob("*.damaged-*"))
