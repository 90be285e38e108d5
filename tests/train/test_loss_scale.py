"""float16 by dynamic loss scaling: what an overflow leaves as it is, how the scale moves, where a run stops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt

KEY = jax.random.key(2)
BATCH = {"image": np.float32([[1.0, -2.0], [0.5, 3.0]]), "label": np.int32([0, 1])}


def network(overflows_at=np.inf, dtype=jnp.float32):
    """Logits x·w, a statistic that moves, and a gradient that is infinite where it is that large."""

    @jax.custom_vjp
    def narrow(z):
        return z

    def backward(_, gradient):
        return (jnp.where(jnp.max(jnp.abs(gradient)) >= overflows_at, jnp.inf, gradient),)

    narrow.defvjp(lambda z: (z, None), backward)

    def init(key, x):
        w = jnp.float32([[0.5, -0.5], [-0.0, 0.25]])
        return {"params": {"w": w}, "batch_stats": {"seen": jnp.zeros(())}}

    def apply(variables, x, *, train, key, axis=None):
        z = narrow(x.astype(dtype) @ variables["params"]["w"].astype(dtype))
        state = {"batch_stats": {"seen": variables["batch_stats"]["seen"] + train}}
        return {"logits": z.astype(jnp.float32)}, state

    return jt.Model(init, apply, name="net")


def bits(values):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(values)]


def test_an_overflow_leaves_all_but_the_step_and_halves_the_scale():
    net = network(overflows_at=3.0)  # of a gradient near 0.3: scales of 8 and less are in range
    objective = jt.classification(net) + jt.averaged(jt.ema(net, 0.9))
    optimizer = jt.optim.loss_scaled(optax.adam(1e-3), initial=32.0, every=2)
    state, step = jt.init(objective, optimizer, KEY, BATCH), jt.train_step(objective, optimizer)
    scales, skips = [], []
    for number in range(6):
        before = bits((state.params, state.state, state.opt_state.inner_state))
        state, metrics = step(state, BATCH)
        scales.append(float(metrics["loss_scale"]))
        skips.append(float(metrics["loss_scale/skipped"]))
        assert (bits((state.params, state.state, state.opt_state.inner_state)) == before) == bool(skips[-1])
        assert int(state.step) == number + 1
        assert np.isfinite(metrics["loss"])
    assert scales == [32, 16, 8, 8, 16, 8]  # doubled after two good ones, too much again
    assert skips == [1, 1, 0, 0, 1, 0]


def test_good_updates_are_those_without_a_scale():
    net, results = network(), []
    for optimizer in (optax.adam(0.1), jt.optim.loss_scaled(optax.adam(0.1), every=2)):
        objective = jt.classification(net) + jt.averaged(jt.ema(net, 0.9))
        state, step = jt.init(objective, optimizer, KEY, BATCH), jt.train_step(objective, optimizer)
        with jax.disable_jit():  # operation by operation: a compiler may round sums of two programs in two ways
            for _ in range(3):
                state, metrics = step(state, BATCH)
        results.append((state.params, state.state, metrics["loss"]))
    assert bits(results[0]) == bits(results[1])  # powers of two change no bits


def test_small_gradients_of_float16_arrive():
    def moved(optimizer):
        net = network(dtype=jnp.float16)
        objective = 1e-8 * jt.classification(net)
        state = jt.init(objective, optimizer, KEY, BATCH)
        first = np.array(state.params["net"]["w"])
        state, _ = jt.train_step(objective, optimizer)(state, BATCH)
        return np.asarray(state.params["net"]["w"]) - first

    assert not np.any(moved(optax.sgd(1e7)))  # lost: the smallest number of float16 is 6e-8
    scaled = moved(jt.optim.loss_scaled(optax.sgd(1e7)))
    x, label = BATCH["image"], BATCH["label"]
    w = np.float64([[0.5, -0.5], [0, 0.25]])
    p = np.exp(x @ w) / np.exp(x @ w).sum(1, keepdims=True)
    np.testing.assert_allclose(scaled, -0.1 * x.T @ (p - np.eye(2)[label]) / 2, rtol=1e-2)


def test_a_run_goes_on_after_overflows_and_stops_at_the_smallest_scale(tmp_path):
    broken = {**BATCH, "image": np.full_like(BATCH["image"], np.inf)}
    objective = jt.classification(network())

    def run(batches, initial, **more):
        optimizer = jt.optim.loss_scaled(optax.adam(0.1), initial=initial)
        return jt.fit(
            objective, optimizer, batches, steps=len(batches), log_every=2, save_every=2, progress=False, **more
        )

    fitted = run([BATCH, broken, broken, BATCH], 4.0, out=tmp_path / "run")
    assert [record["train/loss_scale"] for record in fitted.history] == [4, 1]
    assert [record["train/loss_scale/skipped"] for record in fitted.history] == [0.5, 0.5]
    assert all(np.isfinite(record["train/loss"]) for record in fitted.history)
    assert float(fitted.state.opt_state.scale) == 1
    with pytest.raises(jt.errors.NonFiniteLossError, match="at step 3, with the smallest scale of the loss, too"):
        run([broken, broken, broken, BATCH], 4.0)


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    objective, batches = jt.classification(network(overflows_at=3.0)), [BATCH] * 6

    def run(out, steps):
        optimizer = jt.optim.loss_scaled(optax.adam(0.1), initial=32.0, every=2)
        return jt.fit(objective, optimizer, batches, steps=steps, out=out, progress=False).state

    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "broken", 3)
    resumed = run(tmp_path / "broken", 6)
    assert bits(whole.opt_state) == bits(resumed.opt_state)
    assert bits(whole.params) == bits(resumed.params)


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_all_devices_decide_alike(mode):
    """One row's gradient overflows, so on one device: the update is skipped on all of them."""
    count = len(jax.devices())
    if count < 2:
        pytest.skip("needs several devices")
    rows = np.tile(BATCH["image"], (count, 1))[:count]
    batch = {"image": rows, "label": np.zeros(count, np.int32)}
    bad = {**batch, "image": np.concatenate([rows[:-1], np.full_like(rows[:1], np.inf)])}
    objective = jt.classification(network())
    optimizer = jt.optim.loss_scaled(optax.adam(0.1), initial=8.0)
    mesh = jax.make_mesh((count,), ("data",)) if mode == "jit" else None
    state = jt.init(objective, optimizer, KEY, batch)
    step = jt.train_step(objective, optimizer, mode=mode, mesh=mesh)
    before = bits(state.params)
    state, metrics = step(state, bad)
    assert bits(state.params) == before
    assert float(metrics["loss_scale/skipped"]) == 1
    for shard in state.opt_state.scale.addressable_shards:
        assert float(np.asarray(shard.data).reshape(-1)[0]) == 4
    state, metrics = step(state, batch)
    assert bits(state.params) != before
    assert float(metrics["loss_scale"]) == 4


