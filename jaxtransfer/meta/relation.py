"""Relation networks: a learned comparison of query and class."""

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.forward import Forward, FrozenModel
from jaxtransfer.meta.embed import Embedded, LossFn, few_shot, named_output
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective, fresh, view_of
from jaxtransfer.parts.outputs import shapes_of


def score_error(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Computes (1/N) Σ_c (σ(logit_c) - 1{c = y})², the squared error of relation scores.

    Args:
      logits: [B, N].
      labels: integers [B] in [0, N).

    Returns:
      [B], in at least float32; NaN for a label outside [0, N).
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    given = labels[:, None] == jnp.arange(logits.shape[-1])[None]
    values = jnp.mean((jax.nn.sigmoid(logits) - given) ** 2, axis=-1)
    return jnp.where(jnp.any(given, axis=-1), values, jnp.nan)


def relation(
    model: Model | FrozenModel,
    relation_module: Model,
    *,
    ways: int,
    loss: LossFn = score_error,
    output: str = "stage4",
    view: str = "image",
) -> Objective:
    """Builds the squared error of scores σ(g([Σ_{i: y_i = c} f(x_i), f(x)])) to 1 for the query's class and 0 else.

    Relation networks (Sung et al. 2018, arXiv:1711.06025): the support maps of a class, summed over its shots, and the
    query's map are joined along channels, and g compares them. All T·Q·N pairs are one batch of g, by whose statistics
    its batch norm normalises in training; pairs with a masked query or an absent class have zeros in their place there.
    Batches and absent classes are as for `prototypical`. Metrics: `relation`, `accuracy`.

    Args:
      model: f, what gives `output` [B, ..., C]: maps [B, h, w, C], or vectors.
      relation_module: g, a model of pairs [B, ..., 2C] whose `logits` [B, 1] are the scores before the sigmoid, such
        as `jt.models.relation_net()`; its name differs from the model's.
      ways: number of classes, N.
      loss: `loss(logits [B, N], labels [B]) -> [B]`: `score_error` as in the paper, or `jt.losses.cross_entropy`.
      output: name of the model's output; the paper takes maps after two poolings, `"stage2"` of `jt.models.conv4`.
      view: key of the inputs in the support and the query.

    Returns:
      An objective over the parameters of both models.

    Raises:
      InputError: for `ways` below 1 and for models of one name; at init, for a label outside [0, ways), an unknown
        output, `logits` of another shape, and a batch that is no episode.
    """

    def setup(key, batch):
        shapes = shapes_of(Forward.of(model, view), {view: view_of(batch, ("support", view))[0]})
        shape = named_output(shapes, output, model)
        dtype = jnp.promote_types(shape.dtype, jnp.float32)
        pairs = jnp.zeros((ways, *shape.shape[1:-1], 2 * shape.shape[-1]), dtype)
        params, state = fresh(relation_module, key, pairs)
        return {relation_module.name: params}, {relation_module.name: state}

    def head(embedded: Embedded, params, state, ctx):
        pairs = _pairs(embedded)
        inputs = pairs.reshape(-1, *pairs.shape[3:])
        outputs, state = ctx.run(relation_module, params, state, inputs, view="pair")
        logits = named_output(outputs, "logits", relation_module)
        if logits.shape != (len(inputs), 1):
            raise InputError(f"model {relation_module.name!r} must give logits [pairs, 1]; got {logits.shape}")
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return logits.reshape(pairs.shape[:3]), state

    return few_shot(
        "relation",
        model,
        head,
        ways=ways,
        output=output,
        view=view,
        loss=loss,
        setup=setup,
        models=(relation_module,),
    )


def _pairs(embedded: Embedded) -> jax.Array:
    """Returns [T, Q, N, ..., 2C]: each class's summed support map beside each query's map."""
    support, targets, query = embedded
    summed = jnp.einsum("tsn,ts...->tn...", targets, support, precision="highest")
    shape = (*query.shape[:2], *summed.shape[1:])
    summed, query = jnp.broadcast_to(summed[:, None], shape), jnp.broadcast_to(query[:, :, None], shape)
    return jnp.concatenate([summed, query], axis=-1)
