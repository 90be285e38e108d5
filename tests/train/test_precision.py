"""Precision of a step: accumulated batches are the big one, and what stays float32 where the computation is bf16."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxtransfer as jt

KEY = jax.random.key(3)


def images(rows, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.normal(size=(rows, 8, 8, 1)).astype(np.float32),
        "label": rng.integers(0, 3, rows).astype(np.int32),
    }


def test_four_batches_of_32_accumulated_are_one_of_128_without_batch_norm():
    net, inner = jt.models.mlp(3, hidden=(16,)), optax.adam(1e-2)
    objective = jt.classification(net) + 1e-2 * jt.l2()
    whole = [images(128, seed) for seed in range(3)]
    parts = [{n: v[at : at + 32] for n, v in batch.items()} for batch in whole for at in range(0, 128, 32)]
    once = jt.fit(objective, inner, whole, steps=3, key=1, progress=False).state
    together = optax.MultiSteps(inner, 4).gradient_transformation()
    many = jt.fit(objective, together, parts, steps=12, key=1, progress=False).state
    first = jt.init(objective, inner, jax.random.key(1), whole[0]).params
    for path, leaf in jt.tree.leaves_by_path(once.params).items():
        got = jt.tree.leaves_by_path(many.params)[path]
        np.testing.assert_allclose(got, leaf, rtol=0, atol=1e-6, err_msg=path)
        assert np.abs(leaf - jt.tree.leaves_by_path(first)[path]).max() > 1e-2, path  # what stands still agrees as well


def test_weights_statistics_averages_and_losses_are_float32_and_move_where_the_computation_is_bfloat16():
    net = jt.models.small_cnn(3, dtype=jnp.bfloat16)
    average = jt.ema(net, 0.999)
    objective = jt.classification(net) + jt.averaged(average)
    optimizer, batch = optax.sgd(0.1), images(8)
    state = jt.init(objective, optimizer, KEY, batch)
    variables = {"params": state.params[net.name], **state.state[net.name]}
    computed, _ = net.apply(variables, batch["image"], train=False, key=None)
    assert computed["stage1"].dtype == jnp.bfloat16
    first = jax.tree.map(np.array, (state.params, state.state))
    step = jt.train_step(objective, optimizer)
    recursion = np.float64(first[0]["model"]["head"]["kernel"])
    for _ in range(20):
        recursion = 0.999 * recursion + 0.001 * np.float64(state.params["model"]["head"]["kernel"])
        state, metrics = step(state, batch)
    assert {value.dtype for value in metrics.values()} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
    moving = [leaf for leaf in jax.tree.leaves(state.state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in moving} == {jnp.dtype(jnp.float32)}
    now = jt.tree.leaves_by_path((state.params, state.state))
    stays = [path for path, leaf in jt.tree.leaves_by_path(first).items() if np.array_equal(leaf, now[path])]
    assert stays == []
    got = state.state["model_ema"]["params"]["head"]["kernel"]
    start = first[0]["model"]["head"]["kernel"]
    np.testing.assert_allclose(got - start, recursion - start, rtol=1e-2, atol=1e-7)
