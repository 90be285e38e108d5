"""SimpleShot: the nearest centroid of centred, normalised features."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.errors import InputError
from jaxtransfer.forward import Forward, Frozen, FrozenModel
from jaxtransfer.meta.embed import Embedded, class_means, few_shot, named_output, per_task, run_only
from jaxtransfer.meta.prototypical import squared_euclidean, unit
from jaxtransfer.model import Model
from jaxtransfer.objective import Batch, Context, Objective
from jaxtransfer.parts.masking import mask_of


def simpleshot(
    model: Model | FrozenModel,
    *,
    ways: int,
    center: jax.Array | np.ndarray | None = None,
    normalize: bool = True,
    output: str = "features",
    view: str = "image",
) -> Objective:
    """Builds the cross-entropy of queries with logits -‖z - c_k‖², z = (f(x) - μ) / ‖f(x) - μ‖, c_k the class means.

    SimpleShot (Wang et al. 2019, arXiv:1911.04623), over an encoder pretrained by ordinary `jt.classification`. Its
    three forms are CL2N: `center=mean_features(...)`; L2N: no center; UN: no center and `normalize=False`. It is to be
    evaluated (`jt.evaluate_episodes`); training by it is training of a prototypical network on such features, the
    center fixed. Batches, batch norm and absent classes are as for `prototypical`. Metrics: `simpleshot`, `accuracy`.

    Args:
      model: what gives `output` [B, ...], flattened to [B, D].
      ways: number of classes, N.
      center: μ [D], the mean feature of the base classes; see `mean_features`. An argument of the compiled step.
      normalize: whether features are divided by their length.
      output: name of the model's output.
      view: key of the inputs in the support and the query.

    Returns:
      An objective over the model's parameters.

    Raises:
      InputError: for `ways` below 1; at init, for a center of another length, a label outside [0, ways), an unknown
        output, and a batch that is no episode.
    """
    handle = None if center is None else Frozen(jnp.asarray(center))

    def head(embedded: Embedded, params, state, ctx: Context):
        mean = None if handle is None else ctx.read(handle)

        def transform(features):
            if mean is not None:
                if mean.shape != features.shape[-1:]:
                    raise InputError(f"center must be of shape {features.shape[-1:]}, a feature's; got {mean.shape}")
                features = features - mean.astype(features.dtype)[None]
            return unit(features) if normalize else features

        def classify(support, targets, query):
            return -squared_euclidean(transform(query), class_means(transform(support), targets))

        return per_task(classify)(embedded, params, state, ctx)

    frozen = () if handle is None else (handle,)
    return few_shot("simpleshot", model, head, ways=ways, output=output, view=view, frozen=frozen)


def mean_features(
    model: Model,
    params: Any,
    state: Any,
    batches: Iterable[Batch],
    *,
    output: str = "features",
    view: str = "image",
) -> jax.Array:
    """Computes the mean feature of a data set in inference mode, the `center` of `simpleshot`.

    Args:
      model: what gives `output` [B, ...], flattened to [B, D].
      params: a dict by model name.
      state: a dict by model name.
      batches: ordinary batches with the inputs and, where there is padding, `mask` [B]; finitely many.
      output: name of the model's output.
      view: key of the inputs.

    Returns:
      [D], float32 or wider; the sum over the batches is taken in float64.

    Raises:
      InputError: where no example counts, and for an unknown output or view.
    """
    forward = Forward.of(model, view)
    encoder = run_only(forward)

    @jax.jit
    def totals(params, state, batch):
        outputs, _ = encoder.run(params, state, batch, Context(train=False))
        features = named_output(outputs[forward], output, model)
        features = features.reshape(features.shape[0], -1).astype(jnp.promote_types(features.dtype, jnp.float32))
        mask = mask_of(batch)
        kept = jnp.ones(features.shape[:1], bool) if mask is None else mask > 0
        return jnp.sum(jnp.where(kept[:, None], features, 0), axis=0), jnp.sum(kept)

    total, count, dtype = 0.0, 0, None
    for batch in batches:
        part, examples = totals(params, state, {key: batch[key] for key in (view, "mask") if key in batch})
        total, count, dtype = total + np.asarray(part, np.float64), count + int(examples), part.dtype
    if not count:
        raise InputError("mean_features: expected at least one example that counts, got none")
    return jnp.asarray(total / count, dtype)
