"""A base whose weights stay: models that read them and have, of their own, what trains."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.model import FROZEN, Model, Outputs, Variables, given, state_of
from jaxtransfer.weights.frozen import fixed_at

BASE = "base"
_INSIDE = "inside"  # what the base's model itself has frozen: a base may be a delta of another one
Leaves = Mapping[str, Any]


class FrozenBase:
    """The weights of a model that stay, but for parameters that another model has of its own.

    Layers that stay run in inference mode, dropout and batch norm too. A layer with parameters of its own has its
    running statistics, too, and moves them in training.

    Args:
      model: the base's model.
      base: its weights, `{"params": ..., **state}`; a training state that has them; or a handle `jt.Frozen` or a model
        `jt.frozen` on them, so that several models hold them once.
      own: path patterns of the parameters that are not the base's. They start from the base where it has them in the
        model's shape, and are drawn anew where not: a head for other classes.
      what: who asks, for errors.

    Raises:
      InputError: for a twin, and what are no weights of a model.
    """

    def __init__(self, model: Model, base: Any, own: tree.Patterns, what: str):
        if not isinstance(model, Model):
            remedy = "jt.models.linen makes one of a module of Flax"
            raise InputError(f"{what} takes a jt.Model and the weights of its base; got a {_kind(model)}: {remedy}")
        if model.shares is not None:
            raise InputError(f"{what}: model {model.name!r} is a twin; make it of the first model, and then its twin")
        self.handle = _handle_on(model, base, what)
        self.model, self.what = model, what
        self.own = tree.as_patterns(own)
        self.params: Leaves = tree.leaves_by_path(self.handle.tree["params"])

    @property
    def frozen(self) -> dict[str, Any]:
        """The handles, for `Model.frozen`."""
        return {BASE: self.handle, **({_INSIDE: self.model.frozen} if self.model.frozen else {})}

    def stages(self, new: Any) -> tuple[str, ...]:
        """Returns those of the model's stages which have parameters that train, given the paths of new ones."""
        mine = [path for path in self.params if tree.matches(path, self.own)] if self.own else []
        elsewhere = [p for p in self.own if not any(tree.matches(path, p) for path in self.params)]
        kept = [stage for stage in self.model.stages if any(tree.matches(path, stage) for path in (*new, *mine))]
        if elsewhere and self.model.stages and self.model.head not in kept:
            kept.append(self.model.head)
        return tuple(kept)

    def init(self, key: Any, inputs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the parameters of its own by path, and the running state of their layers.

        Raises:
          InputError: for a pattern that selects nothing, and a base that doesn't fit the model.
        """
        model, base = self.model, self.handle.tree
        shapes = jax.eval_shape(lambda x: dict(model.init(key, x)), inputs)
        wanted = tree.leaves_by_path(shapes["params"])
        tree.check_used(self.own, wanted, f"{self.what}, own")
        mine = [path for path in wanted if tree.matches(path, self.own)]
        layers = {_layer(path) for path in mine}
        states = {
            kind: [path for path in tree.leaves_by_path(values) if _layer(path) in layers]
            for kind, values in shapes.items()
            if kind != "params"
        }
        known = {kind: tree.leaves_by_path(base.get(kind, {})) for kind in shapes}
        for kind, values in shapes.items():
            apart = mine if kind == "params" else states[kind]
            expected = {path: leaf for path, leaf in tree.leaves_by_path(values).items() if path not in apart}
            got = {path: leaf for path, leaf in known[kind].items() if path not in apart}
            if any(wrong := tree.differences(expected, got)):
                raise InputError(
                    f"{self.what}: the base's {kind} are not those of model {model.name!r} {wrong}. Name layers that "
                    f"are new in own={model.head!r}, or take the base's own model"
                )

        def fits(kind, path):
            there = known[kind].get(path)
            return there is not None and jnp.shape(there) == tree.leaves_by_path(shapes[kind])[path].shape

        chosen = [("params", path) for path in mine] + [(kind, path) for kind in states for path in states[kind]]
        drawn = dict(model.init(key, inputs)) if any(not fits(*one) for one in chosen) else {}
        fresh = {kind: tree.leaves_by_path(values) for kind, values in drawn.items()}

        def value(kind, path):
            leaf = known[kind][path] if fits(kind, path) else fresh[kind][path]
            return jnp.array(leaf, tree.leaves_by_path(shapes[kind])[path].dtype)

        params = {path: value("params", path) for path in mine}
        state = {
            kind: tree.nested({path: value(kind, path) for path in paths}) for kind, paths in states.items() if paths
        }
        return params, state

    def apply(
        self, variables: Variables, own: Leaves, inputs: Any, *, train: bool, key: Any, axis: Any, still: Any
    ) -> tuple[Outputs, Variables]:
        """Returns the outputs of the base's model, and the running state of layers of its own.

        Args:
          variables: those of the model on the base, complete.
          own: by path, the parameters that are not the base's.
          inputs: of the base's model.
          train: whether what is not the base's runs in training mode.
          key: for what it draws.
          axis: the device axis, or None.
          still: by path, flags of those that don't move either; None where all of them do.
        """
        base, state = variables[FROZEN][BASE], state_of(variables)
        moving = {kind: tree.leaves_by_path(values) for kind, values in state.items()}
        whole = {kind: _with(base.get(kind, {}), moving.get(kind, {})) for kind in {**base, **state}}
        whole["params"] = _with(base["params"], own)
        if self.model.frozen:
            whole[FROZEN] = variables[FROZEN][_INSIDE]
        if not train or not own:
            outputs, _ = self.model.apply(whole, inputs, train=False, key=None)
            return outputs, state
        flags = {path: False if still is None else still[path] for path in own}
        marked = _with(jax.tree.map(lambda _: True, base["params"]), flags)
        outputs, new = self.model.apply(whole, inputs, train=True, key=key, still=marked, **given(axis=axis))
        moved = {kind: tree.leaves_by_path(new[kind]) for kind in state}
        mine = {kind: {path: moved[kind][path] for path in paths} for kind, paths in moving.items()}
        return outputs, {kind: tree.nested(leaves) for kind, leaves in mine.items()}


def fixed(model: Model, base: Any, what: str) -> Model:
    """Returns a model at weights that stay, as a part of another one: without parameters, in inference mode.

    No gradient enters it: what it gives is a constant to derivatives.

    Args:
      model: the base's model.
      base: as for `FrozenBase`.
      what: who asks, for errors.
    """
    weights = FrozenBase(model, base, (), what)

    def init(key, inputs):
        weights.init(key, inputs)  # which refuses a base that doesn't fit
        return {}

    def apply(variables, inputs, *, train, key, axis=None, still=None):
        outputs, _ = weights.apply(variables, {}, inputs, train=False, key=None, axis=None, still=None)
        return jax.tree.map(jax.lax.stop_gradient, dict(outputs)), {}

    return Model(init, apply, model.name, (), weights.frozen)


def _handle_on(model: Model, base: Any, what: str) -> Any:
    handle = getattr(base, "held", base)  # of a frozen model
    if not hasattr(handle, "tree"):
        if not isinstance(base, Mapping) and not hasattr(base, "params"):
            raise InputError(f"{what}: expected the base's weights, {{'params': ..., **state}}; got a {_kind(base)}")
        handle = fixed_at(model, base).variables
    if not isinstance(handle.tree, Mapping) or not isinstance(handle.tree.get("params"), Mapping):
        keys = sorted(handle.tree) if isinstance(handle.tree, Mapping) else _kind(handle.tree)
        raise InputError(f"{what}: expected the base's weights, {{'params': ..., **state}}; got {keys}")
    for path, leaf in jax.tree_util.tree_leaves_with_path(handle.tree["params"], is_leaf=_no_branch):
        if not hasattr(leaf, "shape") or not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise InputError(
                f"{what}: the base's weights must be arrays; {tree.path_of(path)!r} is an {_kind(leaf)}. Of a base in "
                f"eight bits jt.deltas.plain makes arrays; jt.deltas.delta takes it as it is"
            )
    return handle


def _no_branch(node: Any) -> bool:
    return not isinstance(node, Mapping | list | tuple)


def _kind(value: Any) -> str:
    return type(value).__name__


def _layer(path: str) -> str:
    return path.rpartition("/")[0]


def _with(values: Any, leaves: Leaves) -> Any:
    """Returns nested dicts with other leaves at some paths, or more of them; the rest is the same object."""
    out = dict(values)
    by_key: dict[str, dict[str, Any]] = {}
    for path, leaf in leaves.items():
        first, _, rest = path.partition("/")
        if rest:
            by_key.setdefault(first, {})[rest] = leaf
        else:
            out[first] = leaf
    for first, below in by_key.items():
        out[first] = _with(out.get(first, {}), below)
    return out
