"""What an objective runs: a model on a view of the batch, its weights trained, frozen, or a moving average."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.parts import Parts
from jaxtransfer.tree import check_arrays

Tree = Any


class Frozen:
    """A handle on a tree that is never trained: an anchor, a teacher's weights, a Fisher diagonal.

    The compiled step takes the tree as an argument of its own, so it is neither differentiated, nor donated, nor
    baked into the program. Handles on the same tree are equal: it travels once.
    """

    def __init__(self, tree: Tree):
        check_arrays(tree, "what is held fixed")
        self.tree = tree
        self.placed: dict[Any, Tree] = {}  # by placement: training and evaluation share what is on the devices

    def __eq__(self, other):
        return isinstance(other, Frozen) and self.tree is other.tree

    def __hash__(self):
        return id(self.tree)


@dataclasses.dataclass(frozen=True)
class FrozenModel:
    """A model with weights that do not train; made by `frozen`."""

    model: Model
    variables: Frozen


def frozen(model: Model, variables: Tree) -> FrozenModel:
    """Returns `model` with weights that do not train: a teacher, run in inference mode.

    Args:
      model: the model.
      variables: `{"params": ..., **state}`; or a training state, such as `fitted.state`, in which the model of this
        name was trained.

    Raises:
      InputError: for a training state without a model of that name.
    """
    if hasattr(variables, "params") and hasattr(variables, "state"):
        if model.name not in variables.params:
            raise InputError(f"no model {model.name!r} was trained in that state; it has {sorted(variables.params)}")
        variables = {"params": variables.params[model.name], **variables.state.get(model.name, {})}
    return FrozenModel(model, Frozen(variables))


@dataclasses.dataclass(frozen=True)
class Forward:
    """One run of a model on one view of the batch, or on several joined: then its outputs are a tuple, one per view.

    Attributes:
      model: the model.
      view: the path of the inputs in the batch.
      variables: its weights, where they are not the trained ones: a frozen tree, or a moving average.
      more: paths of further views of the same examples, which run together with the first: batch norm sees them all.
      parts: how the batch is split in training, where batch norm is to see parts of it alone.
    """

    model: Model
    view: tuple[str, ...] = ("image",)
    variables: "Frozen | Average | None" = None
    more: tuple[tuple[str, ...], ...] = ()
    parts: Parts | None = None

    @classmethod
    def of(cls, model: "Model | FrozenModel | Average", view: str | Sequence[str] = "image") -> "Forward":
        """Returns the forward of a trained, a frozen or an averaged model on `batch[view]`, or on several views."""
        (first, *more) = [view] if isinstance(view, str) else view
        views = {"view": (first,), "more": tuple((name,) for name in more)}
        if isinstance(model, FrozenModel):
            return cls(model.model, variables=model.variables, **views)
        if isinstance(model, Average):
            return cls(model.model, variables=model, **views)
        return cls(model, **views)

    @property
    def views(self) -> tuple[tuple[str, ...], ...]:
        """The paths of all its views."""
        return (self.view, *self.more)

    def within(self, key: str) -> "Forward":
        """Returns the same forward on `batch[key]`."""
        moved = [(key, *view) for view in self.views]
        return dataclasses.replace(self, view=moved[0], more=tuple(moved[1:]))

    def join(self, inputs: Sequence[Any]) -> Any:
        """Returns the inputs of all views as one batch, views of one example together: no row changes its device."""
        if len(inputs) == 1:
            return inputs[0]
        return jax.tree.map(lambda *x: jnp.stack(x, 1).reshape(-1, *x[0].shape[1:]), *inputs)

    def split(self, outputs: Any) -> Any:
        """Returns what the joined batch gave as a tuple, an entry for each view; that itself where there is one."""
        count = len(self.views)
        if count == 1:
            return outputs
        apart = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]), outputs)
        return tuple(jax.tree.map(lambda x, n=number: x[:, n], apart) for number in range(count))

    def apply(self, variables: Tree, inputs: Any, *, train: bool, key: Any, **how: Any) -> tuple[Any, Tree]:
        """Runs the model; in training on each part of the batch by itself, where it has `parts`."""
        if self.parts is None or not train:
            return self.model.apply(variables, inputs, train=train, key=key, **how)
        return self.parts.apply(self.model.apply, variables, inputs, key=key, **how)

    @property
    def trained(self) -> bool:
        """Whether it runs on the weights that train."""
        return self.variables is None


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

    @property
    def entries(self) -> tuple[str, ...]:
        """The names of what it keeps in the state."""
        return (self.name, f"{self.name}_moves") if self.warm_up else (self.name,)

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
        wide = jax.tree.map(lambda leaf: jnp.array(leaf, _wide(leaf), copy=True), params[self.model.name])
        counted = {f"{self.name}_moves": {"count": jnp.asarray(moves, jnp.int32)}} if self.warm_up else {}
        return {self.name: {"params": wide, **statistics}, **counted}

    def advance(self, params: Tree, state: Tree, step: Any) -> dict[str, Tree]:
        """Returns its entries of the state once it has followed what `step` updates have made of the model.

        Before the first update they stay: then the average is the model as it begins, or the one that was given.
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

        return {self.name: {**own, "params": jax.tree.map(mix, own["params"], params[self.model.name])}, **moves}

    def variables(self, params: Tree, state: Tree) -> Tree:
        """Returns what the model runs on: the average in the types of the model's own weights, where they are there."""
        own = state[self.name]
        if self.model.name not in params:
            return own
        narrow = jax.tree.map(lambda old, new: old.astype(new.dtype), own["params"], params[self.model.name])
        return {**own, "params": narrow}


def _wide(leaf: Any) -> Any:
    """The type of an average: a step of (1 − decay) · (w − w̄) is less than half precision can add."""
    dtype = jnp.result_type(leaf)
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.inexact) else dtype


def ema(model: Model, decay: Any = 0.999, *, name: str = "", warm_up: bool = False) -> Average:
    """Returns the model with an exponential moving average of its weights: mean teachers, momentum encoders, targets.

    w̄ ← decay · w̄ + (1 − decay) · w after each update (at the start of the next step; under gradient accumulation by
    `optax.MultiSteps` an update takes several batches). At first w̄ is w, whatever weights the run starts from, or the
    average that `state=` gives, which is kept. It is held in at least float32 and applied in the type of w. It is never
    differentiated. In training it runs in training mode with batch statistics of its own, in evaluation with their
    running means; it is part of the state, so it is saved and restored with it.

    Args:
      model: the model that trains.
      decay: in [0, 1], or a schedule of the step.
      name: its name in the state; by default the model's with `_ema`. Terms that share an average share the object.
      warm_up: whether to begin as the plain mean of the weights: at the n-th update the decay is
        min(1 − 1/(n + 1), decay). n is kept beside the average, as `<name>_moves`: a later run that is given both goes
        on from there, and one that is given the average alone begins without a warm-up.

    Returns:
      What takes the place of a model where an objective takes a teacher or a target.

    Raises:
      InputError: for a number outside of [0, 1].
    """
    if not callable(decay) and not 0 <= decay <= 1:
        raise InputError(f"the decay of a moving average is in [0, 1]; got {decay}")
    chosen = decay if callable(decay) else lambda step: decay
    return Average(model, chosen, name or f"{model.name}_ema", warm_up)
