"""A loss of two views of an example, or of two modalities: what most self-supervised methods are made of."""

import inspect
from collections.abc import Callable, Sequence

import jax

from jaxtransfer.errors import InputError
from jaxtransfer.forward import Forward
from jaxtransfer.model import Model
from jaxtransfer.objective import Context, Objective, view_of
from jaxtransfer.parts.masking import mask_of
from jaxtransfer.parts.outputs import pick
from jaxtransfer.parts.rows import check_several, gathered, kept, mean_of_all

VIEWS = ("image", "image2")


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
