"""What holds for each few-shot learner: gradients, degenerate rows, absent classes, padding.

A new learner is one row of LEARNERS. They run as one sum, so that there are few compilations.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from tests import gradients
from tests.meta import few_shot_tasks as tasks
from tests.meta.few_shot_tasks import WAYS

KEY = jax.random.key(0)
SGD: dict[str, Any] = {"optimizer": optax.sgd(0.1, momentum=0.9), "steps": 3}
HEADS = ("linear_head", "baseline_plus_plus")  # of which no gradient flows into the encoder


def relation(model, ways, output="maps", **kwargs):
    return jt.meta.relation(model, tasks.comparison(), ways=ways, output=output, **kwargs)


def simpleshot(model, ways, **kwargs):
    return jt.meta.simpleshot(model, ways=ways, center=np.full(4, 0.1, np.float32), **kwargs)


LEARNERS: dict[str, Callable[..., jt.Objective]] = {
    "prototypical": lambda model, ways, **kw: jt.meta.prototypical(model, ways=ways, **kw),
    "matching": lambda model, ways, **kw: jt.meta.matching(model, ways=ways, **kw),
    "relation": relation,
    "r2d2": lambda model, ways, **kw: jt.meta.r2d2(model, ways=ways, **kw),
    "simpleshot": simpleshot,
    "linear_head": lambda model, ways, **kw: jt.meta.linear_head(model, ways=ways, **SGD | kw),
    "baseline_plus_plus": lambda model, ways, **kw: jt.meta.baseline_plus_plus(model, ways=ways, **SGD | kw),
}


def everything(model, **kwargs):
    return tasks.total({name: learner(model, WAYS, **kwargs) for name, learner in LEARNERS.items()})


@pytest.mark.optimised
@pytest.mark.slow
@pytest.mark.parametrize("shots", [(1, 1, 1), (1, 2, 3)])  # fewer and more examples than features
def test_gradients_equal_finite_differences(shots, rng, x64):
    model = tasks.linear_encoder()
    learners = {name: learner(model, WAYS, view="input") for name, learner in LEARNERS.items() if name not in HEADS}
    tasks.assert_the_gradient_is_that_of_differences(tasks.total(learners), tasks.vectors(rng, shots=shots))


@pytest.mark.optimised
@pytest.mark.parametrize("steps", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_meta_gradients_through_max_pooling_are_right(steps, rng):
    """Second derivatives, tasks and weights batched: compiled against differences, below the pooling and in all."""
    model = jt.models.linen(tasks.PooledNet())
    objective = jt.maml(jt.classification(model), inner=optax.sgd(0.4), steps=steps)
    batch = tasks.images(rng, tasks=2)
    params, state = objective.init(KEY, batch)
    gradients.assert_right(gradients.loss_of(objective, state, batch), params, "conv/kernel", "norm")


def degenerate(dtype=np.float32):
    """Tasks of inputs [T, S, 4], each degenerate in its own way, and the mask of their queries."""
    rng = np.random.default_rng(3)
    support, query = rng.normal(size=(7, 6, 4)), rng.normal(size=(7, 3, 4))
    labels, mask = np.tile([0, 0, 1, 1, 2, 2], (7, 1)), np.ones((7, 3))
    support[0], query[0] = 0, 0
    support[1], query[1] = support[1, :1], support[1, 0]
    support[2], query[2] = 1e4 * support[2], 1e4 * query[2]
    labels[3] = [0, 0, 0, 1, 1, 1]  # no support for class 2, of which there is a query
    query[4], mask[4] = np.nan, 0
    support[5] = 1e4 * support[5, :1]
    support[6, :2] = [[1, 0, 0, 0], [-1, 0, 0, 0]]  # a mean of zero
    batch = {
        "support": {"image": support.astype(dtype), "label": labels.astype(np.int32)},
        "query": {"image": query.astype(dtype), "label": np.tile(np.arange(3, dtype=np.int32), (7, 1))},
    }
    batch["query"]["mask"] = mask.astype(dtype)
    return batch


def test_degenerate_rows_are_finite():
    """Metrics and gradients, in parameters and features, are finite; nothing counts where all is masked."""
    batch, model = degenerate(), tasks.given_features()
    adam = {"optimizer": optax.adam(0.1), "steps": 3}
    by_adam = {f"adam {name}": LEARNERS[name](model, WAYS, **adam) for name in HEADS}
    objective = everything(model) + tasks.total(by_adam)
    params, state = objective.init(jax.random.key(0), batch)

    @jax.jit
    def run(params, inputs, mask):
        def loss(params, inputs):
            parts = {part: {**batch[part], "image": inputs[part]} for part in inputs}
            parts["query"]["mask"] = mask
            value, _, metrics = objective(params, state, parts, jt.Context())
            return value, {name: metric.value for name, metric in metrics.items()}

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, inputs)

    inputs = {part: batch[part]["image"] for part in batch}
    (_, metrics), gradients = run(params, inputs, batch["query"]["mask"])
    assert not {name: value for name, value in metrics.items() if not np.isfinite(value)}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    (loss, _), gradients = run(params, inputs, np.zeros_like(batch["query"]["mask"]))
    assert float(loss) == 0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradients))


@pytest.mark.slow
def test_absent_classes_are_ruled_out(x64):
    """With a third class that has no support the losses are those of two ways, and so is the gradient."""
    batch, model = tasks.vectors(np.random.default_rng(0), shots=(2, 3)), tasks.linear_encoder()
    results = []
    for ways in (3, 2):
        learners = {name: learner(model, ways, view="input") for name, learner in LEARNERS.items()}
        learners["relation"] = ways / 2 * learners["relation"]  # its error is a mean over the classes
        objective = tasks.total(learners)
        params, state = objective.init(jax.random.key(0), batch)

        def loss(params, objective=objective, state=state):
            value, _, metrics = objective(params, state, batch, jt.Context(train=False))
            return value, {name: m.value for name, m in metrics.items() if name != "relation"}

        results.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(params))
    for got, expected in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.slow
def test_masked_support_does_not_count(x64):
    """Rows of the support whose mask is 0 change nothing, whatever they hold."""
    objective = everything(tasks.linear_encoder(), view="input")
    batch = tasks.vectors(np.random.default_rng(0))
    junk = {"input": np.full((2, 2, 5), np.nan), "label": np.full((2, 2), 1, np.int32)}
    mask = np.concatenate([np.ones((2, 6)), np.zeros((2, 2))], axis=1)
    padded = {key: np.concatenate([batch["support"][key], junk[key]], axis=1) for key in junk}
    params, state = objective.init(jax.random.key(0), batch)
    expected = tasks.scores(objective, params, state, batch)
    got = tasks.scores(objective, params, state, {**batch, "support": {**padded, "mask": mask}})
    assert got == pytest.approx(expected, rel=1e-10)
