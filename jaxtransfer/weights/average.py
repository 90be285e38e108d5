"""Moving averages of the weights that train, part of the state of a run."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.model import Model

Tree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Average:
    """A model whose weights are the moving average of those that another trains; made by `ema`.

    It lives in the state under `name`: the averaged weights as `"params"`, in at least float32 whatever the model's
    own type is, its batch statistics beside them.
    """

    model: Model
    decay: Callable[[Any], Any]
    name: str
    warm_up: bool = False

    trained = False
    inference = False
    handles = ()

    @property
    def held(self) -> "Average":
        """Itself."""
        return self

    @property
    def entries(self) -> tuple[str, ...]:
        """The names of what it keeps in the state."""
        return (self.name, f"{self.name}_moves") if self.warm_up else (self.name,)

    def example(self, key: Any, inputs: Any) -> Tree:
        """Returns fresh variables of the model."""
        return self.model.family[-1].init(key, inputs)  # of a twin the whole, by the model that it shares with

    def init(self, params: Tree, state: Tree, *, moves: int = 0) -> dict[str, Tree]:
        """Returns its entries of the state as the model begins, from all models' weights and statistics.

        Args:
          params: by model name.
          state: by model name.
          moves: how many updates a warm-up takes as made.

        Raises:
          InputError: where the model is not among them.
        """
        if self.model.name not in params:
            raise InputError(
                f"{self.name!r} is a moving average of model {self.model.name!r}, which nothing here trains"
            )
        statistics = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), dict(state.get(self.model.name, {})))
        wide = jax.tree.map(lambda leaf: jnp.array(leaf, _wide(leaf), copy=True), self.model.whole(params))
        counted = {f"{self.name}_moves": {"count": jnp.asarray(moves, jnp.int32)}} if self.warm_up else {}
        return {self.name: {"params": wide, **statistics}, **counted}

    def advance(self, params: Tree, state: Tree, step: Any, *, runs: bool = True) -> dict[str, Tree]:
        """Returns its entries of the state once it has followed what `step` updates have made of the model.

        Before the first update they stay: then the average is the model as it begins, or the one that was given. Where
        nothing `runs` on it, its running statistics are averages of the model's.
        """
        step, own, moves = jnp.asarray(step), state[self.name], {}
        decay = self.decay(step)
        if self.warm_up:
            count = state[f"{self.name}_moves"]["count"]
            decay = jnp.minimum(1 - 1 / (jnp.maximum(step, count + 1) + 1), decay)
            moves = {f"{self.name}_moves": {"count": count + (step > 0).astype(count.dtype)}}

        def mix(old, new):
            if jnp.issubdtype(old.dtype, jnp.inexact):
                new = new.astype(old.dtype)
                new = (new + jnp.asarray(decay, old.dtype) * (old - new)).astype(old.dtype)
            return jnp.where(step > 0, new, old)

        new = {"params": self.model.whole(params), **({} if runs else state.get(self.model.name, {}))}
        return {self.name: {**own, **{kind: jax.tree.map(mix, own[kind], new[kind]) for kind in new}}, **moves}

    def variables(self, params: Tree, state: Tree) -> Tree:
        """Returns what the model runs on: the average in the types of the model's own weights, where they are there."""
        own = state[self.name]
        if self.model.name not in params:
            return own
        narrow = jax.tree.map(lambda old, new: old.astype(new.dtype), own["params"], self.model.whole(params))
        return {**own, "params": narrow}

    def read(self, params: Tree, state: Tree, frozen: Callable[[Any], Tree]) -> Tree:
        """Returns its `variables`, cut off from differentiation."""
        return jax.lax.stop_gradient(self.variables(params, state))

    def keep(self, state: Tree, new: Tree) -> Tree:
        """Returns the state with the new running state of the average."""
        return {**state, self.name: {**state[self.name], **new}}


def _wide(leaf: Any) -> Any:
    """The type of an average: a step of (1 − decay) · (w − w̄) is less than half precision can add."""
    dtype = jnp.result_type(leaf)
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.inexact) else dtype


def ema(model: Model, decay: Any = 0.999, *, name: str = "", warm_up: bool = False) -> Average:
    """Returns the model with an exponential moving average of its weights: mean teachers, momentum encoders, targets.

    w̄ ← decay · w̄ + (1 − decay) · w after each update (at the start of the next step; under gradient accumulation by
    `optax.MultiSteps` an update takes several batches). At first w̄ is w, whatever weights the run starts from, or the
    average that `state=` gives, which is kept. It is held in at least float32 and applied in the type of w. It is never
    differentiated. Where a term runs it in training it does so in training mode with batch statistics of its own, in
    evaluation with their running means; it is part of the state, so it is saved and restored with it.

    Args:
      model: the model that trains.
      decay: in [0, 1], or a schedule of the step.
      name: its name in the state; by default the model's with `_ema`. Terms that share an average share the object.
      warm_up: whether to begin as the plain mean of the weights: at the n-th update the decay is
        min(1 − 1/(n + 1), decay). n is kept beside the average, as `<name>_moves`: a later run that is given both goes
        on from there, and one that is given the average alone begins without a warm-up.

    Returns:
      What takes the place of a model where an objective takes a teacher or a target. `jt.averaged(model)` keeps the
      average without running it, and `jt.evaluate(jt.classification(jt.ema(model)), state, ...)` evaluates what a state
      holds, whatever the decay.

    Raises:
      InputError: for a number outside of [0, 1].
    """
    if not callable(decay) and not 0 <= decay <= 1:
        raise InputError(f"the decay of a moving average is in [0, 1]; got {decay}")
    chosen = decay if callable(decay) else lambda step: decay
    return Average(model, chosen, name or f"{model.name}_ema", warm_up)
