"""Episodes and small encoders for the tests of few-shot learners, and the float64 loop over tasks they share."""

import functools
import operator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxtransfer as jt
from jaxtransfer.models.convolution import Conv
from jaxtransfer.models.layers import Layers, halve
from tests import gradients

WAYS = 3


def linear_encoder(name="model"):
    """Features x @ w [B, 4] of inputs [B, 5]; `maps` are the same as [B, 2, 2]."""

    def init(key, x):
        return {"params": {"w": jax.random.normal(key, (5, 4))}}

    def apply(variables, x, *, train, key):
        features = x @ variables["params"]["w"].astype(x.dtype)
        return {"features": features, "maps": features.reshape(-1, 2, 2)}, {}

    return jt.Model(init, apply, name)


def given_features():
    """The inputs themselves, for gradients in the features."""

    def apply(variables, x, *, train, key):
        return {"features": x, "maps": x}, {}

    return jt.Model(lambda key, x: {"params": {}}, apply)


def comparison():
    """A relation module without batch norm: tanh(pair @ a) @ b."""

    def init(key, x):
        first, second = jax.random.split(key)
        a, b = jax.random.normal(first, (x[0].size, 3)), jax.random.normal(second, (3, 1))
        return {"params": {"a": a, "b": b}}

    def apply(variables, x, *, train, key):
        a, b = variables["params"]["a"].astype(x.dtype), variables["params"]["b"].astype(x.dtype)
        return {"logits": jnp.tanh(x.reshape(x.shape[0], -1) @ a) @ b}, {}

    return jt.Model(init, apply, "relation")


class Net(nn.Module):
    """One convolution with batch norm."""

    axis: str | None = None

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        x = Conv(4)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=self.axis)(x))
        return {"maps": x, "features": x.mean((1, 2)), "logits": x.mean((1, 2))}


class PooledNet(nn.Module):
    """One layer of Conv4 and a head: convolution, batch norm, ReLU, max pooling."""

    axis: str | None = None

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        layers = Layers(train, axis=self.axis)
        x = halve(nn.relu(layers.local_norm("norm")(Conv(6, name="conv")(x))))
        return {"features": x.reshape(len(x), -1), "logits": layers.logits(x.reshape(len(x), -1), WAYS)}


def vectors(rng, tasks=2, shots=(1, 2, 3), queries=5, dtype: Any = np.float64):
    """Episodes of inputs [T, ., 5] under `input`, the support unbalanced, its rows in another order in each task."""
    support = np.stack([rng.permutation(np.repeat(np.arange(len(shots)), shots)) for _ in range(tasks)])
    query = rng.integers(0, len(shots), (tasks, queries))
    parts = {"support": support, "query": query}
    return {
        part: {"input": rng.normal(size=(*label.shape, 5)).astype(dtype), "label": label.astype(np.int32)}
        for part, label in parts.items()
    }


def images(rng, tasks=8):
    """Episodes of images, 2 shots, with a mask of the queries that differs between the tasks."""

    def part(count):
        label = np.tile(np.arange(count) % WAYS, (tasks, 1)).astype(np.int32)
        image = rng.normal(size=(tasks, count, 4, 4, 1)) + 0.5 * label[..., None, None, None]
        return {"image": image.astype(np.float32), "label": label}

    query = part(6)
    query["mask"] = (np.arange(6)[None] <= np.arange(tasks)[:, None] % 6).astype(np.float32)
    return {"support": part(2 * WAYS), "query": query}


def mean_loss(logits_of, w, batch):
    """The cross-entropy and the accuracy by loops: `logits_of(support [S, D], labels [S], query [D]) -> [N]`."""
    losses, right = [], []
    for task in range(len(batch["query"]["label"])):
        support = batch["support"]["input"][task] @ w
        for x, label in zip(batch["query"]["input"][task], batch["query"]["label"][task], strict=True):
            logits = np.asarray(logits_of(support, batch["support"]["label"][task], x @ w))
            losses.append(np.log(np.sum(np.exp(logits - logits[label]))))
            right.append(np.argmax(logits) == label)
    return np.mean(losses), np.mean(right)


def scores(objective, params, state, batch, *, train=False):
    """The metrics as numbers."""
    run = jax.jit(lambda params, batch: objective(params, state, batch, jt.Context(train=train)))
    loss, _, metrics = run(params, batch)
    return {"loss": float(loss)} | {name: float(m.total) / float(m.count) for name, m in metrics.items()}


def total(learners: dict[str, jt.Objective]) -> jt.Objective:
    """The sum of objectives by name, so that all of them share one compilation."""
    return functools.reduce(operator.add, (objective.named(name) for name, objective in learners.items()))


def assert_the_gradient_is_that_of_differences(objective, batch):
    """Compiled, in double precision; and in single precision that of double."""
    params, state = objective.init(jax.random.key(0), batch)
    gradients.assert_right(gradients.loss_of(objective, state, batch), params, h=1e-5)
