"""Embeddings of a data set: a model run in inference mode over all examples, or over random views of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtransfer.devices.sharding import Rule
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.objective import Batch
from jaxtransfer.parts.masking import check_masks
from jaxtransfer.representation.inference import Inference


class Embedded(NamedTuple):
    """Embeddings of a data set.

    Attributes:
      features: float32 [N, D].
      labels: int32 [N]; empty where the batches have none.
    """

    features: np.ndarray
    labels: np.ndarray


def embed(
    model: Model,
    variables: Any,
    batches: Iterable[Batch],
    *,
    tap: str = "features",
    view: str = "image",
    mesh: Mesh | None = None,
    shard: Mapping[str, Rule] | None = None,
):
    """Runs a model in inference mode over all examples.

    Args:
      model: the model.
      variables: `{"params": ..., **state}`.
      batches: such as `jt.data.eval_batches` gives; rows with `mask` 0 are left out.
      tap: the output that is kept, flattened.
      view: the entry of the batch.
      mesh: the devices, over which batches are split; None for the default one.
      shard: rules by which the variables are split over the axes of the mesh, as for `train_step`: for a model that
        no device holds alone.

    Returns:
      An `Embedded`.

    Raises:
      InputError: for an output that does not exist, and where there is no example; for rules that do not fit the
        variables, and a batch that doesn't divide by the devices.
    """
    return embedder(model, tap=tap, view=view, mesh=mesh, shard=shard)(variables, batches)


def embedder(
    model: Model,
    *,
    tap: str = "features",
    view: str = "image",
    mesh: Mesh | None = None,
    shard: Mapping[str, Rule] | None = None,
) -> Callable[[Any, Iterable[Batch]], Embedded]:
    """Compiles `embed` for many calls: `run(variables, batches) -> Embedded`."""
    inference = Inference(model, mesh, shard)

    @jax.jit
    def compiled(placed, inputs):
        outputs = inference.outputs(placed, inputs)
        if tap not in outputs:
            raise InputError(f"model {model.name!r} has no output {tap!r}; it has {', '.join(sorted(outputs))}")
        return outputs[tap].reshape(len(outputs[tap]), -1).astype(jnp.float32)

    def run(variables: Any, batches: Iterable[Batch]) -> Embedded:
        if isinstance(batches, Mapping) or hasattr(batches, "class_names"):
            raise InputError(
                f"embed takes batches one after the other, got a {type(batches).__name__}: pass [batch], or what "
                f"jt.data.eval_batches(dataset, batch_size) makes"
            )
        features, labels, placed = [], [], inference.variables(variables)
        for batch in batches:
            check_masks(batch)
            kept = np.asarray(batch.get("mask", np.ones(len(batch[view])))) > 0
            features.append(np.asarray(compiled(placed, inference.inputs(batch[view])))[kept])
            if "label" in batch:
                labels.append(np.asarray(batch["label"])[kept])
        if not features or not sum(map(len, features)):
            raise InputError("embed: expected at least one example, got none; is the split empty?")
        return Embedded(np.concatenate(features), np.concatenate(labels) if labels else np.empty(0, np.int32))

    return run


def embed_views(
    model: Model,
    variables: Any,
    batches: Sequence[Batch] | Any,
    transform: Callable[[jax.Array, Batch, Any], Batch],
    *,
    key: jax.Array,
    views: Sequence[str] = ("image", "image2"),
    tap: str = "features",
) -> list[Embedded]:
    """Runs a model in inference mode over random views of all examples, batch by batch: what `alignment` compares.

    Args:
      model: the model.
      variables: `{"params": ..., **state}`.
      batches: such as `jt.data.eval_batches` gives; read once for each view.
      transform: makes the views (`jt.data.views`); example i of all has the number i.
      key: of the views.
      views: the entries that the transform makes.
      tap: the output that is kept, flattened.

    Returns:
      An `Embedded` for each view.
    """

    def seen(view: str) -> Iterable[Batch]:
        made = jax.jit(lambda batch, rows: transform(key, batch, rows)[view])  # which leaves out what isn't asked for
        first = 0
        for batch in batches:
            size = len(jax.tree.leaves(batch)[0])
            yield {**batch, view: made(batch, first + np.arange(size))}
            first += size

    return [embed(model, variables, seen(view), tap=tap, view=view) for view in views]
