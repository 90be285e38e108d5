"""Views that are told from earlier examples, which a queue in the state remembers: MoCo and NNCLR."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer import losses
from jaxtransfer.errors import InputError
from jaxtransfer.forward import Forward, ema
from jaxtransfer.losses._numerics import check_temperature
from jaxtransfer.masks import mask_of
from jaxtransfer.model import Model
from jaxtransfer.objective import Context, Objective, named_key, view_of
from jaxtransfer.objectives.rows import check_several, gathered, kept, unit
from jaxtransfer.objectives.views import VIEWS
from jaxtransfer.outputs import pick, shapes_of
from jaxtransfer.parts import Parts


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
        values = losses.info_nce(query, key, negatives=keys, ids=_ids(state[name], batch, ctx), **options)
        value = ctx.mean(values, mask)
        if ctx.train:
            state = {**state, name: _enqueued(state[name], key, batch, ctx)}
        return value.value, state, {"moco": value}

    return Objective("moco", (fast, slow), term, setup=_queue(fast, tap, name, queue), per_update=(name,), apart=queue)


def nnclr(
    model: Model,
    *,
    queue: int = 16384,
    temperature: float = 0.1,
    views: Sequence[str] = VIEWS,
    prediction: str = "prediction",
    projection: str = "projection",
) -> Objective:
    """Builds NNCLR: the nearest earlier projection of one view against the predictions of the other view.

    (Dwibedi et al. 2021, arXiv:2104.14548): −log exp(nn(z₁)·p₂/τ) / Σ_k exp(nn(z₁)·p₂ₖ/τ), the mean over the two ways,
    nn in a queue that lives in the state as `<model>_queue` and takes in the projections of the first view.

    Args:
      model: an encoder with a projection and a prediction of it.
      queue: projections that are kept; not fewer than a batch has, and with a batch not more than there are examples.
        Where the batch holds each example's number as `index`, an example is not its own neighbour.
      temperature: τ.
      views: the entries of the batch.
      prediction: the output that is compared with a neighbour.
      projection: the output whose neighbour is looked up; both are brought to length 1.

    Returns:
      An objective with the metric `nnclr`.

    Raises:
      InputError: for a temperature that isn't positive; at init, for a batch of one or larger than the queue.
    """
    check_temperature(temperature)
    run, name = Forward.of(model, views), f"{model.name}_queue"

    def term(outputs, params, state, batch, ctx: Context):
        taps = {"p": prediction, "z": projection}
        found = {f"{k}{n}": pick(f"model {model.name!r}", one, tap) for k, tap in taps.items()
                 for n, one in enumerate(outputs[run], 1)}  # fmt: skip
        mask, support, ids = mask_of(batch), state[name]["keys"], _ids(state[name], batch, ctx)
        rows = {name: kept(entry, mask) for name, entry in found.items()}
        check_several(rows["p1"], ctx, "nnclr")
        options: dict[str, Any] = {"temperature": temperature, "normalize": True, "mask": mask, "axis_name": ctx.axis}
        ways = []
        for z, p in (("z1", "p2"), ("z2", "p1")):
            scores = unit(jax.lax.stop_gradient(rows[z])) @ support.T
            if ids is not None:
                scores = jnp.where(ids[0][:, None] == ids[1][None], -jnp.inf, scores)
            ways.append(losses.info_nce(support[jnp.argmax(scores, axis=1)], rows[p], **options))
        value = ctx.mean((ways[0] + ways[1]) / 2, mask)
        if ctx.train:
            state = {**state, name: _enqueued(state[name], rows["z1"], batch, ctx)}
        return value.value, state, {"nnclr": value}

    return Objective("nnclr", (run,), term, setup=_queue(run, projection, name, queue), per_update=(name,), apart=queue)


def _queue(forward: Forward, tap: str, name: str, size: int) -> Callable[..., tuple[Any, Any]]:
    """Returns the setup of a queue of `size` random unit vectors."""

    def setup(key, batch):
        rows = len(jax.tree.leaves(batch)[0])
        if rows > size:
            raise InputError(f"the queue holds {size} vectors, fewer than a batch of {rows}; make it larger")
        dim = pick(f"model {forward.model.name!r}", shapes_of(forward, batch), tap).shape[-1]
        vectors = jax.random.normal(named_key(key, name), (size, dim))
        known = {"index": jnp.full(size, -1, jnp.int32)} if "index" in batch else {}
        return {}, {name: {"keys": unit(vectors), "place": jnp.zeros((), jnp.int32), **known}}

    return setup


def _ids(queue: Any, batch: Any, ctx: Context) -> tuple[jax.Array, jax.Array] | None:
    """Returns the numbers of the batch's examples and of those in the queue; None where they aren't known."""
    if "index" not in queue or not (ctx.train or "index" in batch):  # other data are evaluated without numbers
        return None
    return view_of(batch, ("index",)).astype(jnp.int32), queue["index"]


def _enqueued(queue: Any, found: jax.Array, batch: Any, ctx: Context) -> Any:
    """Returns the queue with all devices' new vectors in the place of the oldest; those whose mask is 0 are skipped."""
    known = {"index": batch["index"]} if "index" in queue else {}
    everywhere, mask = gathered({"key": found, **known}, batch, ctx)
    rows, size, counted = unit(everywhere["key"]), len(queue["keys"]), mask > 0
    offsets = jnp.cumsum(counted) - 1
    places = jnp.where(counted, (queue["place"] + offsets) % size, size)
    keys = queue["keys"].at[places].set(jax.lax.stop_gradient(rows).astype(queue["keys"].dtype), mode="drop")
    place = ((queue["place"] + jnp.sum(counted)) % size).astype(jnp.int32)
    if not known:
        return {"keys": keys, "place": place}
    index = queue["index"].at[places].set(everywhere["index"].astype(jnp.int32), mode="drop")
    return {"keys": keys, "place": place, "index": index}
