"""Rules that look at moving averages of the tasks' gradients: DB-MTL with its momentum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_balance import KEY, SHARED, a_batch, by_hand, tasks_of, two_headed, updated

import jaxtransfer as jt

RATE = 0.1


def db_mtl_by_hand(params, batches, beta, sigma):
    """The paper's loop: averages of the gradients of log L, brought to the length of the longest, added up."""
    params = {name: np.asarray(leaf, float) for name, leaf in params["net"].items()}
    buffer = np.zeros((3, *params["body"].shape))
    for update, batch in enumerate(batches, 1):
        values, shared, heads = by_hand({"net": params}, batch)
        logs = np.stack([gradient / (value + 1e-8) for gradient, value in zip(shared, values, strict=True)])
        decay = beta / update**sigma
        buffer = decay * buffer + (1 - decay) * logs
        lengths = [np.linalg.norm(own) for own in buffer]
        body = sum(max(lengths) / length * own for length, own in zip(lengths, buffer, strict=True))
        step = {"body": body, **heads}
        params = {name: leaf - RATE * step[name] for name, leaf in params.items()}
    return params, buffer


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
def test_db_mtl_follows_the_gradients_of_the_logarithms_on_any_devices(sigma, mesh_of):
    rule = functools.partial(jt.multitask.db_mtl, beta=0.9, beta_sigma=sigma)
    objective, batches = jt.balance(tasks_of(two_headed()), rule, shared=SHARED), [a_batch(s) for s in range(4)]
    for place in ({}, {"mesh": mesh_of(4)}, {"mesh": mesh_of(4), "mode": "pmap"}):
        before, after, state, _ = updated(objective, batches, optax.sgd(RATE), **place)
        params, buffer = db_mtl_by_hand(before, batches, 0.9, sigma)
        for name, leaf in params.items():
            np.testing.assert_allclose(after["net"][name], leaf, rtol=1e-4, atol=1e-5)
        memory = state.state["balance_gradients"]
        assert int(memory["updates"]) == 4
        assert jt.tree.leaves_by_path(memory).keys() == {"gradients/net/body", "updates"}
        np.testing.assert_allclose(memory["gradients"]["net"]["body"], buffer, rtol=1e-4, atol=1e-5)


def test_without_momentum_nothing_is_kept():
    plain = jt.balance(tasks_of(two_headed()), jt.multitask.db_mtl, shared=SHARED)
    none = jt.balance(tasks_of(two_headed()), functools.partial(jt.multitask.db_mtl, beta=0.0), shared=SHARED)
    for objective in (plain, none):
        assert set(objective.init(KEY, a_batch())[1]) == {"net"}
    for beta in (-0.1, 1.0, float("nan")):
        with pytest.raises(jt.InputError, match="beta must be in"):
            jt.balance(tasks_of(two_headed()), functools.partial(jt.multitask.db_mtl, beta=beta)).init(KEY, a_batch())


@jt.multitask.averages(lambda rate=0.5: lambda values, update: (jnp.ones_like(values), jnp.asarray(rate)))
def of_averages(gram, values, key, state, *, rate=0.5):
    """A rule of one's own, with a memory besides."""
    return jnp.diagonal(gram) + state["before"], {"before": state["before"] + 1}


of_averages = jt.multitask.remembers(lambda count: {"before": jnp.zeros(count)})(of_averages)


@pytest.mark.slow
def test_a_rule_of_ones_own_is_resumed_and_moves_once_per_update(tmp_path):
    objective = jt.balance(tasks_of(two_headed()), functools.partial(of_averages, rate=0.8), shared=SHARED, name="own")
    batches, slow = [a_batch(s) for s in range(4)], optax.MultiSteps(optax.sgd(0.01), 2).gradient_transformation()

    def run(out, steps):
        return jt.fit(objective, slow, batches, steps=steps, out=out, save_every=1, progress=False).state

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "cut", 2)
    for got, want in zip(jax.tree.leaves(run(tmp_path / "cut", 4)[2:]), jax.tree.leaves(whole[2:]), strict=True):
        np.testing.assert_array_equal(got, want)
    assert int(whole.state["own_gradients"]["updates"]) == 2
    assert whole.state["own"]["before"].tolist() == [2, 2, 2]
    first, state = objective.init(jax.random.key(0), batches[0])
    found = jax.jit(lambda state: objective(first, state, batches[1], jt.Context(step=jnp.int32(0), key=KEY))[1])(state)
    _, shared, _ = by_hand(jax.tree.map(np.asarray, first), batches[1])
    np.testing.assert_allclose(found["own_gradients"]["gradients"]["net"]["body"], 0.2 * shared, rtol=1e-4, atol=1e-6)
