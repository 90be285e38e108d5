"""Training in phases: each goes on from the weights and the data of the one before."""

import jax
import numpy as np
import optax
import pytest

import jaxtransfer as jt


@pytest.fixture
def batches(rng):
    images = rng.integers(0, 256, (24, 2, 2, 1)).astype(np.uint8)
    return jt.data.pipeline(jt.data.Dataset.from_arrays(images, rng.integers(0, 3, 24), class_names=list("abc")), 8)


def linear():
    return jt.models.normalize(jt.models.mlp(3, hidden=(4,)), 0.5, 0.3)


def test_two_phases_are_two_runs_written_out(batches, tmp_path):
    model, rates, seen = linear(), (0.1, 0.3), []
    phases = jt.methods.lp_ft(model, optax.sgd(rates[1]), probe_optimizer=optax.sgd(rates[0]))
    done = jt.methods.train_phases(
        phases, batches, steps=5, key=3, out=tmp_path / "run", model=model,
        after=lambda phase, out, fitted: seen.append((phase.name, out.name, int(fitted.state.step))),
    )  # fmt: skip
    assert seen == [("linear-probe", "stage-1-linear-probe", 2), ("full", "run", 3)]

    (probe, full), first = phases, jt.init(phases[0].objective, optax.sgd(0.1), 3, batches.batch(0))
    params = jax.tree.map(np.array, first.params)
    for step, phase in enumerate([probe, probe, full, full, full]):
        value = phase.objective

        def loss(params, batch, value=value):
            return value(params, {"model": {}}, batch, jt.Context(step=0, key=jax.random.key(0)))[0]

        grads = jax.jit(jax.grad(loss))(params, batches.batch(step))
        moves = ("head",) if phase is probe else params["model"]
        for layer in moves:
            rate = rates[phase is full]
            new = jax.tree.map(lambda w, g, rate=rate: w - rate * g, params["model"][layer], grads["model"][layer])
            params["model"][layer] = new
    for path, leaf in jt.tree.leaves_by_path(params).items():
        found = jt.tree.leaves_by_path(done.state.params)[path]
        np.testing.assert_allclose(found, leaf, rtol=1e-5, atol=1e-6, err_msg=path)

    run = jt.load_run(tmp_path / "run")
    assert (run.step, run.finished, run.config["steps"]) == (3, True, 5)
    again = jt.methods.train_phases(phases, batches, steps=5, key=3, out=tmp_path / "run", model=model)
    assert again.timing == {}
    assert jax.tree.all(jax.tree.map(np.array_equal, again.state.params, done.state.params))


def test_a_fresh_phase_is_taught_by_the_one_before(batches):
    model, told = linear(), []

    def taught(params, state):
        told.append(params)
        return jt.distillation(model, jt.frozen(model.named("teacher"), {"params": params["model"]}))

    first = jt.methods.Phase("one", jt.classification(model), optax.sgd(0.1))
    second = jt.methods.Phase("two", taught, optax.sgd(0.0), fresh=True)
    done = jt.methods.train_phases([first, second], batches, steps=2)
    new = jt.init(jt.classification(model), optax.sgd(0.1), 1, batches.batch(0))  # the next seed
    np.testing.assert_array_equal(done.state.params["model"]["head"]["kernel"], new.params["model"]["head"]["kernel"])
    assert len(told) == 1


def test_what_is_refused(batches):
    phases = jt.methods.lp_ft(linear(), optax.sgd(0.1))
    with pytest.raises(jt.InputError, match="2 phases and needs as many steps; got steps=1"):
        jt.methods.train_phases(phases, batches, steps=1)
    with pytest.raises(jt.InputError, match=r"batches with iterate\(start\) and fingerprint\(\), got a list"):
        jt.methods.train_phases(phases, [batches.batch(0)], steps=2)
    with pytest.raises(jt.InputError, match="one phase or more"):
        jt.methods.train_phases([], batches, steps=1)
    assert jt.methods.Stage is jt.methods.Phase


@pytest.mark.parametrize(("steps", "shares", "parts"), [(5, [1, 1], [2, 3]), (3, [9, 1, 1], [1, 1, 1]), (7, [1], [7])])
def test_steps_are_shared_out(steps, shares, parts):
    assert jt.methods.split_steps(steps, shares) == parts