def test_steps_in_one_call_tell_the_mean_of_those_that_were_made():
    objective = jt.classification(network())
    optimizer = jt.optim.loss_scaled(optax.sgd(0.0), initial=8.0)
    state = jt.init(objective, optimizer, jax.random.key(4), BATCH)

    def sample(key, data):
        return {**data, "image": jnp.where(jax.random.bernoulli(key), data["image"], jnp.inf)}

    step = jt.train_step(objective, optimizer, sample=sample, steps_per_call=3)
    state, metrics = step(state, BATCH)
    single, _ = jt.train_step(objective, optax.sgd(0.0))(jt.init(objective, optax.sgd(0.0), KEY, BATCH), BATCH), None
    share = float(metrics["loss_scale/skipped"])
    assert 0 < share < 1
    assert float(metrics["loss"]) == pytest.approx(float(single[1]["loss"]), rel=1e-6)
    assert float(state.opt_state.scale) == 8 / 2 ** round(3 * share)


def test_it_stands_outermost():
    inside = optax.chain(optax.clip(1.0), jt.optim.loss_scaled(optax.sgd(0.1)))
    with pytest.raises(jt.InputError, match="outermost"):
        jt.init(jt.classification(network()), inside, KEY, BATCH)
    for wrong in ({"initial": 3.0}, {"initial": 0.5}, {"smallest": -1.0}, {"every": 0}, {"initial": 2.0**30}):
        with pytest.raises(jt.InputError, match="loss_scaled"):
            jt.optim.loss_scaled(optax.sgd(0.1), **wrong)
