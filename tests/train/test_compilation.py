"""The compilation ahead of a run: the step finds its program, a signal ends it at once, what it costs is told."""

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.devices.ahead import CompilationCut, compile_ahead, compiling, cost_of
from jaxtransfer.train.compilation import compiled_step, cut_evaluation
from jaxtransfer.train.interrupt import EvaluationCut, Interrupted, Signals, Terminated, noticed

STATELESS: Any = None


class Slow:
    """A lowered program that takes until `release`."""

    def __init__(self):
        self.release = threading.Event()

    def compile(self):
        assert self.release.wait(20)
        return "program"


@pytest.fixture
def slow():
    lowered = Slow()
    yield lowered
    lowered.release.set()


def batches(count=4):
    rng = np.random.default_rng(0)
    return [
        {"image": rng.normal(size=(8, 6)).astype(np.float32), "label": rng.integers(0, 3, 8).astype(np.int32)}
        for _ in range(count)
    ]


@pytest.mark.slow
def test_it_is_waited_for_and_its_seconds_are_told(slow):
    seconds = []

    def told(so_far):
        seconds.append(so_far)
        slow.release.set()

    assert compile_ahead(slow, told=told) == "program"
    assert len(seconds) == 1
    assert seconds[0] >= 1
    assert not compiling()


def test_an_error_of_the_compiler_reaches_the_caller():
    class Broken:
        def compile(self):
            raise MemoryError("too large")

    with pytest.raises(MemoryError, match="too large"):
        compile_ahead(Broken())


def test_what_is_not_waited_for_goes_on(slow):
    with pytest.raises(CompilationCut):
        compile_ahead(slow, stop=lambda: True)
    assert compiling()
    slow.release.set()
    for _ in range(100):
        if not compiling():
            return
        time.sleep(0.05)
    raise AssertionError("the thread never ended")


@pytest.mark.parametrize("tracing", [True, False])
@pytest.mark.parametrize(
    ("number", "kind", "start", "again"),
    [
        (signal.SIGINT, Interrupted, 0, "starts it again"),
        (signal.SIGTERM, Terminated, 7, "goes on from step 7"),
    ],
)
def test_a_signal_ends_the_run_at_once(slow, caplog, number, kind, start, again, tracing):
    class Source:
        def compile(self, state, size, **options):
            threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
            if tracing:
                while True:
                    time.sleep(0.01)
            compile_ahead(slow, **options)

    begin = time.monotonic()
    told = f"stopped by {number.name} while the program was compiled; the same call {again}"
    with pytest.raises(kind, match=told), noticed(active=True) as signals:
        compiled_step(Source(), STATELESS, 1, start, signals, lambda step, text: None)
    assert time.monotonic() - begin < 5
    time.sleep(0.05)
    assert caplog.messages == []  # no step is under way that would be finished first


def test_a_signal_while_the_evaluation_is_compiled_cuts_it_off(slow):
    signals = Signals()

    def evaluate(state, batches, stop):
        threading.Timer(0.2, setattr, (signals, "seen", signal.SIGINT)).start()
        compile_ahead(slow, stop=stop)

    with pytest.raises(EvaluationCut):
        cut_evaluation(evaluate, STATELESS, [], signals)


@pytest.fixture
def lowered():
    """The names of the functions that are lowered meanwhile."""
    names = []

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event.endswith("jaxpr_to_mlir_module_duration"):
            names.append(str(kwargs["fun_name"]).removeprefix("jit(").removesuffix(")"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.slow
@pytest.mark.parametrize("on_mesh", [False, True])
def test_the_step_and_the_evaluation_are_compiled_once(on_mesh, mesh_of, lowered):
    objective = jt.classification(jt.models.mlp(3, hidden=(5,)))
    mesh = mesh_of(2) if on_mesh else None
    jt.fit(objective, optax.sgd(0.1), batches(), steps=4, eval_data=batches(2), eval_every=2, mesh=mesh)
    assert lowered.count("update") == 1
    assert lowered.count("totals") == 1


@pytest.mark.slow
def test_several_steps_in_a_call_are_compiled_once(lowered):
    def sample(key, data):
        return jax.tree.map(lambda column: column[jax.random.randint(key, (4,), 0, 8)], data)

    objective = jt.classification(jt.models.mlp(3, hidden=(5,)))
    jt.fit(objective, optax.sgd(0.1), batches()[0], sample=sample, steps=6, steps_per_call=3)
    assert lowered.count("draw_and_update") == 1


def test_what_a_program_costs():
    given, weights = jnp.ones((16, 32)), jnp.ones((32, 8))
    cost = cost_of(jax.jit(lambda x, w: x @ w).lower(given, weights).compile())
    assert cost.flops == pytest.approx(2 * 16 * 32 * 8, rel=0.1)
    assert cost.arguments == 4 * (16 * 32 + 32 * 8)
    assert cost.outputs == 4 * 16 * 8
    assert cost.bytes == sum(part or 0 for part in (cost.arguments, cost.outputs, cost.temporaries, cost.program))
    donated = cost_of(jax.jit(lambda x: x * 2, donate_argnums=0).lower(given).compile())
    assert donated.outputs == 0


RESNET = "pretrain --data digits/upright --model resnet18 --image-shape 32 32 3 --batch-size 8 --steps 3"


def begun(out, **environment):
    command = [sys.executable, "-m", "jaxtransfer", *RESNET.split(), "--out", str(out)]
    environment = {**os.environ, "XLA_FLAGS": "", **environment}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_ctrl_c_while_a_command_compiles(tmp_path):
    with begun(tmp_path / "run", JAX_ENABLE_COMPILATION_CACHE="false") as process:
        while not (tmp_path / "run" / "identity.json").exists():
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(1)
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - begin < 5
    assert "stopped by SIGINT while the program was compiled" in told
