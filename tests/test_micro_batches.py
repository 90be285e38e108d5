"""Micro-batches: the outputs, gradients and memory of a model that runs on a part of the batch at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtransfer as jt

X = np.random.default_rng(0).normal(size=(12, 6, 6, 1)).astype(np.float32)


def compared(model, x=X):
    """The loss of all pairs and its gradient, through the model."""

    @jax.jit
    @jax.value_and_grad
    def value(params):
        outputs, _ = model.apply({"params": params}, x, train=True, key=None)
        z = outputs["logits"]
        return jnp.mean(jt.losses.nt_xent(z, jnp.roll(z, 1, axis=0) + 0.1, temperature=0.3))

    params = model.init(jax.random.key(0), x)["params"]
    return value(params), value.lower(params).compile()


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(12, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", ["cpu", "gpu"])  # unrolled, and as a loop
def test_outputs_and_gradients_are_those_of_the_whole(size, backend, monkeypatch):
    model = jt.models.mlp(5, hidden=(16,))
    (value, gradient), _ = compared(model)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    (got, other), _ = compared(jt.micro_batched(model, size))
    np.testing.assert_allclose(got, value, rtol=1e-6)
    for one, two in zip(jax.tree.leaves(other), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-7)
    whole, parts = (m.apply(m.init(jax.random.key(0), X), X, train=False, key=None)[0]["logits"] for m in
                    (model, jt.micro_batched(model, size)))  # fmt: skip
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_memory_is_that_of_one_micro_batch(monkeypatch):
    x = np.zeros((512, 32), np.float32)
    model = jt.models.mlp(8, hidden=(512, 512))
    _, whole = compared(model, x)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    _, parts = compared(jt.micro_batched(model, 32), x)
    weights = sum(leaf.size * 4 for leaf in jax.tree.leaves(model.init(jax.random.key(0), x)))
    activations = [one.memory_analysis().temp_size_in_bytes for one in (whole, parts)]
    assert activations[1] < 0.5 * activations[0] + weights


@pytest.mark.slow
def test_running_statistics_move_once_for_each():
    model = jt.models.small_cnn(3, width=4)
    variables = model.init(jax.random.key(0), X)
    _, after = jt.micro_batched(model, 4).apply(variables, X, train=True, key=None)
    expected = {k: v for k, v in variables.items() if k != "params"}
    for part in range(3):
        given = {"params": variables["params"], **expected}
        _, expected = model.apply(given, X.reshape(4, 3, 6, 6, 1)[:, part], train=True, key=None)
    for one, two in zip(jax.tree.leaves(after), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


def test_refusals():
    model = jt.models.mlp(3)
    with pytest.raises(jt.InputError, match="at least one example; got 0"):
        jt.micro_batched(model, 0)
    with pytest.raises(jt.InputError, match="batch of 12 doesn't divide into micro-batches of 5"):
        jt.micro_batched(model, 5).apply(model.init(jax.random.key(0), X), X, train=True, key=None)
