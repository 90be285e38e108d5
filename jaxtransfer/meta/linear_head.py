"""The plainest baseline of few-shot learning: a linear classifier trained on the support features."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtransfer import losses
from jaxtransfer.errors import InputError
from jaxtransfer.forward import FrozenModel
from jaxtransfer.meta.embed import few_shot, per_task, rule_out
from jaxtransfer.meta.inner_loop import adapt
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective


def fit_head(
    logits_fn: Callable[[Any, jax.Array], jax.Array],
    head: Any,
    support: jax.Array,
    targets: jax.Array,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
) -> Any:
    """Trains a head on the support of one task, all of it in each update, by the cross-entropy of what counts.

    Args:
      logits_fn: `logits_fn(head, features [B, D]) -> [B, N]`.
      head: the first parameters.
      support: features [S, D].
      targets: one-hot labels [S, N]; rows of zeros do not count.
      optimizer: any optax optimiser.
      steps: number of updates.

    Returns:
      The parameters after training. Classes that are absent from the support take no part in the softmax.
    """

    def loss_fn(head, batch):
        features, targets = batch
        logits = rule_out(logits_fn(head, features), jnp.any(targets > 0, axis=0)[None])
        values = losses.cross_entropy(logits, targets)  # zero for a row of zeros
        return jnp.sum(values) / jnp.maximum(jnp.sum(targets), 1)

    return adapt(loss_fn, head, (support, targets), optimizer=optimizer, steps=steps)


def linear_head(
    model: Model | FrozenModel,
    *,
    ways: int,
    optimizer: optax.GradientTransformation,
    steps: int,
    output: str = "features",
    view: str = "image",
) -> Objective:
    """Builds the cross-entropy of queries under a linear classifier that `steps` updates made of the support.

    Baseline of Chen et al. 2019 (arXiv:1904.04232): the encoder is pretrained by ordinary `jt.classification` and
    stays as it is; each task gets a fresh head, logits f(x)W + b with W = 0 and b = 0 at first. Each update sees the
    whole support, where the paper draws minibatches of four; weight decay is the optimiser's (`optax.adamw`). It is to
    be evaluated (`jt.evaluate_episodes`). The features are cut off from differentiation and come from inference mode
    throughout: training by it leaves encoder and statistics as they are. Batches and absent classes are as for
    `prototypical`. Metrics: `linear_head`, `accuracy`.

    Args:
      model: what gives `output` [B, ...], flattened to [B, D].
      ways: number of classes, N.
      optimizer: any optax optimiser; its state starts afresh in each task.
      steps: number of updates, at least 0.
      output: name of the model's output.
      view: key of the inputs in the support and the query.

    Returns:
      An objective over episodes, whose gradient is zero.

    Raises:
      InputError: for `ways` below 1 or negative `steps`; at init, for a label outside [0, ways), an unknown output,
        and a batch that is no episode.
    """
    check_steps(steps)

    def logits_fn(head, features):
        return jnp.matmul(features, head["kernel"], precision="highest") + head["bias"][None]

    def classify(support, targets, query):
        zeros = {"kernel": jnp.zeros((support.shape[-1], ways), support.dtype), "bias": jnp.zeros(ways, support.dtype)}
        return logits_fn(fit_head(logits_fn, zeros, support, targets, optimizer=optimizer, steps=steps), query)

    return few_shot("linear_head", model, per_task(classify), ways=ways, output=output, view=view, pretrained=True)


def check_steps(steps: int) -> None:
    """Raises where the number of updates is negative, before anything is traced."""
    if steps < 0:
        raise InputError(f"steps must be at least 0; got {steps}")
