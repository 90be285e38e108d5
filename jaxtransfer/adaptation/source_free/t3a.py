"""T3A: at test time the templates of a linear classifier become means of the features that it is sure of."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import losses, tree
from jaxtransfer.errors import InputError
from jaxtransfer.forward import frozen
from jaxtransfer.losses._numerics import EXACT, normalize, wide
from jaxtransfer.model import Model
from jaxtransfer.objective import Batch
from jaxtransfer.parts.outputs import pick


class Templates(NamedTuple):
    """What T3A remembers of each class.

    Attributes:
      features: float [C, K, D], the features of least entropy that were taken for the class.
      entropy: float [C, K], of the classifier's predictions on them; ∞ where there is none.
    """

    features: jax.Array
    entropy: jax.Array


def t3a_templates(kernel: jax.Array, bias: jax.Array | None = None, *, keep: int) -> Templates:
    """Returns the templates before any example: the columns of the classifier, each of the class it is taken for.

    Args:
      kernel: float [D, C] of the classifier features @ kernel + bias.
      bias: float [C].
      keep: K ≥ 1, how many features a class keeps; as released one of 1, 5, 20, 50, 100, or all.

    Raises:
      InputError: where the shapes do not fit, and for a number below 1.
    """
    if kernel.ndim != 2 or (bias is not None and bias.shape != kernel.shape[1:]):
        told = "none" if bias is None else bias.shape
        raise InputError(f"t3a takes a linear classifier, kernel [D, C] and bias [C]; got {kernel.shape} and {told}")
    if keep < 1:
        raise InputError(f"t3a keeps at least 1 feature of a class; got {keep}")
    (kernel,) = wide(kernel)
    dims, classes = kernel.shape
    empty = Templates(jnp.zeros((classes, keep, dims), kernel.dtype), jnp.full((classes, keep), jnp.inf, kernel.dtype))
    logits = jnp.matmul(kernel.T, kernel, precision=EXACT)
    return _with(empty, kernel.T, logits if bias is None else logits + bias[None], jnp.ones(classes, bool))


def t3a(
    templates: Templates, features: jax.Array, logits: jax.Array, *, mask: jax.Array | None = None
) -> tuple[jax.Array, Templates]:
    """Computes z · ω_k / ‖ω_k‖, ω_k the sum of the unit features kept for class k (Iwasawa & Matsuo 2021, NeurIPS).

    "Test-time classifier adjustment module for model-agnostic domain generalization". Each batch is first put into the
    templates, by the class that the classifier predicts, of which the K of least entropy stay; as released, a batch is
    then predicted by templates that know it. Nothing is trained:

        templates = jt.adaptation.t3a_templates(head["kernel"], head["bias"], keep=20)
        for batch in stream:
            scores, templates = jt.adaptation.t3a(templates, features, logits)

    Args:
      templates: so far.
      features: float [B, D], what the classifier sees.
      logits: float [B, C], what it says.
      mask: [B]; 0 keeps an example out of the templates.

    Returns:
      The scores [B, C], whose largest is the predicted class, in at least float32; 0 for a class without a feature; and
      the new templates.

    Raises:
      InputError: where the shapes do not fit.
    """
    classes, _, dims = templates.features.shape
    if features.ndim != 2 or features.shape[1] != dims or logits.shape != (len(features), classes):
        raise InputError(
            f"t3a takes features [B, {dims}] and logits [B, {classes}], as the classifier that the templates are made "
            f"of; got {features.shape} and {logits.shape}"
        )
    keep = jnp.ones(len(features), bool) if mask is None else mask > 0
    features, logits = wide(features, logits)
    templates = _with(templates, features, logits, keep)
    there = jnp.isfinite(templates.entropy)[..., None]
    sums = jnp.sum(jnp.where(there, normalize(templates.features), 0), axis=1)
    return jnp.matmul(features, normalize(sums).T, precision=EXACT), templates


def t3a_predictions(
    model: Model,
    variables: Any,
    batches: Iterable[Batch],
    *,
    keep: int = 20,
    tap: str = "features",
    output: str = "logits",
    view: str = "image",
) -> np.ndarray:
    """Runs a model over a stream of the target in inference mode and returns T3A's scores [N, C] of its examples.

    Args:
      model: one whose head is linear in the features.
      variables: `{"params": ..., **state}`; or a training state, in which the model of this name was trained.
      batches: of the target, in the order in which they come; rows with `mask` 0 are left out.
      keep: K, how many features a class keeps.
      tap: the model's output [B, D] that its head sees.
      output: the one that holds the logits [B, C].
      view: the entry of a batch that the model sees.

    Raises:
      InputError: for a head that isn't one kernel [D, C], with or without a bias; and where there is no example.
    """
    given = model.complete(frozen(model, variables).variables.tree)
    kernel, bias = _linear_head(model, given["params"])
    templates = t3a_templates(kernel, bias, keep=keep)

    @jax.jit
    def step(given, templates, inputs, mask):
        found, _ = model.apply(given, inputs, train=False, key=None)
        return t3a(templates, *pick(f"model {model.name!r}", found, (tap, output)), mask=mask)

    out = []
    for batch in batches:
        mask = np.asarray(batch.get("mask", np.ones(len(batch[view]), np.float32)))
        scores, templates = step(given, templates, batch[view], mask)
        out.append(np.asarray(scores)[mask > 0])
    if not sum(map(len, out)):
        raise InputError("t3a: expected at least one example of the target, got none")
    return np.concatenate(out)


def _with(templates: Templates, features: jax.Array, logits: jax.Array, keep: jax.Array) -> Templates:
    """Returns the templates with further features, of which the least entropies stay; on a tie the earlier."""
    classes, size, _ = templates.features.shape
    own = (jnp.argmax(logits, axis=1)[None] == jnp.arange(classes)[:, None]) & keep[None]
    entropy = jnp.where(own, losses.entropy(logits)[None], jnp.inf)
    every = jnp.concatenate([templates.entropy, entropy.astype(templates.entropy.dtype)], axis=1)
    place = jnp.argsort(every, axis=1, stable=True)[:, :size]
    old = jnp.take_along_axis(templates.features, jnp.minimum(place, size - 1)[..., None], axis=1)
    new = features.astype(old.dtype)[jnp.maximum(place - size, 0)]
    return Templates(jnp.where((place < size)[..., None], old, new), jnp.take_along_axis(every, place, axis=1))


def _linear_head(model: Model, params: Mapping[str, Any]) -> tuple[jax.Array, jax.Array | None]:
    leaves = {path: leaf for path, leaf in tree.leaves_by_path(params).items() if tree.matches(path, model.head)}
    kernels = [leaf for leaf in leaves.values() if jnp.ndim(leaf) == 2]
    others = [leaf for leaf in leaves.values() if jnp.ndim(leaf) != 2]
    fits = len(kernels) == 1 and len(others) <= 1 and all(leaf.shape == kernels[0].shape[1:] for leaf in others)
    if not fits:
        shapes = ", ".join(f"{path} {jnp.shape(leaf)}" for path, leaf in leaves.items()) or "none"
        raise InputError(
            f"t3a needs a linear head, one kernel [D, C] and a bias [C] or none; model {model.name!r} has under "
            f"{model.head!r}: {shapes}. Give t3a_templates the classifier by itself"
        )
    return kernels[0], others[0] if others else None
