"""Self-supervised objectives over views: what two views of an example, or two modalities, say of each other."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import losses
from jaxtransfer.errors import InputError
from jaxtransfer.forward import Forward
from jaxtransfer.losses._numerics import check_strength, check_temperature
from jaxtransfer.masks import mask_of
from jaxtransfer.micro_batches import micro_batched
from jaxtransfer.model import Model
from jaxtransfer.objective import Context, Mean, Objective, view_of
from jaxtransfer.objectives.rows import check_several, gathered, kept, mean_of_all, unit
from jaxtransfer.outputs import pick

VIEWS = ("image", "image2")
_LEAST_TEMPERATURE = 0.01  # of CLIP: the scores are scaled by 100 at most


def over_views(
    name: str,
    model: Model,
    loss: Callable[..., jax.Array],
    *,
    other: Model | None = None,
    views: Sequence[str] = VIEWS,
    tap: str = "projection",
    apart: int | None = None,
    alone: bool = True,
) -> Objective:
    """Builds the mean of `loss(z1, z2)` over the global batch, z the embeddings of two views of each example.

    One model runs once on both views together, so batch norm sees both; with `other` each runs on its own view. Under
    `jit` all rows of all devices meet by themselves. Under `pmap` a loss that takes `axis_name` gets it and the rows of
    its device, and gives their values [B]; another one gets the rows of all. The loss is also given what it names of
    `labels` and `mask`.

    Args:
      name: of the metric.
      model: what gives the output `tap`.
      loss: of embeddings [B, D] each, with values [B] or a scalar.
      other: a second model for the second view: another modality.
      views: the entries of the batch.
      tap: the output that is compared: `jt.models.with_heads(encoder, projection=...)` gives `projection`.
      apart: 0 where a batch must not hold an example twice, as the loss would take the copy for another example.
      alone: whether a batch may have a single example; a loss that tells it from others needs two.

    Returns:
      An objective.

    Raises:
      InputError: for other than two views; at init, for a batch that is too small, for an output that does not exist,
        or two of other dimensions.
    """
    if len(views) != 2:
        raise InputError(f"expected the names of two views; got {list(views)}")
    if other is None:
        forwards = (Forward.of(model, views),)
    else:
        forwards = (Forward.of(model, views[0]), Forward.of(other, views[1]))
    wants = inspect.signature(loss).parameters

    def embeddings(outputs):
        found = outputs[forwards[0]] if other is None else [outputs[forward] for forward in forwards]
        names = [model.name, (other or model).name]
        return [pick(f"model {whose!r}", one, tap) for whose, one in zip(names, found, strict=True)]

    def term(outputs, params, state, batch, ctx: Context):
        z1, z2 = embeddings(outputs)
        if not alone:
            check_several(z1, ctx, name)
        found = {"z1": z1, "z2": z2}
        if "labels" in wants:
            found["labels"] = view_of(batch, ("label",))
        if "mask" in batch and "mask" not in wants:
            raise InputError("the batch has a mask, but the loss takes none: add mask=None to it")
        mask = mask_of(batch)
        given = {} if mask is None else {"mask": mask}
        if "axis_name" in wants:
            rows = {name: kept(entry, mask) for name, entry in found.items()}
            values = loss(rows.pop("z1"), rows.pop("z2"), **rows, **given, axis_name=ctx.axis)
            value = ctx.mean(values, mask)
        else:
            rows, everywhere = gathered(found, batch, ctx)
            given = dict.fromkeys(given, everywhere)
            value = mean_of_all(loss(rows.pop("z1"), rows.pop("z2"), **rows, **given), everywhere)
        return value.value, state, {name: value}

    def check(outputs, batch):
        embeddings(outputs)

    return Objective(name, forwards, term, check=check, apart=apart)


def info_nce(
    phi: Model,
    psi: Model | None = None,
    *,
    temperature: float = 0.07,
    learn_temperature: bool = False,
    symmetric: bool = True,
    normalize: bool = True,
    views: Sequence[str] = VIEWS,
    tap: str = "projection",
    micro_batch: int | None = None,
    chunk: int | None = None,
) -> Objective:
    """Builds −log exp(φ(x)ᵀψ(y)/τ) / Σ_z exp(φ(x)ᵀψ(z)/τ), z over the global batch.

    (van den Oord et al. 2018, arXiv:1807.03748; with two towers, both directions and a learned temperature it is CLIP,
    Radford et al. 2021, arXiv:2103.00020.) See `jt.losses.info_nce` for its memory.

    Args:
      phi: the tower of the first view.
      psi: that of the second; the same by default.
      temperature: τ, or its first value.
      learn_temperature: learn log 1/τ with the towers, τ held above 0.01 as in CLIP. Metric: `info_nce/temperature`.
      symmetric: whether to take the mean of both directions.
      normalize: whether to bring the embeddings to length 1.
      views: the entries of the batch.
      tap: the output of the towers that is compared.
      micro_batch: run the towers on so many rows at a time, with exact gradients (`jt.models.micro_batched`); a
        shared tower sees both views together, so twice the batch.
      chunk: the largest side of a tile of the scores; by size if None.

    Returns:
      An objective with the metric `info_nce`.

    Raises:
      InputError: for a temperature that isn't positive, or is to be learned from below 0.01.
    """
    check_temperature(temperature)
    if learn_temperature and temperature < _LEAST_TEMPERATURE:
        raise InputError(f"temperature must be at least {_LEAST_TEMPERATURE} to be learned; got {temperature}")
    if psi is phi:
        psi = None
    if micro_batch is not None:
        phi, psi = micro_batched(phi, micro_batch), psi and micro_batched(psi, micro_batch)
    scale, options = f"{phi.name}_temperature", {"symmetric": symmetric, "normalize": normalize, "chunk": chunk}

    def at(value: Any) -> Objective:
        def loss(z1, z2, mask=None, axis_name=None):
            return losses.info_nce(z1, z2, temperature=value, mask=mask, axis_name=axis_name, **options)

        return over_views("info_nce", phi, loss, other=psi, views=views, tap=tap, apart=0, alone=False)

    fixed = at(temperature)
    if not learn_temperature:
        return fixed

    def term(outputs, params, state, batch, ctx):
        value = jnp.exp(-_at_most(params[scale]["log_scale"], -np.log(_LEAST_TEMPERATURE)))
        loss, state, metrics = at(value).loss(outputs, params, state, batch, ctx)
        return loss, state, {**metrics, "info_nce/temperature": Mean(value, jnp.ones(()))}

    def setup(key, batch):
        return {scale: {"log_scale": jnp.asarray(-np.log(temperature), jnp.float32)}}, {}

    return dataclasses.replace(fixed, loss=term, setup=setup)


@jax.custom_vjp
def _at_most(x: jax.Array, bound: float) -> jax.Array:
    """Returns min(x, bound), whose derivative beyond the bound is that of x for a step back and 0 for one further."""
    return jnp.minimum(x, bound)


_at_most.defvjp(
    lambda x, bound: (jnp.minimum(x, bound), (x < bound, bound)),
    lambda kept, change: (jnp.where(kept[0] | (change > 0), change, 0), jnp.zeros_like(kept[1])),
)


def siglip(
    phi: Model,
    psi: Model | None = None,
    *,
    temperature: float = 0.1,
    bias: float = -10.0,
    views: Sequence[str] = VIEWS,
    tap: str = "projection",
) -> Objective:
    """Builds the sigmoid loss of pairs (Zhai et al. 2023, arXiv:2303.15343), temperature and bias learned.

    Args:
      phi: the tower of the first view.
      psi: that of the second; the same by default.
      temperature: the first value of τ.
      bias: the first value of b.
      views: the entries of the batch.
      tap: the output that is compared; brought to length 1.

    Returns:
      An objective with the metric `siglip`.

    Raises:
      InputError: for a temperature that isn't positive.
    """
    check_temperature(temperature)
    if not np.isfinite(bias):
        raise InputError(f"bias must be finite; got {bias}")
    scale, first = f"{phi.name}_siglip", {"log_scale": np.float32(-np.log(temperature)), "bias": np.float32(bias)}

    def at(learned) -> Objective:
        def loss(z1, z2, mask=None, axis_name=None):
            options = {"temperature": jnp.exp(-learned["log_scale"]), "bias": learned["bias"]}
            return losses.siglip(z1, z2, normalize=True, mask=mask, axis_name=axis_name, **options)

        return over_views("siglip", phi, loss, other=psi, views=views, tap=tap, apart=0, alone=False)

    def term(outputs, params, state, batch, ctx):
        return at(params[scale]).loss(outputs, params, state, batch, ctx)

    def setup(key, batch):
        return {scale: jax.tree.map(jnp.asarray, first)}, {}

    return dataclasses.replace(at(first), loss=term, setup=setup)


def simclr(
    model: Model, *, temperature: float = 0.5, views: Sequence[str] = VIEWS, tap: str = "projection"
) -> Objective:
    """Builds SimCLR (Chen et al. 2020, arXiv:2002.05709): see `jt.losses.nt_xent`; metric `simclr`.

    Args:
      model: an encoder with a projection, `jt.models.with_heads(encoder, projection=jt.models.head(512, 128))`.
      temperature: τ.
      views: the entries of the batch, two augmentations of each image.
      tap: the output that is compared.
    """
    check_temperature(temperature)
    loss = functools.partial(losses.nt_xent, temperature=temperature)
    return over_views("simclr", model, loss, views=views, tap=tap, apart=0, alone=False)


def decoupled(
    model: Model,
    *,
    temperature: float = 0.1,
    sigma: float | None = None,
    views: Sequence[str] = VIEWS,
    tap: str = "projection",
) -> Objective:
    """Builds decoupled contrastive learning (Yeh et al. 2022, arXiv:2110.06848): see `jt.losses.dcl`; metric `dcl`.

    Args:
      model: an encoder with a projection.
      temperature: τ.
      sigma: of the weights; None for none.
      views: the entries of the batch.
      tap: the output that is compared.
    """
    check_temperature(temperature)
    if sigma is not None:
        check_temperature(sigma, "sigma")
    loss = functools.partial(losses.dcl, temperature=temperature, sigma=sigma)
    return over_views("dcl", model, loss, views=views, tap=tap, apart=0, alone=False)


def supcon(
    model: Model,
    *,
    temperature: float = 0.07,
    inside: bool = False,
    views: Sequence[str] = VIEWS,
    tap: str = "projection",
) -> Objective:
    """Builds supervised contrastive learning (Khosla et al. 2020, arXiv:2004.11362): see `jt.losses.supcon`.

    Args:
      model: an encoder with a projection.
      temperature: τ.
      inside: whether the mean over the positives is taken inside of the logarithm, L_in of the paper.
      views: the entries of the batch; it also reads `label`.
      tap: the output that is compared; brought to length 1.

    Returns:
      An objective with the metric `supcon`.
    """

    check_temperature(temperature)

    def loss(z1, z2, labels, mask=None, axis_name=None):
        z = unit(jnp.stack([z1, z2], axis=1))
        return losses.supcon(z, labels, temperature=temperature, inside=inside, mask=mask, axis_name=axis_name)

    return over_views("supcon", model, loss, views=views, tap=tap, alone=False)


def barlow_twins(
    model: Model, *, strength: float = 5e-3, views: Sequence[str] = VIEWS, tap: str = "projection"
) -> Objective:
    """Builds Barlow Twins (Zbontar et al. 2021, arXiv:2103.03230): see `jt.losses.barlow_twins`.

    Args:
      model: an encoder with a projection.
      strength: λ of the off-diagonal.
      views: the entries of the batch.
      tap: the output that is compared.
    """
    check_strength(strength)
    loss = functools.partial(losses.barlow_twins, strength=strength)
    return over_views("barlow_twins", model, loss, views=views, tap=tap, alone=False)


def vicreg(
    model: Model,
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    views: Sequence[str] = VIEWS,
    tap: str = "projection",
) -> Objective:
    """Builds VICReg (Bardes et al. 2022, arXiv:2105.04906): see `jt.losses.vicreg`.

    Args:
      model: an encoder with a projection.
      invariance: λ.
      variance: μ.
      covariance: ν.
      views: the entries of the batch.
      tap: the output that is compared.
    """
    for name, weight in (("invariance", invariance), ("variance", variance), ("covariance", covariance)):
        check_strength(weight, name)
    loss = functools.partial(losses.vicreg, invariance=invariance, variance=variance, covariance=covariance)
    return over_views("vicreg", model, loss, views=views, tap=tap, alone=False)
