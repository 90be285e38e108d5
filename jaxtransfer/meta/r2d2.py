"""R2-D2: ridge regression on the support in closed form, differentiated through."""

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.forward import FrozenModel
from jaxtransfer.meta.embed import Embedded, few_shot, per_task
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective


def ridge_weights(features: jax.Array, targets: jax.Array, strength: jax.Array | float) -> jax.Array:
    """Solves min_W ‖XW - Y‖² + λ‖W‖²: (XᵀX + λI)⁻¹XᵀY, or Xᵀ(XXᵀ + λI)⁻¹Y (Woodbury) where S < D.

    The system is n × n with n = min(S, D). λ is raised to n·ε·‖X‖²_F + ε², ε the precision of the type, where it is
    below: what keeps the Cholesky factor finite for identical examples and huge features.

    Args:
      features: X [S, D].
      targets: Y [S, N].
      strength: λ, a positive scalar.

    Returns:
      W [D, N], in at least float32, differentiable in all arguments.
    """
    dtype = jnp.promote_types(jnp.result_type(features, targets), jnp.float32)
    x, y = features.astype(dtype), targets.astype(dtype)
    by_examples = x.shape[0] < x.shape[1]
    gram = jnp.matmul(x, x.T, precision="highest") if by_examples else jnp.matmul(x.T, x, precision="highest")
    eps, size = float(jnp.finfo(dtype).eps), gram.shape[0]
    strength, least = jnp.asarray(strength, dtype), size * eps * jnp.trace(gram) + eps**2
    strength = jnp.where(strength < least, least, strength)  # not by `maximum`, whose derivative compares for equality
    factor = jax.scipy.linalg.cho_factor(gram + strength * jnp.eye(size, dtype=dtype))
    if by_examples:
        return jnp.matmul(x.T, jax.scipy.linalg.cho_solve(factor, y), precision="highest")
    return jax.scipy.linalg.cho_solve(factor, jnp.matmul(x.T, y, precision="highest"))


def r2d2(
    model: Model | FrozenModel,
    *,
    ways: int,
    strength: float = 1.0,
    scale: float = 1.0,
    bias: float = 0.0,
    output: str = "features",
    view: str = "image",
) -> Objective:
    """Builds the cross-entropy of queries with logits α·f(x)W + β, W the ridge regression of the support's labels.

    R2-D2 (Bertinetto et al. 2019, arXiv:1805.08136): W = argmin ‖XW - Y‖² + λ‖W‖², X the support features, Y their
    one-hot labels. λ, α and β are learned with the encoder, in `params["r2d2"]` as `log_lambda`, `scale` and `bias`,
    scalars; a softmax does not see β, which is there as in the paper. Batches, batch norm and absent classes are as
    for `prototypical`. Metrics: `r2d2`, `accuracy`.

    Args:
      model: what gives `output` [B, ...], flattened to [B, D].
      ways: number of classes, N.
      strength: the first λ, above 0.
      scale: the first α.
      bias: the first β.
      output: name of the model's output.
      view: key of the inputs in the support and the query.

    Returns:
      An objective over the model's parameters and those of the head.

    Raises:
      InputError: for `ways` below 1 or λ not above 0; at init, for a label outside [0, ways), an unknown output, and
        a batch that is no episode.
    """
    if not strength > 0:
        raise InputError(f"strength of the ridge regression must be above 0; got {strength}")

    def setup(key, batch):
        own = {"log_lambda": jnp.log(strength), "scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
        return {"r2d2": jax.tree.map(lambda x: x.astype(jnp.result_type(float)), own)}, {}

    def head(embedded: Embedded, params, state, ctx):
        own = params["r2d2"]

        def classify(support, targets, query):
            weights = ridge_weights(support, targets, jnp.exp(own["log_lambda"]))
            prediction = jnp.matmul(query, weights, precision="highest")
            return own["scale"].astype(query.dtype) * prediction + own["bias"].astype(query.dtype)

        return per_task(classify)(embedded, params, state, ctx)

    return few_shot("r2d2", model, head, ways=ways, output=output, view=view, setup=setup)
