"""The Gram matrices of what linear layers see, collected over a data set."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.errors import InputError, unknown
from jaxtransfer.model import Model
from jaxtransfer.parts.masking import check_masks, mask_of


def gram_matrices(
    model: Model,
    variables: Any,
    batches: Iterable[Mapping[str, Any]],
    inputs: Mapping[str, str | Callable[[Any, Any], Any]],
    *,
    view: str = "image",
) -> dict[str, np.ndarray]:
    """Returns the mean of x xᵀ over what each layer sees of the batches, for `jt.fusion.regmean`.

        seen = {"stage1/kernel": lambda outputs, image: image.reshape(len(image), -1), "head/kernel": "features"}
        grams = [jt.fusion.gram_matrices(model, v, batches, seen) for v, batches in zip(runs, data)]

    Args:
      model: the model, run in inference mode.
      variables: `{"params": ..., **state}`.
      batches: such as `jt.data.eval_batches` gives; rows with `mask` 0 do not count.
      inputs: from the path of a kernel to what its layer sees: the name of an output of the model, or a function of the
        outputs and the batch's inputs. Arrays [B, ..., D]: with more axes each position is a row.
      view: the entry of the batch that the model sees.

    Returns:
      Matrices [D, D] by path.

    Raises:
      InputError: for an output that does not exist, for other shapes, and where no example counts.
    """

    @jax.jit
    def of_batch(variables, x, mask):
        outputs, _ = model.apply(variables, x, train=False, key=None)
        return {path: _sums(path, _read(outputs, x, tap), mask) for path, tap in inputs.items()}

    complete = model.complete(variables)
    totals: dict[str, tuple[Any, float]] = dict.fromkeys(inputs, (0.0, 0.0))
    for batch in batches:
        check_masks(batch, on_host=True)
        x, mask = batch[view], mask_of(batch)
        mask = np.ones(len(jax.tree.leaves(x)[0]), np.float32) if mask is None else mask
        found = jax.device_get(of_batch(complete, x, mask))
        for path, (products, rows) in found.items():
            totals[path] = (totals[path][0] + np.asarray(products, np.float64), totals[path][1] + float(rows))
    if any(not rows for _, rows in totals.values()):
        raise InputError("gram_matrices: expected at least one example, got none; is the split empty?")
    return {path: np.asarray(products / rows) for path, (products, rows) in totals.items()}


def _read(outputs: Mapping[str, Any], x: Any, tap: str | Callable[[Any, Any], Any]) -> jax.Array:
    if callable(tap):
        return tap(outputs, x)
    if tap not in outputs:
        raise unknown("output", tap, outputs)
    return outputs[tap]


def _sums(path: str, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of x xᵀ over the rows that count, and how many these are."""
    if x.ndim < 2 or x.shape[0] != mask.shape[0]:
        raise InputError(f"what {path!r} sees must be [B, ..., D], a row or more an example; got {x.shape}")
    rows = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(x.shape[0], -1, x.shape[-1])
    rows = jnp.where((mask > 0)[:, None, None], rows, 0).reshape(-1, x.shape[-1])
    count = jnp.sum(mask > 0) * (rows.shape[0] // x.shape[0])
    return jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST), count
