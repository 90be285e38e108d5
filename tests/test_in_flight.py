"""The host runs ahead of the devices by two calls, whoever drives them."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.in_flight import InFlight
from jaxtransfer.train.evaluation import eval_step

MODEL = jt.models.mlp(3, hidden=(4,))
COUNT = 12


def batch(rows=8):
    return {"image": np.ones((rows, 2, 2, 1), np.float32), "label": np.zeros(rows, np.int32)}


def slow(x):
    """Returns x after some milliseconds of products."""
    square = jnp.full((256, 256), x) / 256
    return x + 0 * jax.lax.fori_loop(0, 30, lambda _, product: product @ square, square)[0, 0]


@pytest.mark.parametrize("calls", [1, 3])
def test_waits_for_the_call_before_the_last_ones(calls):
    in_flight, outputs, program = InFlight(calls), [], jax.jit(slow)
    for number in range(COUNT):
        outputs.append(program(np.float32(number)))
        in_flight.add({"out": outputs[-1]})
        assert all(out.is_ready() for out in outputs[:-calls])
    assert not outputs[-1].is_ready()


@pytest.fixture(scope="module")
def objective():
    """A classification whose loss takes long."""
    plain = jt.classification(MODEL)

    def loss(*args):
        value, state, metrics = plain.loss(*args)
        return slow(value), state, metrics

    return dataclasses.replace(plain, loss=loss)


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_a_loop_that_reads_nothing_does_not_run_away(objective, mode):
    """With eight devices on few cores, 33 calls that nobody waits for would stop one another for ever."""
    optimizer = optax.sgd(0.1)
    step = jt.train_step(objective, optimizer, mesh=jax.make_mesh((8,), ("data",)), mode=mode)
    state, losses = jt.init(objective, optimizer, jax.random.key(0), batch()), []
    for _ in range(COUNT):
        state, metrics = step(state, batch())
        losses.append(metrics["loss"])
        assert all(loss.is_ready() for loss in losses[:-2])


def test_evaluation_does_not_queue_its_batches(objective):
    state, asked = jt.init(objective, optax.sgd(0.1), jax.random.key(0), batch()), []
    run = eval_step(objective, mesh=jax.make_mesh((8,), ("data",)))

    def batches():
        for _ in range(COUNT):
            asked.append(time.perf_counter())
            yield batch()

    run(state, [batch()])  # compiles
    run(state, batches())
    assert asked[-1] - asked[0] > (time.perf_counter() - asked[0]) / 2
