"""A model's outputs on all examples, as columns of the data set beside the others."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtransfer import tree
from jaxtransfer.devices.sharding import Rule
from jaxtransfer.errors import InputError
from jaxtransfer.forward import frozen
from jaxtransfer.model import Model
from jaxtransfer.representation.inference import Inference

_DTYPES = (np.dtype(np.float16), np.dtype(np.float32))


def features(
    model: Model,
    variables: Any,
    dataset: Any,
    outputs: Sequence[str] | Mapping[str, str] | str = ("features",),
    *,
    batch_size: int = 256,
    view: str | None = None,
    path: Any = None,
    mesh: Mesh | None = None,
    shard: Mapping[str, Rule] | None = None,
) -> Any:
    """Runs a model in inference mode over a data set, once, and adds its outputs as columns.

        deep = jt.features(encoder, run.variables, train, ("features", "logits"))
        jt.fit(jt.classification(jt.models.mlp(10), view="features"), optimizer, jt.data.pipeline(deep, 64), steps=500)

    Pipelines carry the new columns, and refuse to augment: they hold for the inputs as they are.

    Args:
      model: the model.
      variables: `{"params": ..., **state}`; or a training state, in which the model of this name was trained.
      dataset: a `jt.data.Dataset`.
      outputs: the model's outputs that are kept; as a mapping, the new column's name to the output's.
      batch_size: examples at a time; the last batch is filled up, so that one program serves all.
      view: the column that the model reads; by default `image`, or `tokens` or `features` where that is the one
        that a data set without images has.
      path: a folder, in which the outputs are written, and from which they are read, all at once below 2 GiB, else
        when they are asked for. The same call finds them there and computes nothing; of other data, weights or outputs
        it is refused. None holds them in memory.
      mesh: the devices, over which batches are split; None for the default one.
      shard: rules by which the variables are split over the axes of the mesh, as for `train_step`: for a model that
        no device holds alone.

    Returns:
      The data set with the columns [N, ...], float32, or float16 where the model gives that.

    Raises:
      InputError: for an output that does not exist, one that isn't of floating numbers or not finite, a column's name
        that is taken, an empty data set; for a folder that holds something else; for rules that do not fit the
        variables, and a batch size that doesn't divide by the devices.
    """
    if not hasattr(dataset, "with_columns") or not hasattr(dataset, "read"):
        raise InputError(f"features takes a jt.data.Dataset, got a {type(dataset).__name__}; jt.data.load reads one")
    if batch_size < 1 or not len(dataset):
        what = f"batch_size={batch_size}" if batch_size < 1 else "no examples"
        raise InputError(f"features needs examples, and a batch_size of at least 1; got {what}")
    view = _view(dataset, view)
    names = {outputs: outputs} if isinstance(outputs, str) else outputs
    names = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
    if not names:
        raise InputError("features keeps one output or more, got none: outputs=('features',)")
    if taken := sorted(names.keys() & {*dataset.entries, *dataset.columns, "mask"}):
        rename = f"outputs={{'new name': {names[taken[0]]!r}}}"
        raise InputError(f"features: a column is called {taken[0]!r} already; rename the new one: {rename}")
    variables = model.complete(frozen(model, variables).variables.tree)

    inference = Inference(model, mesh, shard)

    @jax.jit
    def compiled(placed, inputs):
        given = inference.outputs(placed, inputs)
        if missing := [name for name in names.values() if name not in given]:
            raise InputError(f"model {model.name!r} has no output {missing[0]!r}; it has {', '.join(sorted(given))}")
        return {new: _floating(name, given[name]) for new, name in names.items()}

    first = dataset.read(np.zeros(batch_size, np.int64))[view]
    placed = inference.variables(variables)
    known = jax.eval_shape(compiled, placed, jax.ShapeDtypeStruct(first.shape, first.dtype))
    shapes = {name: jax.ShapeDtypeStruct(one.shape[1:], one.dtype) for name, one in known.items()}

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(dataset), batch_size):
            rows = np.arange(start, min(start + batch_size, len(dataset)))
            inputs = dataset.read(np.pad(rows, (0, batch_size - len(rows)), mode="edge"))[view]
            made = {
                name: np.asarray(one)[: len(rows)] for name, one in compiled(placed, inference.inputs(inputs)).items()
            }
            _check_finite(made, names, start)
            yield made

    if path is not None:
        of = {"model": model.name, "view": view, "outputs": names, "weights": _digest(variables)}
        if (made := model.recipe) is not None:  # by the same weights, another normalisation gives other outputs
            told = [made.build, dict(made.arguments), made.mean, made.std]
            of["network"] = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
        return dataset.with_stored(path, shapes, of, batches())
    columns = {name: np.empty((len(dataset), *one.shape), one.dtype) for name, one in shapes.items()}
    for number, made in enumerate(batches()):
        for name, values in made.items():
            columns[name][number * batch_size : number * batch_size + len(values)] = values
    return dataset.with_columns(columns, of_image=True)


def _view(dataset: Any, view: str | None) -> str:
    """Returns the column that a model reads."""
    known = [name for name in ("tokens", "features") if name in dataset.entries]
    if view is None:
        view = known[0] if "image" not in dataset.entries and len(known) == 1 else "image"
    if view not in dataset.entries:
        there = ", ".join(dataset.entries)
        raise InputError(
            f"features: {dataset.title} has no column {view!r}; it has {there}; name the one that "
            f"the model reads: view="
        )
    return view


def _floating(name: str, values: jax.Array) -> jax.Array:
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise InputError(f"features: output {name!r} is {values.dtype}, expected floating numbers")
    return values if values.dtype in _DTYPES else values.astype(jnp.float32)


def _check_finite(made: Mapping[str, np.ndarray], names: Mapping[str, str], start: int) -> None:
    for name, values in made.items():
        bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
        if bad.size:
            raise InputError(
                f"features: output {names[name]!r} of example {start + int(bad[0])} is not finite; look at the weights "
                f"and at that example"
            )


def _digest(variables: Any) -> str:
    digest = hashlib.sha256()
    for path, leaf in sorted(tree.leaves_by_path(variables).items()):
        values = np.asarray(leaf)
        digest.update(f"{path} {values.dtype} {values.shape}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()
