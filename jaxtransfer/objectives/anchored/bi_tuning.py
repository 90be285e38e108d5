"""Bi-Tuning: classifier and projection are contrasted with a slow network's keys of all classes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer import losses
from jaxtransfer.errors import InputError, unknown
from jaxtransfer.forward import Forward, ema
from jaxtransfer.losses._numerics import check_strength, check_temperature
from jaxtransfer.model import Model
from jaxtransfer.objective import Context, Mean, Objective, view_of
from jaxtransfer.objectives.anchored.class_queue import empty_queues, enqueued
from jaxtransfer.objectives.supervised.classification import check_labels
from jaxtransfer.parts.masking import mask_of
from jaxtransfer.parts.outputs import pick, shapes_of
from jaxtransfer.parts.rows import kept
from jaxtransfer.tree import leaves_by_path


def bi_tuning(
    model: Model,
    *,
    queue: int = 40,
    temperature: float = 0.07,
    decay: float | Callable[[Any], Any] = 0.999,
    strength: float = 1.0,
    head: str = "encoder/head",
    features: str = "features",
    tap: str = "projection",
    views: Sequence[str] = ("image", "image2"),
    label: str = "label",
) -> Objective:
    """Builds strength · (1/n) Σᵢ [CCE(w_{yᵢ}, hᵢ) + CCL(zᵢ, z̄ᵢ)], contrasts of classes over queues of earlier keys.

    (Zhong et al. 2020, arXiv:2011.06182; the released numbers are the defaults.) Both are
    `jt.losses.categorical_contrast`. CCL draws an example's projection z to the slow network's z̄ and to earlier keys of
    its class, and from those of other classes; CCE compares the classifier's weights w of the class with the feature h
    and the slow network's earlier features. h has a 1 appended and w its bias; w has no gradient here, as released: the
    classifier learns from the cross-entropy, which is a term of its own. The released projection is one layer:

        both = jt.models.with_heads(net, projection=jt.models.head(128, batch_norm=False))
        objective = jt.classification(both) + jt.bi_tuning(both)

    The slow network and the queues live in the state, as `<model>_ema` and `<model>_class_queue`: of each class the
    last keys of all devices. Both losses see the queues before the batch enters (the released CCE after it); they are
    empty at first (released: random), so the losses rise from 0 while they fill. An example's own earlier keys are of
    its class, so they are no negatives, and a queue longer than a class has examples does no harm.

    Args:
      model: what trains: an encoder with its classifier and a projection.
      queue: K, keys that are kept of each class; beyond a class's examples it holds the same ones again.
      temperature: τ.
      decay: of the slow network.
      strength: the weight of both.
      head: where the classifier's `kernel` [D, C] and `bias` [C] are in the model's parameters.
      features: the output [B, D] that the classifier reads.
      tap: the output [B, P] that is the projection.
      views: the entries of the batch: the query's, and the slow network's, another augmentation of the same image.
      label: the entry that holds the labels, integers [B].

    Returns:
      An objective with the metrics `bi_tuning`, `cce` and `ccl`, the latter two before the strength.

    Raises:
      InputError: for a temperature, decay, strength or queue out of range, other than two views; at init, for a head
        that isn't there or doesn't fit the features, outputs that are no [batch, dimensions], and labels that are no
        integers in range.
    """
    check_temperature(temperature)
    check_strength(strength)
    if queue < 1:
        raise InputError(f"queue must be at least 1, the keys of each class; got {queue}")
    if len(views) != 2:
        raise InputError(f"expected the names of two views; got {list(views)}")
    fast, slow, name = Forward.of(model, views[0]), Forward.of(ema(model, decay), views[1]), f"{model.name}_class_queue"

    def both_of(outputs):
        return {kind: pick(f"model {model.name!r}", outputs, one) for kind, one in (("h", features), ("z", tap))}

    def setup(key, batch):
        shapes = both_of(shapes_of(fast, batch))
        for kind, one in zip(shapes, (features, tap), strict=True):
            if shapes[kind].ndim != 2:
                raise InputError(
                    f"bi_tuning takes outputs [batch, dimensions]; {one!r} of model {model.name!r} has shape "
                    f"{shapes[kind].shape}"
                )
        example = jax.eval_shape(lambda x: fast.weights.example(jax.random.key(0), x), view_of(batch, fast.view))
        weights = jax.eval_shape(lambda params: _classifier(params, head, model.name), example["params"])
        dim = shapes["h"].shape[1] + 1
        if weights.shape[1] != dim:
            raise InputError(
                f"the head at {head!r} of model {model.name!r} reads {weights.shape[1] - 1} dimensions, and output "
                f"{features!r} has {dim - 1}: name the output that the head reads"
            )
        labels = view_of(batch, (label,))
        if jnp.ndim(labels) != 1 or not jnp.issubdtype(labels.dtype, jnp.integer):
            raise InputError(
                f"bi_tuning keeps keys by class, so {label!r} must be integers [batch]; got {labels.dtype} "
                f"{labels.shape}"
            )
        check_labels(model.name, len(weights), batch, label)
        return {}, {name: empty_queues(len(weights), queue, {"h": dim, "z": shapes["z"].shape[1]})}

    def term(outputs, params, state, batch, ctx: Context):
        mask, labels, keys = mask_of(batch), view_of(batch, (label,)), state[name]
        query, key = ({kind: kept(x, mask) for kind, x in both_of(outputs[run]).items()} for run in (fast, slow))
        query["h"], key["h"] = _with_one(query["h"]), _with_one(key["h"])
        weights = _classifier(fast.weights.read(params, state, ctx.read)["params"], head, model.name)
        own = jnp.take(jax.lax.stop_gradient(weights), labels, axis=0, mode="fill", fill_value=jnp.nan)
        options: dict[str, Any] = {"temperature": temperature, "mask": mask}
        cce = losses.categorical_contrast(own, query["h"], labels, keys["h"], keys["label"], **options)
        projected = jax.lax.stop_gradient(key["z"])
        ccl = losses.categorical_contrast(query["z"], projected, labels, keys["z"], keys["label"], **options)
        value = ctx.mean(strength * (cce + ccl), mask)
        if ctx.train:
            state = {**state, name: enqueued(keys, key, labels, batch, ctx)}
        metrics = {"bi_tuning": Mean(value.total, value.count), "cce": ctx.mean(cce, mask), "ccl": ctx.mean(ccl, mask)}
        return value.value, state, metrics

    return Objective("bi_tuning", (fast, slow), term, setup=setup, per_update=(name,))


def _with_one(rows: jax.Array) -> jax.Array:
    return jnp.concatenate([rows, jnp.ones_like(rows[:, :1])], axis=1)


def _classifier(params: Any, head: str, name: str) -> jax.Array:
    """Returns the weights of each class with its bias [C, D + 1]."""
    leaves = leaves_by_path(params)
    kernel = leaves.get(f"{head}/kernel")
    if kernel is None:
        raise unknown(f"head of model {name!r}", head, [path[:-7] for path in leaves if path.endswith("/kernel")])
    bias = leaves.get(f"{head}/bias", jnp.zeros(kernel.shape[-1], kernel.dtype))
    return jnp.concatenate([kernel, bias[None].astype(kernel.dtype)], axis=0).T
