"""The host runs ahead of the devices by two calls, whoever drives them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.devices.in_flight import InFlight

MODEL = jt.models.mlp(3, hidden=(4,))
COUNT = 8


def batch(rows=8):
    return {"image": np.ones((rows, 2, 2, 1), np.float32), "label": np.zeros(rows, np.int32)}


def slow(x):
    """Returns x after some milliseconds of products."""
    square = jnp.full((256, 256), x) / 256
    return x + 0 * jax.lax.fori_loop(0, 30, lambda _, product: product @ square, square)[0, 0]


@pytest.mark.parametrize("calls", [1, 3])
def test_waits_for_the_call_before_the_last_ones(calls):
    in_flight, outputs, done, program = InFlight(calls), [], [], jax.jit(slow)
    for number in range(COUNT):
        outputs.append(program(np.float32(number)))
        in_flight.add({"out": outputs[-1]})
        done.append(outputs[-1].is_ready())
        in_flight.wait()
        assert all(out.is_ready() for out in outputs[: len(outputs) + 1 - calls])
    assert not all(done)  # it does run ahead


@pytest.fixture(scope="module")
def objective():
    """A classification whose loss takes long."""
    plain = jt.classification(MODEL)

    def loss(*args):
        value, state, metrics = plain.loss(*args)
        return slow(value), state, metrics

    return dataclasses.replace(plain, loss=loss)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["jit", pytest.param("pmap", marks=pytest.mark.slow)])
def test_a_loop_that_reads_nothing_does_not_run_away(objective, mode):
    """With eight devices on few cores, 33 calls that nobody waits for would stop one another for ever."""
    optimizer = optax.sgd(0.1)
    step = jt.train_step(objective, optimizer, mesh=jax.make_mesh((8,), ("data",)), mode=mode)
    state, losses = jt.init(objective, optimizer, jax.random.key(0), batch()), []
    for _ in range(COUNT):
        state, metrics = step(state, batch())
        losses.append(metrics["loss"])
        assert all(loss.is_ready() for loss in losses[:-2])


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_metrics_are_the_callers(devices):
    objective, optimizer = jt.classification(MODEL), optax.sgd(0.1)
    mesh = None if devices == 1 else jax.make_mesh((devices,), ("data",))
    step = jt.train_step(objective, optimizer, mesh=mesh)
    state = jt.init(objective, optimizer, jax.random.key(0), batch())
    for _ in range(5):
        state, metrics = step(state, batch())
        for metric in metrics.values():
            metric.delete()  # as donating it does
    assert int(state.step) == 5


@pytest.mark.slow
def test_a_trace_leaves_nothing_behind():
    objective, optimizer = jt.classification(MODEL), optax.sgd(0.1)
    step = jt.train_step(objective, optimizer)
    state = jt.init(objective, optimizer, jax.random.key(0), batch())
    with jax.checking_leaks():
        shapes = jax.eval_shape(step, state, batch())
    assert shapes[1]["loss"].shape == ()
    assert int(step(state, batch())[0].step) == 1


@pytest.fixture
def calls(monkeypatch):
    """What each call of whoever runs programs in a loop gave."""
    seen: list[Any] = []

    class Watched(InFlight):
        def wait(self):
            super().wait()
            assert all(leaf.is_ready() for leaf in jax.tree.leaves(seen[:-1]))

        def add(self, outputs):
            super().add(outputs)
            seen.append(outputs)

    for module in ("train.loop", "train.evaluation", "train.episodes", "objectives.anchored.fisher"):
        monkeypatch.setattr(f"jaxtransfer.{module}.InFlight", Watched)
    return seen


@pytest.mark.slow
def test_evaluation_does_not_queue_its_batches(objective, calls):
    state = jt.init(objective, optax.sgd(0.1), jax.random.key(0), batch())
    jt.evaluate(objective, state, [batch()] * COUNT, mesh=jax.make_mesh((8,), ("data",)))
    assert len(calls) == COUNT


@pytest.mark.slow
def test_neither_does_the_loop(objective, calls):
    jt.fit(objective, optax.sgd(0.1), [batch()] * COUNT, steps=COUNT, log_every=COUNT)
    assert len(calls) == COUNT


def test_neither_do_the_others(calls):
    objective = jt.classification(MODEL)
    state = jt.init(objective, optax.sgd(0.1), jax.random.key(0), batch())
    jt.objectives.fisher_diagonal(objective, state.params, state.state, [batch()] * COUNT)
    assert len(calls) == COUNT
    calls.clear()
    episodes = {"support": batch(), "query": batch()}
    episodes = jax.tree.map(lambda x: np.stack([x] * 4), episodes)
    jt.evaluate_episodes(jt.maml(objective, inner=optax.sgd(0.1), steps=1), state, [episodes] * 3)
    assert len(calls) == 4 * 3  # on a CPU one by one
