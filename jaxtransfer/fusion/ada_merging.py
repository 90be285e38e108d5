"""AdaMerging: the coefficients of task vectors, learned from unlabelled examples alone."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import losses
from jaxtransfer.errors import InputError
from jaxtransfer.forward import Forward
from jaxtransfer.fusion.averages import average
from jaxtransfer.fusion.leaves import as_list, check_alike, check_finite, check_number, is_mixed, wide
from jaxtransfer.model import FROZEN, Model, given, state_of
from jaxtransfer.objective import Objective
from jaxtransfer.parts.masking import mask_of
from jaxtransfer.parts.outputs import pick
from jaxtransfer.parts.rows import kept
from jaxtransfer.weights import Frozen


class Merger:
    """A model of which only the coefficients of task vectors train; made by `merger`.

    Attributes:
      model: the model; its parameters are `{"coefficients": ...}`, N for each leaf or N alone.
    """

    def __init__(self, model: Model, base: Any, vectors: Any, clamp: bool):
        self.model = model
        self._base, self._vectors, self._clamp = base, vectors, clamp

    def variables(self, state: Any) -> dict[str, Any]:
        """Returns the merged network's own variables, from a training state in which its coefficients were learned.

        Args:
          state: `fitted.state`.
        """
        params = _weights(state.params[self.model.name], self._base, self._vectors, self._clamp)
        return {"params": params, **state.state.get(self.model.name, {})}


def merger(
    model: Model,
    base: Any,
    models: Sequence[Any],
    *,
    by_leaf: bool = True,
    start: float = 0.3,
    clamp: bool = True,
    name: str = "merged",
) -> Merger:
    """Returns w₀ + Σᵢ λᵢ (wᵢ − w₀) as a model whose only parameters are the coefficients λ.

    w₀ and the task vectors are frozen: an argument of the compiled step, neither copied into it nor saved with a run.
    The running state begins as the mean of the models'; batch norm runs in training on the statistics of the batch.

    Args:
      model: the architecture.
      base: w₀, variables `{"params": ..., **state}`.
      models: wᵢ, fine-tuned from it.
      by_leaf: a coefficient for each leaf and model (layer-wise AdaMerging), or one for each model (task-wise).
      start: of all coefficients.
      clamp: hold the coefficients in [0, 1], as the released code does.
      name: of the merged model.

    Returns:
      The merged model, and what gives its weights back as variables of `model`.

    Raises:
      InputError: for models of different architectures, or with weights that are not finite.
    """
    check_number(start, "start")
    check_alike([base, *as_list(models)], names=("the base",))
    check_finite([base], names=("the base",))
    if "params" not in base or model.shares is not None:
        raise InputError("merger takes variables {'params': ..., **state} of a model of its own weights")
    state = state_of(average(models))

    def stacked(leaf, *tuned):
        # what isn't mixed has no vectors, but a place in the tree
        return jnp.asarray(np.stack([wide(one) - wide(leaf) for one in tuned])) if is_mixed(leaf) else jnp.zeros(0)

    vectors = jax.tree.map(stacked, base["params"], *(one["params"] for one in models))
    frozen: dict[str, Any] = {"base": Frozen(base["params"]), "vectors": Frozen(vectors)}
    frozen |= {"model": dict(model.frozen)} if model.frozen else {}

    def init(key, inputs):
        first = jnp.full(len(models), start, jnp.float32)
        return {
            "params": {"coefficients": jax.tree.map(lambda _: first, base["params"]) if by_leaf else first},
            **jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state),
        }

    def apply(variables, inputs, *, train, key, axis=None):
        held = variables[FROZEN]
        own = {"params": _weights(variables["params"], held["base"], held["vectors"], clamp), **state_of(variables)}
        own |= {FROZEN: held["model"]} if model.frozen else {}
        return model.apply(own, inputs, train=train, key=key, **given(axis=axis))

    made = Model(init, apply, name, stages=("coefficients",), frozen=frozen, shares_key=model.shares_key)
    return Merger(made, base["params"], vectors, clamp)


def ada_merging(model: Model, *, output: str = "logits", view: str = "image") -> Objective:
    """Builds (1/n) Σᵢ H(p(xᵢ; λ)), the entropy of what a merged model predicts, for unlabelled test examples.

    (Yang et al. 2024, arXiv:2310.02575: AdaMerging.) The sum over tasks is the sum of terms:

        merger = jt.fusion.merger(model, base, experts)
        objective = sum(jt.fusion.ada_merging(merger.model).on(name) for name in ("mnist", "usps"))
        fitted = jt.fit(objective, optax.adam(1e-3), jt.data.zipped(mnist=..., usps=...), steps=500)
        variables = merger.variables(fitted.state)

    AdaMerging++ is the same of trimmed experts that agree: `jt.fusion.agreeing(base, experts)` in their place.

    Args:
      model: `merger(...).model`.
      output: the model's output that holds the logits [B, C]: a task's own head.
      view: the entry of the batch that it sees.

    Returns:
      An objective with the metric `ada_merging`.

    Raises:
      InputError: at init, for an output that does not exist.
    """
    forward = Forward.of(model, view)

    def loss(outputs, params, state, batch, ctx):
        mask = mask_of(batch)
        logits = kept(pick(f"model {forward.model.name!r}", outputs[forward], output), mask)
        value = ctx.mean(losses.entropy(logits), mask)
        return value.value, state, {"ada_merging": value}

    return Objective("ada_merging", (forward,), loss, pooled=True)


def _weights(params: Any, base: Any, vectors: Any, clamp: bool) -> Any:
    """Returns w₀ + Σᵢ λᵢ τᵢ in the types of w₀."""
    coefficients = params["coefficients"]
    if not isinstance(coefficients, dict):
        coefficients = jax.tree.map(lambda _: coefficients, base)

    def mixed(leaf, stack, shares):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        shares = (jnp.clip(shares, 0, 1) if clamp else shares).astype(stack.dtype)
        return (leaf.astype(stack.dtype) + jnp.tensordot(shares, stack, axes=1)).astype(leaf.dtype)

    return jax.tree.map(mixed, base, vectors, coefficients)
