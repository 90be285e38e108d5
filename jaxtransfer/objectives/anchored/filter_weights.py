"""How much each filter of a pretrained network matters for the target: the attention of DELTA."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import losses, tree
from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import check_temperature
from jaxtransfer.model import Model
from jaxtransfer.objective import Batch


def filter_weights(
    model: Model,
    variables: Any,
    batches: Iterable[Batch],
    *,
    filters: Mapping[str, str],
    temperature: float = 1.0,
    axis: int = -1,
) -> dict[str, np.ndarray]:
    """Returns w_c = softmax_c((L(filter c switched off) − L) / temperature), the channel attention of DELTA.

    (Li et al. 2019, arXiv:1901.09229, equation 6; the authors' code divides by 5.) L is the mean cross-entropy over
    the batches, in inference mode; a filter is switched off by zeros in its kernel. The model needs a head that knows
    the target's classes: fit one on the frozen features first (`jt.methods.linear_probe`).

    Args:
      model: the network.
      variables: `{"params": ..., **state}`, pretrained weights under a head that knows the target.
      batches: of the target's training set, `jt.data.eval_batches(train, 64)` say; each filter runs over all of them.
      filters: by tap, the path of the kernel whose filters are the tap's channels: `{"stage3":
        "stage3_block9/conv2/kernel"}`.
      temperature: of the softmax.
      axis: of the kernel's filters; the last one in Flax.

    Returns:
      By tap, float32 [C], of sum 1: `weights` of `jt.delta`.

    Raises:
      InputError: for a path that isn't a parameter, a temperature that isn't positive, no batch.
    """
    check_temperature(temperature)
    leaves = tree.leaves_by_path(variables["params"])
    for path in filters.values():
        if path not in leaves:
            close = [one for one in leaves if one.endswith("kernel")]
            raise InputError(f"no parameter of model {model.name!r} is called {path!r}; kernels are {close[:40]}")
    known = list(batches)
    if not known:
        raise InputError("filter_weights needs a batch; got none")
    variables = jax.device_put(model.complete(variables))

    @jax.jit
    def total(variables, batch):
        outputs, _ = model.apply(variables, batch["image"], train=False, key=None)
        values = losses.cross_entropy(outputs["logits"], batch["label"])
        mask = batch.get("mask", jnp.ones(values.shape))
        return jnp.sum(jnp.where(mask > 0, values, 0) * mask), jnp.sum(mask)

    def mean(variables) -> float:
        totals = [jax.device_get(total(variables, batch)) for batch in known]
        return sum(float(value) for value, _ in totals) / sum(float(count) for _, count in totals)

    base, found = mean(variables), {}
    for tap, path in filters.items():
        kernel = jnp.asarray(leaves[path])
        increases = []
        for channel in range(kernel.shape[axis]):
            own = jnp.arange(kernel.shape[axis]) == channel
            shape = [1] * kernel.ndim
            shape[axis] = -1
            off = jnp.where(own.reshape(shape), 0, kernel)
            params = tree.nested({**leaves, path: off})
            increases.append(mean({**variables, "params": params}) - base)
        scaled = np.array(increases) / temperature
        powers = np.exp(scaled - scaled.max())
        found[tap] = (powers / powers.sum()).astype(np.float32)
    return found
