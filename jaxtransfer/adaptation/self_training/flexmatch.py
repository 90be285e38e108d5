"""FlexMatch: FixMatch with a threshold for each class, lower for those that the model has hardly learned."""

import jax
import jax.numpy as jnp

from jaxtransfer.adaptation.domain import Domain
from jaxtransfer.adaptation.self_training.guesses import (
    check_index,
    check_logits,
    check_threshold,
    guessed,
    if_numbered,
    logits_of,
    taught,
)
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective, view_of
from jaxtransfer.parts.masking import mask_of
from jaxtransfer.parts.rows import gathered


def flexmatch(
    model: Model,
    *,
    examples: int,
    threshold: float = 0.95,
    warm_up: bool = True,
    output: str = "logits",
    view: str = "image",
    strong: str = "image2",
    target: str = "target",
) -> Objective:
    """Builds FixMatch with thresholds τ_c = τ · β_c / (2 − β_c) that follow what is learned (Zhang et al. 2021).

    arXiv:2110.08263. The state holds each example's last label that was guessed above τ, −1 before there is one. With
    σ_c of them of class c, and n₋₁ without, β_c = σ_c / max(max_c σ_c, n₋₁), or without n₋₁ where there is no
    warm-up. As released: counts are those before the batch, and what enters them is above the fixed τ. The batch holds
    each example's number as `index`:
    `dataset.with_columns({"index": np.arange(len(dataset))})`, one out of range makes the loss NaN. In evaluation the
    labels stay.

    Args:
      model: what trains, and guesses.
      examples: N, how many examples the target has; `index` is in [0, N).
      threshold: τ in [0, 1].
      warm_up: whether thresholds first rise with the share of examples that have a label; the released code of the
        Transfer-Learning-Library has none by default, the paper and TorchSSL do.
      output: the model's output that holds the logits [B, C].
      view: the entry of the target's batch with the weak view.
      strong: the entry with the strong view.
      target: the entry of the batch that holds the target's, with `mask` where examples are left out.

    Returns:
      An objective with the metrics `flexmatch`, `flexmatch/kept`, the share above its class's threshold, and
      `flexmatch/labelled`, the share of all examples that have a label.

    Raises:
      InputError: for a threshold out of range, and no examples; at init, for a batch without the target, one of its
        views or `index`, and for an index out of range.
    """
    check_threshold(threshold)
    if examples < 1:
        raise InputError(f"flexmatch: examples must be at least 1, the size of the target; got {examples}")
    weak, hard = Domain.of(model, target, view), Domain.of(model, target, strong)
    name = f"{model.name}_{target}_flexmatch"

    def setup(key, batch):
        return {}, {name: {"label": jnp.full(examples, -1, jnp.int32)}}

    def loss(outputs, params, state, batch, ctx):
        part, memory = weak.part(batch), state[name]["label"]
        guess = guessed(weak, outputs, output, batch)
        logits, mask = logits_of(hard, outputs, output, batch), mask_of(part)
        learned = _learned(memory, logits.shape[-1], warm_up)
        keep = guess.sure >= threshold * (learned / (2 - learned))[guess.label]
        value, metrics = taught("flexmatch", logits, guess.label, keep, mask, ctx)
        labelled = jnp.sum(memory >= 0).astype(logits.dtype)
        metrics["flexmatch/labelled"] = ctx.mean(jnp.broadcast_to(labelled / examples, keep.shape), None)
        if not ctx.train:
            return value.value, state, metrics
        found = {"index": view_of(part, ("index",)), "label": guess.label, "sure": guess.sure}
        rows, counted = gathered(found, part, ctx)
        value = value._replace(total=if_numbered(value.total, rows["index"], counted, examples))
        metrics["flexmatch"] = value
        place = jnp.where((rows["sure"] >= threshold) & (counted > 0), rows["index"], examples)
        label = memory.at[place].set(rows["label"], mode="drop")
        return value.value, {**state, name: {"label": label}}, metrics

    def check(outputs, batch):
        check_logits(weak, outputs, output)
        check_index("flexmatch", weak.part(batch), target, examples)

    return Objective("flexmatch", (weak.forward, hard.forward), loss, setup=setup, check=check, pooled=True)


def _learned(memory: jax.Array, classes: int, warm_up: bool) -> jax.Array:
    """Returns β [C], how much is learned of each class: its share of the guesses of the class that has most."""
    counts = jnp.bincount(jnp.where(memory >= 0, memory, classes), length=classes + 1)
    most = jnp.max(counts if warm_up else counts[:classes])
    return counts[:classes] / jnp.maximum(most, 1)
