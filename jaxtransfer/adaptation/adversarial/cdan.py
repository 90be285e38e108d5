"""Conditional domain-adversarial training: the discriminator sees features together with what they are taken for."""

import math

import jax
import jax.numpy as jnp

from jaxtransfer.adaptation.adversarial import networks
from jaxtransfer.adaptation.adversarial.domains import (
    Coefficient,
    Domains,
    Pair,
    check_coefficient,
    setup_of,
    told_apart,
)
from jaxtransfer.adaptation.domain import whole
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.objective import Context, Objective, named_key
from jaxtransfer.schedules import warm_start

_OFFSET = 1e-5  # under the logarithm of the entropy, as released


def cdan(
    model: Model,
    *,
    discriminator: Model | None = None,
    coefficient: Coefficient | None = None,
    entropy: bool = True,
    exact_up_to: int = 16_384,
    random_dim: int = 1024,
    tap: str = "features",
    output: str = "logits",
    view: str = "image",
    source: str = "source",
    target: str = "target",
) -> Objective:
    """Builds conditional adversarial adaptation (Long et al. 2018, arXiv:1705.10667), CDAN+E by default.

    As `dann`, but the discriminator sees f ⊗ p, the features [B, D] times the predicted probabilities [B, C], of which
    no gradient passes through p: domains are made alike class by class, where plain features of different classes may
    be matched with each other. With `entropy` an example weighs 1 + exp(−H(p)), divided by its mean, so that those
    that the classifier is unsure of count less (about half) and don't pull the features to the wrong class.

    Where C·D is large, f ⊗ p is replaced by (R_f f) ⊙ (R_p p) / √d with random normal matrices, drawn once by the run's
    key and kept in the state, with nearly the same inner products. (The paper does so beyond 4,096, the released code
    where it is told to.) For stability see `dann`.

    Args:
      model: what gives features and logits.
      discriminator: a model of the joint features, [B, C·D] or [B, random_dim], with `logits` [B, 1] above 0 for the
        source; by default `jt.adaptation.discriminator()`, under the name `<model>_cdan`.
      coefficient: λ of the gradient reversal, a number or a schedule; `jt.schedules.warm_start()` by default.
      entropy: whether examples are weighted by how sure the classifier is.
      exact_up_to: the largest C·D for which the product itself is taken; 0 for the random map at any size.
      random_dim: d, the dimensions of the random map.
      tap: the output f, flattened.
      output: the output that holds the logits.
      view: the entry of a domain's batch that the model sees.
      source: the entry of the batch that holds the source's.
      target: that of the target.

    Returns:
      An objective with the metrics `cdan` and `cdan/accuracy`, the discriminator's.

    Raises:
      InputError: as for `dann`, and for dimensions below one.
    """
    if random_dim < 1 or exact_up_to < 0:
        raise InputError(f"cdan: random_dim is 1 or more and exact_up_to 0 or more; got {random_dim}, {exact_up_to}")
    domains = Domains.of(model, source, target, view)
    coefficient = warm_start() if coefficient is None else coefficient
    check_coefficient(coefficient)
    own = discriminator or networks.discriminator(name=domains.named(model.name, "cdan"))
    drawn = f"{own.name}_map"

    def setup(key, batch):
        features, logits = domains.shapes(batch, tap, output)
        rows, sizes = features.shape[0], {"features": features.shape[1], "classes": logits.shape[1]}
        dtype = jnp.promote_types(features.dtype, jnp.float32)
        if math.prod(sizes.values()) <= exact_up_to:
            return setup_of(own, key, jax.ShapeDtypeStruct((rows, math.prod(sizes.values())), dtype))
        keys = jax.random.split(named_key(key, drawn))
        matrices = {
            side: jax.random.normal(one, (size, random_dim))
            for one, (side, size) in zip(keys, sizes.items(), strict=True)
        }
        params, state = setup_of(own, key, jax.ShapeDtypeStruct((rows, random_dim), dtype))
        return params, {**state, drawn: matrices}

    def loss(outputs, params, state, batch, ctx):
        masks = domains.masks(batch)
        features, logits = (domains.rows(outputs, name, batch) for name in (tap, output))
        probabilities = Pair(*(_probabilities(one) for one in logits))
        both = Pair(*(joint(f, p, state.get(drawn)) for f, p in zip(features, probabilities, strict=True)))
        how = {"masks": masks, "weights": _sureness(probabilities, masks, ctx)} if entropy else {"masks": masks}
        value, right, state = told_apart(own, both, coefficient, params, state, ctx, **how)
        told = {"cdan": value, "cdan/accuracy": right}
        return value, state, {metric: whole(number, ctx, *masks) for metric, number in told.items()}

    def check(outputs, batch):
        domains.check(outputs, tap, output)

    return Objective("cdan", domains.forwards, loss, setup=setup, check=check, models=(own,))


def joint(features: jax.Array, probabilities: jax.Array, matrices: dict[str, jax.Array] | None = None) -> jax.Array:
    """Returns p_c f_d as [B, C·D], or with random matrices (R_f f) ⊙ (R_p p) / √d."""
    features = features.reshape(features.shape[0], -1).astype(probabilities.dtype)
    if matrices is None:
        return (probabilities[:, :, None] * features[:, None]).reshape(features.shape[0], -1)
    dim = matrices["classes"].shape[1]
    return (features @ matrices["features"]) * (probabilities @ matrices["classes"]) / math.sqrt(dim)


def _probabilities(logits: jax.Array) -> jax.Array:
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return jax.lax.stop_gradient(jax.nn.softmax(logits, axis=-1))


def _sureness(probabilities: Pair, masks: Pair, ctx: Context) -> Pair:
    """Returns 1 + exp(−H(p)) of each row by its mean over the domains, which count alike: 1 on average."""
    weights = [1 + jnp.exp(jnp.sum(p * jnp.log(p + _OFFSET), axis=-1)) for p in probabilities]
    means = [ctx.mean(one, mask).value for one, mask in zip(weights, masks, strict=True)]
    mean = (means[0] + means[1]) / 2
    return Pair(*(one / jnp.where(mean > 0, mean, 1) for one in weights))
