"""Co-training: two networks, each on a view of its own, that label for each other what nobody labelled."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtransfer.adaptation.domain import Domain
from jaxtransfer.adaptation.self_training.guesses import (
    check_same_classes,
    check_several_models,
    check_threshold,
    guessed,
    logits_of,
    taught,
)
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective
from jaxtransfer.objectives import classification
from jaxtransfer.parts.masking import mask_of
from jaxtransfer.parts.rows import ranked


def co_training(
    models: Sequence[Model],
    *,
    views: tuple[str, str] = ("image", "image2"),
    threshold: float = 0.95,
    per_class: int | Sequence[int] | None = None,
    weight: float | optax.Schedule = 1.0,
    output: str = "logits",
    label: str = "label",
    source: str = "source",
    target: str = "target",
) -> Objective:
    """Builds Σ_k [CE(y, f_k(x_k)) + weight · (1/B) Σ 1[max p_j(u_j) ≥ τ] CE(argmax p_j(u_j), f_k(u_k))], j the other.

    (Blum, Mitchell 1998, "Combining labeled and unlabeled data with co-training", COLT.) Labelled examples x come from
    the source, unlabelled ones u from the target, and each network sees its own view of both: two kinds of data of one
    thing (words of a page and words of the links to it), two halves of the columns, or two augmentations. What one is
    sure of teaches the other; guesses are not differentiated. The paper moves, for each class c, the n_c examples of
    which a network is surest from a small pool to the labelled ones, where they stay: that is `per_class` with
    threshold 0, the batch being the pool, whose labels are guessed anew in each step.

        objective = jt.co_training([words, links], views=("words", "links"), threshold=0, per_class=(1, 3))
        batches = jt.data.zipped(source=jt.data.pipeline(labelled, 32), target=jt.data.pipeline(all_of_them, 128))

    Args:
      models: two, under different names: `model.named("b")`.
      views: what each of them sees, an entry of the source's and of the target's batch; one entry twice is allowed,
        for networks that differ themselves.
      threshold: τ in [0, 1]; the mean is over all unlabelled examples, those that are left out count as 0.
      per_class: n_c, how many of the global batch a network teaches at most of each class, those that it is surest of:
        one number, or one for each class; None for all above the threshold.
      weight: of what they teach each other, a number or a schedule.
      output: the models' output that holds the logits [B, C].
      label: the entry of the source's batch that holds the labels.
      source: the entry of the batch that holds the labelled examples, with `mask` where some are left out.
      target: the entry that holds the unlabelled ones.

    Returns:
      An objective over both. Metrics for each: `<source>/<name>`, `<source>/<name>/accuracy` on the labels;
      `<name>/co_training`, `<name>/co_training/kept`, the share of examples that it is taught, and
      `<name>/co_training/agreement`, how often both guess one class.

    Raises:
      InputError: for another number of models or views, two models of one name, a threshold or number out of range; at
        init, for a batch without these entries and for models of different classes.
    """
    check_several_models("co-training", models, 2)
    check_threshold(threshold)
    if len(views) != 2 or isinstance(views, str):
        raise InputError(f"co-training takes a view for each of its two models, ('image', 'image2'); got {views!r}")
    most = None if per_class is None else np.asarray(per_class)
    if most is not None and (most.ndim > 1 or not np.issubdtype(most.dtype, np.integer) or np.any(most < 1)):
        raise InputError(f"per_class must be a number of examples, 1 or more, or one for each class; got {per_class!r}")
    seen = {model: Domain.of(model, target, view) for model, view in zip(models, views, strict=True)}

    def teach(student: Model, teacher: Model) -> Objective:
        mine, theirs, name = seen[student], seen[teacher], f"{student.name}/co_training"

        def loss(outputs, params, state, batch, ctx):
            mask = mask_of(mine.part(batch))
            guess, logits = guessed(theirs, outputs, output, batch), logits_of(mine, outputs, output, batch)
            keep = guess.sure >= threshold
            if most is not None:
                counted = guess.sure > 0 if mask is None else mask > 0
                place = ranked(jnp.where(counted, -guess.sure, jnp.inf), ctx, guess.label)
                keep &= place < jnp.broadcast_to(jnp.asarray(most, jnp.int32), logits.shape[-1:])[guess.label]
            value, metrics = taught(name, logits, guess.label, keep, mask, ctx)
            same = jnp.argmax(jax.lax.stop_gradient(logits), -1) == guess.label
            metrics[f"{name}/agreement"] = ctx.mean(same.astype(logits.dtype), mask)
            return value.value, state, metrics

        def check(outputs, batch):
            classes = check_same_classes(list(seen.values()), outputs, output)
            if most is not None and most.ndim and len(most) != classes:
                raise InputError(f"per_class has {len(most)} numbers, the models {classes} classes; give one for each")

        forwards = (mine.forward, theirs.forward)
        return Objective(name, forwards, loss, check=check, pooled=True, peers=(teacher,))

    labelled = [
        classification(model, view=view, output=output, label=label).named(model.name).on(source)
        for model, view in zip(models, views, strict=True)
    ]
    one, two = models
    return labelled[0] + labelled[1] + weight * teach(one, two) + weight * teach(two, one)
