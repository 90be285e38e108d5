"""Wasserstein guided representations: a critic measures how far two domains' features lie apart, and they close up."""

import re

import jax
import jax.numpy as jnp
import optax

from jaxtransfer import optim
from jaxtransfer.adaptation.adversarial import networks
from jaxtransfer.adaptation.adversarial.domains import Domains, Pair, setup_of
from jaxtransfer.adaptation.domain import whole
from jaxtransfer.losses._numerics import check_strength, norm
from jaxtransfer.model import Model
from jaxtransfer.objective import Context, Objective, named_key
from jaxtransfer.objectives.supervised.classification import classification
from jaxtransfer.parts.together import together
from jaxtransfer.train.turns import Turn, alternate


def wdgrl(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    critic: Model | None = None,
    critic_optimizer: optax.GradientTransformation | None = None,
    repeat: int = 5,
    penalty: float = 10.0,
    trade_off: float = 1.0,
    tap: str = "features",
    output: str = "logits",
    view: str = "image",
    source: str = "source",
    target: str = "target",
) -> tuple[Objective, optax.GradientTransformation]:
    """Builds Wasserstein distance guided representation learning (Shen et al. 2018, arXiv:1707.01217), in turns.

      critic: `repeat` times, the critic w raises mean_s w(f) − mean_t w(f) − γ mean (‖∇w‖ − 1)²,
      fit: the model lowers the source's cross-entropy + trade_off · (mean_s w(f) − mean_t w(f)).

    The slopes ∇w by features are taken, as released, at the features of both domains and at one random point between
    each source row and a target row (the rows of the smaller batch begin anew). The distance has a slope where a
    discriminator that is sure has none, so the features follow a critic however good it is, and no warm start is
    needed; for that the critic must be ahead: more repetitions or a larger rate for it. It has no batch norm, in which
    the slope at a row would depend on the others.

        objective, optimizer = jt.adaptation.wdgrl(net, optax.adam(1e-3))

    Args:
      model: what gives features and logits.
      optimizer: of the model.
      critic: w, a model of features with `logits` [B, 1]; by default one hidden layer of 100 units, as in the paper,
        under the name `<model>_wdgrl`.
      critic_optimizer: `optimizer` by default.
      repeat: updates of the critic before one of the model.
      penalty: γ.
      trade_off: λ.
      tap: the output f, flattened.
      output: the output that holds the logits.
      view: the entry of a domain's batch that the model sees.
      source: the entry of the batch that holds the source's, with its `label`.
      target: that of the target.

    Returns:
      An objective and an optimiser that belong together, see `jt.alternate`; metrics `critic/wdgrl` (what it lowers),
      `critic/distance`, `critic/slope` (mean ‖∇w‖), `fit/distance` and those of the classification.

    Raises:
      InputError: for a weight that is negative or not finite, and one name for both domains; at init, for a batch
        without them, and an unknown output.
    """
    check_strength(penalty, "penalty")
    check_strength(trade_off, "trade_off")
    domains = Domains.of(model, source, target, view)
    own = critic or networks.discriminator(hidden=(100,), batch_norm=False, name=domains.named(model.name, "wdgrl"))

    def setup(key, batch):
        return setup_of(own, key, *domains.shapes(batch, tap))

    def check(outputs, batch):
        domains.check(outputs, tap)

    def everywhere(outputs, batch, ctx):
        """The features of all devices: points between two rows need both."""
        found = [domain.gathered(outputs, tap, batch, ctx) for domain in (domains.source, domains.target)]
        rows, masks = zip(*found, strict=True)
        return Pair(*(one.reshape(one.shape[0], -1) for one in rows)), Pair(*masks)

    def raised(outputs, params, state, batch, ctx):
        rows, masks = everywhere(outputs, batch, ctx)
        rows = Pair(*jax.lax.stop_gradient(tuple(rows)))
        points, counted = _points(rows, masks, ctx, own.name)

        def scores(points):
            outputs, new = ctx.run(own, params, state, points)
            return jnp.sum(outputs["logits"]), (outputs["logits"][:, 0], new)

        slopes, (seen, state) = jax.grad(scores, has_aux=True)(points)
        lengths = norm(slopes)[:, 0]
        ends = jnp.split(seen, [len(rows.source), len(rows.source) + len(rows.target)])
        distance = _mean(ends[0], masks.source) - _mean(ends[1], masks.target)
        value = penalty * _mean(jnp.square(lengths - 1), counted) - distance
        told = {"wdgrl": value, "distance": distance, "slope": _mean(lengths, counted)}
        return value, state, {metric: whole(number, ctx, *masks) for metric, number in told.items()}

    def lowered(outputs, params, state, batch, ctx):
        rows, masks = everywhere(outputs, batch, ctx)
        found, state = ctx.run(own, params, state, jnp.concatenate(rows))
        ends = jnp.split(found["logits"][:, 0], [len(rows.source)])
        distance = _mean(ends[0], masks.source) - _mean(ends[1], masks.target)
        return distance, state, {"distance": whole(distance, ctx, *masks)}

    learns = Objective("wdgrl", domains.forwards, raised, setup=setup, check=check, models=(own,))
    closes = Objective("distance", domains.forwards, lowered, setup=setup, check=check, models=(own,))
    labelled = classification(model, output=output, view=view).on(source)
    mine, how = f"^{re.escape(own.name)}", {"adapt_statistics": True}
    second = optimizer if critic_optimizer is None else critic_optimizer
    return alternate(
        Turn("critic", together(learns), optim.only(second, mine, **how), repeat=repeat),
        Turn("fit", together(labelled + trade_off * closes), optim.freeze(optimizer, mine, **how)),
    )


def _points(rows: Pair, masks: Pair, ctx: Context, name: str) -> tuple[jax.Array, jax.Array]:
    """Returns the rows of both domains and points between them [N + M + max(N, M), D], and which of them count."""
    pairs = max(len(one) for one in rows)
    source, target = (one[jnp.arange(pairs) % len(one)] for one in rows)
    counts = [mask[jnp.arange(pairs) % len(mask)] for mask in masks]
    key = ctx.shared_key(name)
    if key is None:  # in evaluation the draw is fixed
        key = named_key(jax.random.key(0), name)
    share = jax.random.uniform(key, (pairs, 1), jnp.float32).astype(source.dtype)  # one draw, whatever the type
    between = target + share * (source - target)
    both = (counts[0] * counts[1] > 0).astype(masks.source.dtype)
    return jnp.concatenate([*rows, between]), jnp.concatenate([*masks, both])


def _mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    weights = mask.astype(values.dtype)
    total = jnp.sum(jnp.where(weights > 0, values, 0) * weights)
    return total / jnp.where(jnp.sum(weights) > 0, jnp.sum(weights), 1)
