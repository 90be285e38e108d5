"""The Fisher diagonal against the closed form of logistic regression and a loop over examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtransfer as jt

KEY = jax.random.key(2)


def batches_of(rng, sizes, classes=3, features=4):
    return [
        {
            "image": rng.normal(size=(n, features)).astype(np.float32),
            "label": rng.integers(0, classes, n).astype(np.int32),
        }
        for n in sizes
    ]


def logistic_fisher(params, rows):
    """(1/n) Σ (∂L/∂w)² with ∂L/∂W = x ⊗ (p − e_y), ∂L/∂b = p − e_y."""
    weight, bias = (np.asarray(params["model"]["head"][k], np.float64) for k in ("kernel", "bias"))
    kernel_sum, bias_sum = np.zeros_like(weight), np.zeros_like(bias)
    for x, y in rows:
        logits = np.asarray(x, np.float64) @ weight + bias
        p = np.exp(logits - logits.max())
        residual = p / p.sum() - np.eye(len(bias))[y]
        kernel_sum += np.outer(x, residual) ** 2
        bias_sum += residual**2
    return kernel_sum / len(rows), bias_sum / len(rows)


def pairs(batch):
    keep = batch.get("mask", np.ones(len(batch["label"]))) > 0
    return [(x, y) for x, y, k in zip(batch["image"], batch["label"], keep, strict=True) if k]


def check(fisher, params, rows):
    kernel, bias = logistic_fisher(params, rows)
    np.testing.assert_allclose(fisher["model"]["head"]["kernel"], kernel, rtol=2e-5, atol=1e-8)
    np.testing.assert_allclose(fisher["model"]["head"]["bias"], bias, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("sizes", [(1,), (7,), (4, 4), (5, 5, 2)])
def test_logistic_regression(rng, sizes):
    batches = batches_of(rng, sizes)
    objective = jt.classification(jt.models.mlp(3, hidden=()))
    params, state = objective.init(KEY, batches[0])
    fisher = jt.fisher_diagonal(objective, params, state, iter(batches))
    assert jax.tree.structure(fisher) == jax.tree.structure(params)
    check(fisher, params, [pair for batch in batches for pair in pairs(batch)])


def test_masked_examples_do_not_count(rng):
    batches = batches_of(rng, (4, 4))
    batches[0]["mask"] = np.array([1, 0, 1, 1], np.float32)
    batches[1]["mask"] = np.array([0, 0, 0, 1], np.float32)
    batches[1]["image"][:3] = np.nan
    batches[0]["label"][1] = -1
    objective = jt.classification(jt.models.mlp(3, hidden=()))
    params, state = objective.init(KEY, batches_of(rng, (2,))[0])
    fisher = jt.fisher_diagonal(objective, params, state, batches)
    check(fisher, params, [pair for batch in batches for pair in pairs(batch)])


def test_the_weight_of_the_objective_enters_squared(rng):
    batches = batches_of(rng, (5,))
    objective = jt.classification(jt.models.mlp(3, hidden=()))
    params, state = objective.init(KEY, batches[0])
    one = jt.fisher_diagonal(objective, params, state, batches)
    three = jt.fisher_diagonal(3 * objective, params, state, batches)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(9 * a, b, rtol=1e-5), one, three)


def test_no_example_is_an_error(rng):
    batches = batches_of(rng, (3,))
    objective = jt.classification(jt.models.mlp(3, hidden=()))
    params, state = objective.init(KEY, batches[0])
    with pytest.raises(jt.InputError, match="at least one example"):
        jt.fisher_diagonal(objective, params, state, [])
    with pytest.raises(jt.InputError, match="at least one example"):
        jt.fisher_diagonal(objective, params, state, [{**batches[0], "mask": np.zeros(3, np.float32)}])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_batch_norm_in_inference_mode_against_a_loop(rng, dtype):
    model = jt.models.small_cnn(3, width=2)
    objective = jt.classification(model)
    batches = [
        {"image": rng.normal(size=(3, 4, 4, 1)).astype(np.float32), "label": rng.integers(0, 3, 3)} for _ in range(2)
    ]
    batches[1]["mask"] = np.array([1, 1, 0], np.float32)
    params, state = objective.init(KEY, batches[0])
    if dtype is not None:
        params = jax.tree.map(lambda w: w.astype(dtype), params)
    state = jax.tree.map(lambda s: s + 0.3 * jnp.asarray(rng.random(s.shape), s.dtype), state)  # told apart from fresh

    def loss(weights, x, y):
        outputs, _ = model.apply({"params": weights, **state["model"]}, x[None], train=False, key=None)
        scores = outputs["logits"][0].astype(jnp.float32)
        return jax.scipy.special.logsumexp(scores) - scores[y]

    grad = jax.jit(jax.grad(loss))
    rows = [pair for batch in batches for pair in pairs(batch)]
    assert len(rows) == 5
    grads = [jax.tree.map(lambda g: np.asarray(g, np.float64) ** 2, grad(params["model"], x, y)) for x, y in rows]
    expected = jax.tree.map(lambda *g: sum(g) / len(rows), *grads)
    fisher = jt.fisher_diagonal(objective, params, state, batches)
    assert {leaf.dtype for leaf in jax.tree.leaves(fisher)} == {np.dtype(np.float32)}
    tolerance = 1e-4 if dtype is None else 0.1  # low-precision gradients of one example and of a batch round apart

    def close(got, want):
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())

    jax.tree.map(close, fisher["model"], expected)
    assert all(np.all(np.asarray(leaf) >= 0) for leaf in jax.tree.leaves(fisher))


def test_a_frozen_tree_of_the_objective_is_read(rng):
    batches = batches_of(rng, (5, 5))
    model = jt.models.mlp(3, hidden=())
    objective = jt.classification(model)
    params, state = objective.init(KEY, batches[0])
    anchor = jax.tree.map(lambda w: w - 0.5, params)
    fisher = jt.fisher_diagonal(objective + jt.l2_sp(anchor, strength=2.0), params, state, batches)

    def with_penalty(w):  # each example's gradient is the residual plus 2 · 0.5
        total = 0.0
        for batch in batches:
            for x, y in pairs(batch):
                p = np.exp(x @ np.asarray(params["model"]["head"]["kernel"], np.float64))
                total = total + (p / p.sum() - np.eye(3)[y] + 1.0) ** 2
        return total / 10

    np.testing.assert_allclose(fisher["model"]["head"]["bias"], with_penalty(params), rtol=1e-4)
