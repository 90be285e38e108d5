"""Precision of a step: accumulated batches are the big one, and what stays float32 where the computation is bf16."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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


@pytest.mark.slow
def test_products_are_made_as_jax_is_told_where_fit_and_a_step_are_called(tmp_path):
    """`jax.default_matmul_precision` holds for programs compiled ahead, and a program of another one isn't taken."""
    traced, inner = [], jt.models.mlp(3, hidden=(4,))

    def apply(variables, inputs, **how):
        traced.append(jax.config.jax_default_matmul_precision)
        return inner.apply(variables, inputs, **how)

    net, batch = dataclasses.replace(inner, apply=apply), images(8)
    objective, optimizer = jt.classification(net), optax.sgd(0.1)

    def trained(steps):
        traced.clear()
        jt.fit(objective, optimizer, [batch] * steps, steps=steps, out=tmp_path, progress=False)
        return set(traced)

    with jax.default_matmul_precision("highest"):
        assert trained(2) == {"highest"}
    with jax.default_matmul_precision("high"), pytest.raises(jt.InputError, match="another objective"):
        trained(4)
    with jax.default_matmul_precision("highest"):
        assert trained(4) == {"highest"}
        step = jt.train_step(objective, optimizer)
        state, _ = step(jt.init(objective, optimizer, KEY, batch), batch)
    traced.clear()
    state, _ = step(state, batch)
    assert traced == [None]  # anew, as it is told otherwise
    state, _ = step(state, batch)
    with jax.default_matmul_precision("highest"):
        step(state, batch)
        assert "precision = [HIGHEST, HIGHEST]" in step.lower(state, batch).as_text()
    assert traced == [None]  # both programs are there
    assert "HIGHEST" not in step.lower(state, batch).as_text()


@pytest.mark.parametrize(
    "mask",
    [
        np.ones((4, 4)),
        [[1, 0, 0.5, 0.5], [2, 0, 0, 0], [0.25, 0.25, 0.75, 0.75], [0, 1, 1, 0]],  # each batch counts 2
        [[1, 1, 1, 1], [0, 0, 0, 1], [0.5, 0, 0, 2], [0, 0, 0, 0]],  # 4, 1, 2.5 and 0
    ],
)
def test_accumulated_batches_are_the_mean_of_their_means_whatever_each_counts(mask):
    """So four batches are the large one where their masks count alike, and only there; one without rows adds zero."""
    mask, steps = np.float32(mask), 4
    net, batch = jt.models.mlp(3, hidden=()), {**images(16), "mask": mask.reshape(-1)}
    parts = [{name: value[at : at + 4] for name, value in batch.items()} for at in range(0, 16, 4)]
    optimizer = optax.MultiSteps(optax.sgd(1.0), steps).gradient_transformation()
    state = jt.init(jt.classification(net), optimizer, KEY, parts[0])
    begun = jax.tree.map(np.float64, state.params["model"]["head"])
    step = jt.train_step(jt.classification(net), optimizer)
    for part in parts:
        state, _ = step(state, part)
    x, right = np.float64(batch["image"].reshape(16, -1)), np.eye(3)[batch["label"]]
    said = np.exp(x @ begun["kernel"] + begun["bias"])
    slope = (said / said.sum(1, keepdims=True) - right) * mask.reshape(-1, 1)
    gradients = np.einsum("krd,krc->kdc", x.reshape(4, 4, -1), slope.reshape(4, 4, -1))
    expected = (gradients / np.maximum(mask.sum(1), 1e-9)[:, None, None]).mean(0)
    moved = begun["kernel"] - np.float64(state.params["model"]["head"]["kernel"])
    np.testing.assert_allclose(moved, expected, rtol=0, atol=1e-6)
    large = gradients.sum(0) / mask.sum()
    assert (np.abs(moved - large).max() < 1e-6) == (np.ptp(mask.sum(1)) == 0)
