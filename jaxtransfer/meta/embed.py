"""Few-shot learners that need no inner gradient: one forward over all examples, a head per task, a loss of queries."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import losses
from jaxtransfer.errors import InputError
from jaxtransfer.forward import Forward, Frozen, FrozenModel
from jaxtransfer.model import Model
from jaxtransfer.objective import Batch, Context, Mean, Objective, Tree, view_of
from jaxtransfer.weights import weights_of

LossFn = Callable[[jax.Array, jax.Array], jax.Array]


class Embedded(NamedTuple):
    """The features of T tasks, in at least float32; those of examples whose mask is 0 are zero.

    Attributes:
      support: [T, S, ...].
      targets: one-hot labels of the support [T, S, ways], in the type of the features; zero where the mask is 0.
      query: [T, Q, ...].
    """

    support: jax.Array
    targets: jax.Array
    query: jax.Array


Head = Callable[[Embedded, Tree, Tree, Context], tuple[jax.Array, Tree]]


def few_shot(
    name: str,
    model: Model | FrozenModel,
    head: Head,
    *,
    ways: int,
    output: str,
    view: str,
    loss: LossFn = losses.cross_entropy,
    setup: Callable[..., tuple[Tree, Tree]] | None = None,
    frozen: tuple[Frozen, ...] = (),
    models: tuple[Model, ...] = (),
    pretrained: bool = False,
) -> Objective:
    """Builds the mean of `loss` over all queries of a batch of episodes, from a head that makes logits of features.

    A batch is `{"support": {view: [T, S, ...], "label": int [T, S]}, "query": {view: [T, Q, ...], "label": int
    [T, Q]}}`, each part with an optional `mask` [T, S] or [T, Q], 0 for padding. A class without support gets the
    lowest logit of its row: see `rule_out`.

    Args:
      name: of the loss among the metrics; the other one is `accuracy`.
      model: the encoder.
      head: `head(embedded, params, state, ctx) -> (logits [T, Q, ways], state)`; `per_task` makes one.
      ways: number of classes, N.
      output: name of the model's output to use.
      view: key of the inputs.
      loss: `loss(logits [B, ways], labels [B]) -> [B]`.
      setup: `setup(key, batch) -> (params, state)` of what the head has of its own.
      frozen: what the head reads through `ctx.read`.
      models: what the head runs itself.
      pretrained: the encoder runs in inference mode in training too, and nothing is differentiated in it.

    Returns:
      An objective over episodes.

    Raises:
      InputError: for `ways` below 1; at init, for labels outside [0, ways), and for an unknown output or view.
    """
    if ways < 1:
        raise InputError(f"{name}: ways must be at least 1; got {ways}")
    forward = Forward.of(model, view)
    encoder = run_only(forward)

    def value(outputs, params, state, batch, ctx):
        if pretrained:
            within = dataclasses.replace(ctx, train=False)
            embedded, _ = embed(forward, params, state, batch, within, ways=ways, output=output)
            embedded = jax.lax.stop_gradient(embedded)
        else:
            embedded, state = embed(forward, params, state, batch, ctx, ways=ways, output=output)
        logits, state = head(embedded, params, state, ctx)
        present = jnp.any(embedded.targets > 0, axis=1)
        mean, accuracy = of_queries(rule_out(logits, present[:, None]), batch, ctx, loss=loss)
        return mean.value, state, {name: mean, "accuracy": accuracy}

    def both_setups(key, batch):
        params, state = encoder.init(key, {view: view_of(batch, ("support", view))[0]})
        more_params, more_state = ({}, {}) if setup is None else setup(key, batch)
        return {**params, **more_params}, {**state, **more_state}

    def check(outputs, batch):
        for part in ("support", "query"):
            data = view_of(batch, (part,))
            check_labels(view_of(batch, (part, "label")), data.get("mask"), ways, f"{name}, {part}")

    return Objective(
        name,
        (),
        value,
        setup=both_setups,
        check=check,
        frozen=(*encoder.frozen, *frozen),
        models=(*encoder.models, *models),
    )


def run_only(forward: Forward) -> Objective:
    """Returns an objective of loss zero, whose `init` and `run` are those of one forward."""

    def no_loss(outputs, params, state, batch, ctx):
        return jnp.zeros(()), state, {}

    return Objective("", (forward,), no_loss)


def embed(
    forward: Forward, params: Tree, state: Tree, batch: Batch, ctx: Context, *, ways: int, output: str
) -> tuple[Embedded, Tree]:
    """Runs a model once over the support and the query examples of all tasks, as one ordinary batch [T·(S+Q), ...].

    In training batch norm therefore normalises by the statistics of the whole global batch of episodes, in evaluation
    by the running ones.

    Args:
      forward: the model, and the view of the inputs in each part.
      params: by model name.
      state: by model name.
      batch: episodes; see `few_shot`.
      ctx: of the step.
      ways: number of classes.
      output: name of the output, [B, ...].

    Returns:
      The features by task, and the new state.

    Raises:
      InputError: for an unknown output, and where the shapes of the parts do not fit.
    """
    support, query = (view_of(batch, (part, *forward.view)) for part in ("support", "query"))
    sizes = [_tasks_and_rows(batch, part, inputs) for part, inputs in (("support", support), ("query", query))]
    (tasks, shots), (other, queries) = sizes
    if tasks != other:
        raise InputError(f"support and query must hold the same tasks; got {tasks} and {other}")

    def together(a, b):  # joined inside of each task, so that tasks split over a mesh stay where they are
        return jnp.concatenate([a, b], axis=1).reshape(tasks * (shots + queries), *a.shape[2:])

    inputs = {forward.view[0]: jax.tree.map(together, support, query)}
    outputs, state = run_only(forward).run(params, state, inputs, ctx)
    features = named_output(outputs[forward], output, forward.model)
    features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
    features = features.reshape(tasks, shots + queries, *features.shape[1:])
    labels = jnp.asarray(view_of(batch, ("support", "label")))
    targets = (labels[..., None] == jnp.arange(ways)[None, None]).astype(features.dtype)
    support_mask, query_mask = (view_of(batch, (part,)).get("mask") for part in ("support", "query"))
    if support_mask is not None:
        targets = targets * (jnp.asarray(support_mask)[..., None] > 0)
    embedded = _without(features[:, :shots], support_mask), targets, _without(features[:, shots:], query_mask)
    return Embedded(*embedded), state


def _tasks_and_rows(batch, part, inputs):
    sizes = {jnp.shape(leaf)[:2] for leaf in jax.tree.leaves(inputs)}
    labels, mask = view_of(batch, (part, "label")), view_of(batch, (part,)).get("mask")
    sizes |= {jnp.shape(labels)} | ({jnp.shape(mask)} if mask is not None else set())
    if len(sizes) != 1 or len(size := sizes.pop()) != 2:
        raise InputError(f"{part}: expected inputs [tasks, examples, ...] and labels and mask [tasks, examples]")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise InputError(f"{part}: labels must be integers; got {labels.dtype}")
    return size


def _without(features, mask):
    if mask is None:
        return features
    return jnp.where(jnp.asarray(mask).reshape(*mask.shape, *(1,) * (features.ndim - 2)) > 0, features, 0)


def named_output(outputs: Any, output: str, model: Model | FrozenModel) -> jax.Array:
    """Returns an output, or its shape, by name; an unknown name is an error that lists those there are."""
    if output not in outputs:
        raise InputError(f"model {weights_of(model).model.name!r} has no output {output!r}; it has {sorted(outputs)}")
    return outputs[output]


def per_task(classify: Callable[..., jax.Array]) -> Head:
    """Returns the head that maps `classify(support [S, D], targets [S, N], query [Q, D]) -> [Q, N]` over the tasks."""

    def head(embedded, params, state, ctx):
        support, query = (x.reshape(*x.shape[:2], -1) for x in (embedded.support, embedded.query))
        return jax.vmap(classify)(support, embedded.targets, query), state

    return head


def class_means(features: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the mean [N, D] of the features [S, D] of each class, by one-hot labels [S, N]; zero if absent."""
    sums = jnp.matmul(targets.T, features, precision="highest")
    return sums / jnp.maximum(jnp.sum(targets, axis=0), 1)[:, None]


