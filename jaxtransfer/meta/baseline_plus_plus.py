"""Baseline++: classifiers that look at the angle alone, for base classes and for the classes of a task."""

import math

import jax
import jax.numpy as jnp
import optax

from jaxtransfer import losses
from jaxtransfer.errors import InputError
from jaxtransfer.forward import Forward, FrozenModel
from jaxtransfer.meta.embed import check_labels, class_means, few_shot, named_output, per_task
from jaxtransfer.meta.linear_head import check_steps, fit_head
from jaxtransfer.meta.prototypical import cosine_distance, unit
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective, named_key, view_of
from jaxtransfer.parts.masking import mask_of
from jaxtransfer.parts.outputs import shapes_of


def cosine_classification(
    model: Model | FrozenModel,
    *,
    classes: int,
    scale: float = 10.0,
    output: str = "features",
    view: str = "image",
    name: str = "cosine_head",
) -> Objective:
    """Builds (1/n) Σᵢ cross-entropy(yᵢ, s·cos(f(xᵢ), w_c)): base training of Baseline++ on ordinary labelled batches.

    Chen et al. 2019 (arXiv:1904.04232). The class weights w [classes, D] are learned, in `params[name]["weight"]`;
    the model's own head is not used. Reads the inputs, `label` integers [B] and, where there is one, `mask` [B].
    Metrics: `cosine_classification`, `accuracy`.

    Args:
      model: what gives `output` [B, ...], flattened to [B, D].
      classes: number of base classes.
      scale: s, above 0.
      output: name of the model's output.
      view: key of the inputs.
      name: key of the class weights in `params`.

    Returns:
      An objective over the model's parameters and the class weights.

    Raises:
      InputError: for `classes` below 1 or s not above 0; at init, for a label out of range and an unknown output.
    """
    if classes < 1:
        raise InputError(f"classes must be at least 1; got {classes}")
    _check_scale(scale)
    forward = Forward.of(model, view)

    def setup(key, batch):
        shape = named_output(shapes_of(forward, batch), output, forward.model)
        size = math.prod(shape.shape[1:])
        dtype = jnp.promote_types(shape.dtype, jnp.float32)
        return {name: {"weight": jax.random.normal(named_key(key, name), (classes, size), dtype)}}, {}

    def loss(outputs, params, state, batch, ctx):
        features, labels = named_output(outputs[forward], output, forward.model), view_of(batch, ("label",))
        features, mask = features.reshape(features.shape[0], -1), mask_of(batch)
        if mask is not None:  # what a row that does not count holds must not reach the gradient either
            features = jnp.where(mask[:, None] > 0, features, 0)
        logits = scale * (1 - cosine_distance(features, params[name]["weight"]))
        value = ctx.mean(losses.cross_entropy(logits, labels), mask)
        accuracy = ctx.mean(losses.top_k(logits, labels), mask)
        return value.value, state, {"cosine_classification": value, "accuracy": accuracy}

    def check(outputs, batch):
        check_labels(view_of(batch, ("label",)), batch.get("mask"), classes, "cosine_classification")

    return Objective("cosine_classification", (forward,), loss, setup=setup, check=check)


def baseline_plus_plus(
    model: Model | FrozenModel,
    *,
    ways: int,
    optimizer: optax.GradientTransformation,
    steps: int,
    scale: float = 10.0,
    output: str = "features",
    view: str = "image",
) -> Objective:
    """Builds the cross-entropy of queries with logits s·cos(f(x), w_c), w made of the support by `steps` updates.

    Baseline++ of Chen et al. 2019 (arXiv:1904.04232), over an encoder pretrained by `cosine_classification`. w starts
    at the class means of the normalised support features, so that nothing is drawn and `steps=0` is the nearest mean
    by angle (the paper starts at random). Each update sees the whole support. It is to be evaluated
    (`jt.evaluate_episodes`). The features are cut off from differentiation and come from inference mode throughout:
    training by it leaves encoder and statistics as they are. Batches and absent classes are as for `prototypical`.
    Metrics: `baseline_plus_plus`, `accuracy`.

    Args:
      model: what gives `output` [B, ...], flattened to [B, D].
      ways: number of classes, N.
      optimizer: any optax optimiser; its state starts afresh in each task.
      steps: number of updates, at least 0.
      scale: s, above 0.
      output: name of the model's output.
      view: key of the inputs in the support and the query.

    Returns:
      An objective over episodes, whose gradient is zero.

    Raises:
      InputError: for `ways` below 1, negative `steps` or s not above 0; at init, for a label outside [0, ways), an
        unknown output, and a batch that is no episode.
    """
    check_steps(steps)
    _check_scale(scale)

    def logits_fn(weight, features):
        return scale * (1 - cosine_distance(features, weight))

    def classify(support, targets, query):
        first = class_means(unit(support), targets)
        return logits_fn(fit_head(logits_fn, first, support, targets, optimizer=optimizer, steps=steps), query)

    head = per_task(classify)
    return few_shot("baseline_plus_plus", model, head, ways=ways, output=output, view=view, pretrained=True)


def _check_scale(scale: float) -> None:
    if not scale > 0:
        raise InputError(f"scale of the cosines must be above 0; got {scale}")
