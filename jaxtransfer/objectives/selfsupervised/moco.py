"""MoCo: a view is told from a queue of earlier keys by the slow key of its other view."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxtransfer import losses
from jaxtransfer.errors import InputError
from jaxtransfer.forward import Forward, ema
from jaxtransfer.losses._numerics import check_temperature
from jaxtransfer.model import Model
from jaxtransfer.objective import Context, Objective
from jaxtransfer.objectives.selfsupervised.over_views import VIEWS
from jaxtransfer.objectives.selfsupervised.queue import enqueued, ids_of, queue_of
from jaxtransfer.parts.masking import mask_of
from jaxtransfer.parts.outputs import pick
from jaxtransfer.parts.rows import kept
from jaxtransfer.parts.split_statistics import Parts


def moco(
    model: Model,
    *,
    queue: int = 65536,
    temperature: float = 0.2,
    decay: float | Callable[[Any], Any] = 0.999,
    split_statistics: int = 1,
    views: Sequence[str] = VIEWS,
    tap: str = "projection",
) -> Objective:
    """Builds momentum contrast: a view is told from a queue of earlier keys by the slow key of its other view.

    (He et al. 2020, arXiv:1911.05722, τ = 0.07; Chen et al. 2020, arXiv:2003.04297, τ = 0.2.) The slow network and the
    queue live in the state, as `<model>_ema` and `<model>_queue`. Keys of all devices enter it.

    Batch norm over the whole batch, as it is by default, lets the statistics tell which key belongs to a query: the
    loss falls while the features get worse (section 3.3 of the paper). There each device takes statistics of its own
    examples, and the keys are shuffled among the devices, so that a query and its key are normalised by different
    examples; statistics over all devices would not do that. `split_statistics=N` does, on any number of devices: the
    batch is split into N parts with statistics of their own, one way for the queries and across it for the keys. It
    takes no more arithmetic. Parts of about 32 examples, as in the paper, are large enough; a model without batch norm
    needs none.

    A key of the query's own image, from an epoch before, is no negative: where the batch holds each example's number
    as `index`, `dataset.with_columns({"index": np.arange(len(dataset))})`, such keys are left out. Without it they
    count, so the queue should be a small part of the data; under gradient accumulation over k batches, of which one
    enters the queue, it reaches back over k times as many examples.

    Args:
      model: an encoder with a projection.
      queue: K, keys that are kept, at first random ones; not fewer than a batch has, and with a batch not more than
        there are examples.
      temperature: τ.
      decay: of the slow network.
      split_statistics: N, parts of the batch from which batch norm takes its statistics in training; the running ones
        are their mean. Parts for queries are neighbours in the batch, for keys every N-th example: positions are
        random, and so the same keys are shuffled the same way under `jit` and `pmap`, where N is a multiple of the
        devices.
      views: the entries of the batch: the query's, and the key's.
      tap: the output that is compared; brought to length 1.

    Returns:
      An objective with the metric `moco`.

    Raises:
      InputError: for a temperature, decay or number of parts out of range; at init, for a batch larger than the queue
        or that doesn't divide into the parts.
    """
    check_temperature(temperature)
    if split_statistics < 1:
        raise InputError(f"split_statistics must be at least 1, the whole batch; got {split_statistics}")
    fast, slow, name = Forward.of(model, views[0]), Forward.of(ema(model, decay), views[1]), f"{model.name}_queue"
    if split_statistics > 1:
        fast = dataclasses.replace(fast, parts=Parts(split_statistics))
        slow = dataclasses.replace(slow, parts=Parts(split_statistics, strided=True))

    def term(outputs, params, state, batch, ctx: Context):
        query, key = (pick(f"model {model.name!r}", outputs[forward], tap) for forward in (fast, slow))
        mask, keys = mask_of(batch), state[name]["keys"]
        query, key = kept(query, mask), kept(jax.lax.stop_gradient(key), mask)
        options: dict[str, Any] = {"temperature": temperature, "normalize": True, "mask": mask}
        values = losses.info_nce(query, key, negatives=keys, ids=ids_of(state[name], batch, ctx), **options)
        value = ctx.mean(values, mask)
        if ctx.train:
            state = {**state, name: enqueued(state[name], key, batch, ctx)}
        return value.value, state, {"moco": value}

    return Objective(
        "moco", (fast, slow), term, setup=queue_of(fast, tap, name, queue), per_update=(name,), apart=queue
    )