def rule_out(logits: jax.Array, present: jax.Array) -> jax.Array:
    """Returns the logits [..., N] with those of classes that are not `present` [..., N] below all others.

    With m the lowest one present they are m - |m| - 10⁴: after a softmax exactly zero, and finite, so that a query of
    an absent class has a huge but finite loss. No gradient passes through them.
    """
    lowest = jnp.min(jnp.where(present, logits, jnp.inf), axis=-1, keepdims=True)
    lowest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(lowest), lowest, 0))
    return jnp.where(present, logits, lowest - jnp.abs(lowest) - 1e4)


def of_queries(logits: jax.Array, batch: Batch, ctx: Context, *, loss: LossFn = losses.cross_entropy):
    """Averages the loss and the accuracy over the queries of all tasks of the global batch, without masked ones.

    Args:
      logits: [T, Q, N].
      batch: episodes; labels and mask of the queries are read.
      ctx: of the step.
      loss: `loss(logits [B, N], labels [B]) -> [B]`.

    Returns:
      `(loss, accuracy)`, each a `Mean`. A query whose mask is 0 reaches neither value nor gradient.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    labels = jnp.asarray(view_of(batch, ("query", "label"))).reshape(-1)
    mask: Any = view_of(batch, ("query",)).get("mask")
    if mask is not None:
        mask = jnp.asarray(mask).reshape(-1)
        flat = jnp.where(mask[:, None] > 0, flat, 0)
    accuracy: Mean = ctx.mean(losses.top_k(flat, labels), mask)
    return ctx.mean(loss(flat, labels), mask), accuracy


def check_labels(labels: Any, mask: Any, classes: int, what: str) -> None:
    """Raises where a label that counts is outside [0, classes)."""
    if isinstance(labels, jax.Array) and not labels.is_fully_addressable:
        return  # no process has them all
    labels = np.asarray(labels)
    counted = np.ones(labels.shape, bool) if mask is None else np.asarray(mask) > 0
    wrong = labels[counted & ((labels < 0) | (labels >= classes))]
    if wrong.size:
        raise InputError(
            f"{what}: labels must be in [0, {classes}); got {wrong[0]}. Build the objective for as many classes as the "
            f"data have"
        )
