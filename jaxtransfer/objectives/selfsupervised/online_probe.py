"""A linear probe that trains beside any objective and never reaches its model: how good the features are, meanwhile."""

import math

import jax
import jax.numpy as jnp

from jaxtransfer import losses
from jaxtransfer.errors import InputError
from jaxtransfer.forward import Forward
from jaxtransfer.model import Model
from jaxtransfer.objective import Context, Objective, view_of
from jaxtransfer.objectives.supervised.classification import check_labels
from jaxtransfer.parts.masking import mask_of
from jaxtransfer.parts.outputs import pick, shapes_of
from jaxtransfer.parts.rows import kept

_EPSILON = 1e-6  # under the root of the features' variance


def online_probe(
    model: Model, classes: int, *, beside: Objective | None = None, view: str = "image", tap: str = "features"
) -> Objective:
    """Builds the cross-entropy of a linear classifier on features that it doesn't change.

    (1/n) Σᵢ L(yᵢ, W·norm(sg[f(xᵢ)]) + b), sg no gradient, norm to mean 0 and variance 1 over each example's features:
    the classifier learns from the labels, the model doesn't. Added to a self-supervised objective it shows how well the
    features tell the classes apart while they grow:

        objective = jt.simclr(net)
        fit(objective + jt.online_probe(net, 10, beside=objective), ..., eval_objective=jt.online_probe(net, 10))

    The classifier begins at zero and lives in the parameters as `<model>_probe`.

    Args:
      model: what gives the features.
      classes: C.
      beside: the objective that trains the model: the probe reads the views that this one runs it on, in the same run.
      view: the entry of the batch, without `beside`.
      tap: the output that is read, flattened to [B, D].

    Returns:
      An objective with the metrics `probe` and `accuracy`; it also reads `label` and, where there is one, `mask`.

    Raises:
      InputError: for an objective that doesn't run the model; at init, for labels out of range.
    """
    if classes < 1:
        raise InputError(f"a probe tells one class or more apart; got {classes}")
    forward, name = _forward(model, beside, view), f"{model.name}_probe"

    def features(outputs) -> list[jax.Array]:
        found = outputs[forward] if forward.more else (outputs[forward],)
        return [pick(f"model {model.name!r}", one, tap) for one in found]

    def logits(weights, x):
        x = jax.lax.stop_gradient(x.reshape(x.shape[0], -1))
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        x = x - jnp.mean(x, axis=1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=1, keepdims=True) + _EPSILON)
        return x @ weights["kernel"] + weights["bias"][None]

    def setup(key, batch):
        size = math.prod(pick(f"model {model.name!r}", shapes_of(forward, batch), tap).shape[1:])
        return {name: {"kernel": jnp.zeros((size, classes)), "bias": jnp.zeros(classes)}}, {}

    def term(outputs, params, state, batch, ctx: Context):
        labels, mask = view_of(batch, ("label",)), mask_of(batch)
        scores = [logits(params[name], kept(x, mask)) for x in features(outputs)]
        entropy = jnp.mean(jnp.stack([losses.cross_entropy(one, labels) for one in scores]), axis=0)
        right = jnp.mean(jnp.stack([losses.top_k(one, labels) for one in scores]), axis=0)
        value = ctx.mean(entropy, mask)
        return value.value, state, {"probe": value, "accuracy": ctx.mean(right, mask)}

    def check(outputs, batch):
        features(outputs)
        check_labels(name, classes, batch)

    return Objective("probe", (forward,), term, setup=setup, check=check)


def _forward(model: Model, beside: Objective | None, view: str) -> Forward:
    """Returns the run of the model that the probe reads."""
    if beside is None:
        return Forward.of(model, view)
    for forward in beside.forwards:
        if forward.trained and forward.model is model:
            return forward
    raise InputError(f"that objective doesn't run model {model.name!r}; pass the model that it trains, the same object")
