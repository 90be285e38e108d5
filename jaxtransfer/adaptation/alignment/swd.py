"""Sliced Wasserstein discrepancy: two classifiers on one encoder, told apart by the distributions that they give."""

import jax
import optax

from jaxtransfer import losses
from jaxtransfer.adaptation.adversarial.rivals import rivals
from jaxtransfer.adaptation.domain import whole
from jaxtransfer.context import named_key
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective
from jaxtransfer.tree import Patterns


def swd(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    classifier: Model | None = None,
    classifier_optimizer: optax.GradientTransformation | None = None,
    head: Patterns | None = None,
    directions: int = 128,
    repeat: int = 1,
    trade_off: float = 1.0,
    balance: float = 0.0,
    tap: str = "features",
    output: str = "logits",
    view: str = "image",
    source: str = "source",
    target: str = "target",
) -> tuple[Objective, optax.GradientTransformation]:
    """Builds `jt.adaptation.mcd` with the sliced Wasserstein distance as discrepancy (Lee et al. 2019).

    See `jt.losses.sliced_wasserstein` (arXiv:1903.04064): what both classifiers give the target's examples is compared
    as two sets of points, along directions that are drawn anew for every update, the same on all devices. The turns
    are those of `mcd`, each once as in the released example; the source's cross-entropy is part of them:

        objective, optimizer = jt.adaptation.swd(net, optax.adam(1e-3))
        jt.fit(objective, optimizer, jt.data.zipped(source=labelled, target=unlabelled), steps=5000)

    The distance is a mean of squares, far smaller than that of `mcd`, so that `trade_off` may be large.

    Args:
      model: encoder and first classifier; it is the one that is evaluated.
      optimizer: of every turn.
      classifier: the second one, a model of the features with `logits` [B, C]; by default a linear one, under the name
        `<model>_swd`.
      classifier_optimizer: of the turn `apart`; `optimizer` by default.
      head: path patterns of the model's own classifier; the last of its stages by default. `tap` is what it sees.
      directions: how many are drawn.
      repeat: how often the encoder moves.
      trade_off: weight of the discrepancy.
      balance: weight of the term that balances the classes in `mcd`.
      tap: the output that the second classifier sees, flattened.
      output: the output that holds the model's logits.
      view: the entry of a domain's batch that the model sees.
      source: the entry of the batch that holds the source's, with its `label`.
      target: that of the target.

    Returns:
      An objective and an optimiser that belong together, see `jt.alternate`; metrics as of `mcd`, under `fit/`,
      `apart/` and `near/`, with `swd` for what the turn lowers. In evaluation the directions are fixed.

    Raises:
      InputError: as for `mcd`, and for fewer than one direction.
    """
    if directions < 1:
        raise InputError(f"swd draws one direction or more; got {directions}")
    name = f"{model.name}_swd_directions"

    def discrepancy(p1, p2, mask, ctx):
        key = ctx.shared_key(name)
        key = named_key(jax.random.key(0), name) if key is None else key
        theta = jax.random.normal(key, (p1.shape[1], directions), p1.dtype)
        options = {"directions": theta, "p1_mask": mask, "p2_mask": mask, "axis_name": ctx.axis}
        return whole(losses.sliced_wasserstein(p1, p2, **options), ctx, mask)

    return rivals(
        "swd",
        discrepancy,
        model,
        optimizer,
        classifier=classifier,
        classifier_optimizer=classifier_optimizer,
        head=head,
        repeat=repeat,
        trade_off=trade_off,
        balance=balance,
        tap=tap,
        output=output,
        view=view,
        source=source,
        target=target,
    )
