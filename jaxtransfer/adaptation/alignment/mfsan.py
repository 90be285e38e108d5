"""Multiple feature spaces: each source is aligned with the target in a branch of its own, and the branches agree."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxtransfer import losses
from jaxtransfer.adaptation.adversarial.domains import Coefficient, at, check_coefficient
from jaxtransfer.adaptation.alignment.dan import ALPHAS
from jaxtransfer.adaptation.domain import Domain, whole
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective, view_of
from jaxtransfer.objectives.supervised.classification import check_labels
from jaxtransfer.parts.masking import mask_of
from jaxtransfer.parts.rows import kept
from jaxtransfer.schedules import warm_start


def mfsan(
    model: Model,
    sources: Sequence[str],
    *,
    coefficient: Coefficient | None = None,
    alphas: Sequence[float] = ALPHAS,
    view: str = "image",
    target: str = "target",
) -> Objective:
    """Builds the loss of several sources with a branch each, MFSAN (Zhu et al. 2019, AAAI, 33(1), 5989–5996).

    (1/N) Σᵢ CEᵢ(sᵢ) + γ (1/N) Σᵢ MMD²(fᵢ(sᵢ), fᵢ(t)) + γ mean_{i<j} mean (1/C) Σ_c |pᵢ(t) − pⱼ(t)|

    with the features fᵢ and probabilities pᵢ of source i's branch. The labels of the sources are part of it, each
    learned by its own branch:

        net = jt.adaptation.branched(net, ("a", "b"), classes=10)
        objective = jt.adaptation.mfsan(net, ("a", "b"))
        data = jt.data.zipped(a=first, b=second, target=unlabelled)
        jt.fit(objective, optax.adam(1e-3), data, steps=5000, eval_objective=jt.classification(net))

    The released code makes an update for each source in turn, compares the branches by the softmax of their features,
    where the paper has their predictions, and takes a biased MMD of the same kernels (`jt.losses.mmd` is unbiased).

    Args:
      model: of `jt.adaptation.branched` with a branch for each source, or any other with outputs `<source>/features`
        [B, D] and `<source>/logits` [B, C] for each.
      sources: the entries of the batch that hold the sources', with their `label`s.
      coefficient: γ, a number or a schedule; `jt.schedules.warm_start()` by default. As released it is
        `warm_start(steps=steps, alpha=10)`.
      alphas: the kernels' widths, see `jt.adaptation.dan`.
      view: the entry of a domain's batch that the model sees.
      target: the entry of the batch that holds the target's.

    Returns:
      An objective with the metrics `mfsan`, `mfsan/mmd`, `mfsan/disagreement`, and `mfsan/<source>/accuracy` of each.

    Raises:
      InputError: for no source, a domain that is named twice, and a coefficient that is negative or not finite; at
        init, for a batch without one of them, labels out of range, and a model without a branch.
    """
    names = tuple(sources)
    if isinstance(sources, str) or not names or len({*names, target}) <= len(names):
        raise InputError(f"mfsan takes the names of one source or more, each another entry of the batch; got {sources}")
    coefficient = warm_start() if coefficient is None else coefficient
    check_coefficient(coefficient)
    domains = {name: Domain.of(model, name, view) for name in names}
    aim = Domain.of(model, target, view)

    def loss(outputs, params, state, batch, ctx):
        aim_mask = mask_of(aim.part(batch))
        errors, discrepancies, predicted, metrics = [], [], [], {}
        for name, domain in domains.items():
            part, tap, output = domain.part(batch), f"{name}/features", f"{name}/logits"
            mask, labels = mask_of(part), view_of(part, ("label",))
            logits = kept(domain.read(outputs, output), mask)
            errors.append(ctx.mean(losses.cross_entropy(logits, labels), mask).value)
            metrics[f"mfsan/{name}/accuracy"] = ctx.mean(losses.top_k(logits, labels), mask)
            options = {"source_mask": mask, "target_mask": aim_mask, "axis_name": ctx.axis}
            rows = kept(domain.read(outputs, tap), mask), kept(aim.read(outputs, tap), aim_mask)
            discrepancies.append(losses.mmd(*rows, alphas=alphas, **options))
            unlabelled = kept(aim.read(outputs, output), aim_mask)
            predicted.append(jax.nn.softmax(unlabelled.astype(jnp.promote_types(unlabelled.dtype, jnp.float32))))
        pairs = [losses.classifier_discrepancy(one, other) for one, other in itertools.combinations(predicted, 2)]
        gaps = [ctx.mean(pair, aim_mask).value for pair in pairs]
        error, mmd = jnp.mean(jnp.stack(errors)), jnp.mean(jnp.stack(discrepancies))
        gap = jnp.mean(jnp.stack(gaps)) if gaps else jnp.zeros_like(error)
        value = error + at(coefficient, ctx) * (mmd + gap)
        masks = [*(mask_of(domain.part(batch)) for domain in domains.values()), aim_mask]
        told = {"mfsan": value, "mfsan/mmd": mmd, "mfsan/disagreement": gap}
        metrics |= {metric: whole(number, ctx, *masks, least=2) for metric, number in told.items()}
        return value, state, metrics

    def check(outputs, batch):
        for name, domain in domains.items():
            for tap in (f"{name}/features", f"{name}/logits"):
                if tap not in outputs[domain.forward]:
                    raise InputError(
                        f"mfsan reads a branch for each source, and model {model.name!r} gives no {tap!r}; make it by "
                        f"jt.adaptation.branched(model, {list(names)}, classes)"
                    )
            check_labels(model.name, domain.read(outputs, f"{name}/logits").shape[-1], domain.part(batch))
        aim.part(batch)

    forwards = (*(domain.forward for domain in domains.values()), aim.forward)
    return Objective("mfsan", forwards, loss, check=check)
