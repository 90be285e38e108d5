"""The model of a frozen base and a delta: what trains is the delta alone."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer import tree
from jaxtransfer.context import named_key
from jaxtransfer.deltas.base import check_base
from jaxtransfer.deltas.int8 import Int8, plain
from jaxtransfer.deltas.part import Part, check_params, check_parts
from jaxtransfer.deltas.weight import Layout, Weight, weights_of
from jaxtransfer.errors import InputError
from jaxtransfer.model import FROZEN, Model, given, state_of
from jaxtransfer.weights import Frozen

Tree = Any
BASE, FIXED, INSIDE = "base", "fixed", "inside"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Delta(Model):
    """A model whose parameters are a delta's; made by `jt.deltas.delta`. A `Model` like any other.

    Attributes:
      of: the model of the base.
      part: what makes the base's parameters those that run.
      base: the handle on the base's parameters.
      choices: names of the deltas among which each batch chooses; none where it is one alone.
    """

    of: Model
    part: Part
    base: Frozen
    choices: tuple[str, ...] = ()


def delta(
    model: Model,
    base: Any,
    part: Part,
    *,
    only: tree.Patterns | None = None,
    as_matrix: Layout | None = None,
    adapt_statistics: bool = False,
    digest: str | None = None,
) -> Delta:
    """Returns the model f_source + Δ: the parameters of `model` are frozen, those of the delta train.

        net = jt.deltas.delta(model, run.variables, jt.deltas.lora(8), only="attention/(query|value)/kernel")
        fitted = jt.fit(jt.classification(net), optax.adam(1e-3), data, steps=1000)
        variables = jt.deltas.merged(net, fitted.state)  # of `model`, for deployment

    The base is an argument of the compiled step, neither donated nor saved nor part of the program; models of deltas on
    one tree of parameters share it in memory. It may be of half precision or hold `Int8`: chosen parameters, and the
    delta, are computed in at least float32, and come out so.

    The model's running state starts as the base's and is the delta's own. What is frozen runs in inference mode, as
    under `jt.optim.only`: batch norm whose scale and bias the delta leaves alone normalises by the base's statistics
    and keeps them; one that the delta changes, by `full` or `norm_tuning` say, follows the batches. With
    `adapt_statistics` all of them follow.

    Args:
      model: the model of the base.
      base: its variables `{"params": ..., **state}`, which stay as they are; or a training state with them.
      part: what the delta is: `jt.deltas.lora(8)`, `jt.deltas.chain(...)`.
      only: path patterns of the parameters that it changes; those of the part by default.
      as_matrix: from path patterns to the axes that are inputs, for layers that `jt.deltas.input_axes` does not know.
      adapt_statistics: leave frozen layers in training mode.
      digest: what `jt.deltas.digest` says of the base that is meant; another one is refused.

    Returns:
      A model of the same name, its parameters nested as the base's. Its stages are those in which something trains.

    Raises:
      InputError: for a pattern that selects nothing, a layer whose inputs can't be told, a rank above a kernel's,
        another base than the digest's; at init, for variables that are not the model's.
    """
    if not isinstance(model, Model):
        raise InputError(
            f"a delta is of a jt.Model and its weights; got a {type(model).__name__}: jt.models.linen makes one of a "
            f"module of Flax"
        )
    check_parts({"part": part}, "delta(model, base, part)")
    if isinstance(model, Delta):
        raise InputError(
            f"model {model.name!r} is a delta already: stack them by jt.deltas.chain(first=..., second=...), or begin "
            f"from jt.deltas.merged(net, variables)"
        )
    if model.shares is not None:
        raise InputError(f"model {model.name!r} is a twin: make the delta of {model.shares.first.name!r} first")
    variables = variables_of(model, base)
    check_base(variables, digest)
    if only is not None or as_matrix is not None:
        part = part.on(only, as_matrix=as_matrix)
    weights = weights_of(variables["params"])
    shapes = jax.eval_shape(lambda key: part.fresh(key, weights), jax.random.key(0))
    places = _places(part, weights, shapes)
    fixed = part.constants(weights)

    def init(key, inputs):
        _check_fits(model, variables, inputs)
        state = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state_of(variables))
        return {**state, "params": part.fresh(key, weights)}

    def apply(variables, inputs, *, train, key, axis=None, still=None):
        read, params = variables[FROZEN], variables["params"]
        if train and part.drop is not None:
            params = _dropped(part, weights_of(read[BASE]), params, key, still, name=model.name)
            if key is not None and axis is not None and not model.shares_key:
                key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        own = merged_params(part, read[BASE], params, read.get(FIXED, {}))
        inner = {**state_of(variables), "params": own, **({FROZEN: read[INSIDE]} if model.frozen else {})}
        if train and not adapt_statistics:
            flags = _still(own, places, still)
            still = flags if any(flag is not False for flag in jax.tree.leaves(flags)) else None
        elif train and still is not None:
            still = None
        return model.apply(inner, inputs, train=train, key=key, **given(axis=axis, still=still if train else None))

    held = Frozen(variables["params"])
    frozen: dict[str, Any] = {BASE: held}
    if jax.tree.leaves(fixed):
        frozen[FIXED] = Frozen(fixed)
    if model.frozen:
        frozen[INSIDE] = model.frozen
    return Delta(
        init,
        apply,
        model.name,
        _stages(model.stages, tree.leaves_by_path(shapes)),
        frozen,
        shares_key=model.shares_key or part.drop is not None,  # what is left out is so for the whole batch
        of=model,
        part=part,
        base=held,
    )


def merged(model: Model, variables: Any, *, dtype: Any = None) -> dict[str, Any]:
    """Returns the variables of the base's model with the delta in them, for deployment: the same function.

    Args:
      model: as `delta` made it, or a model of the same weights made from that.
      variables: its variables, or a training state with them.
      dtype: the floating-point type of the parameters that the delta changed; at least float32 by default, as it runs.

    Returns:
      `{"params": ..., **state}`, each `Int8` multiplied out.

    Raises:
      InputError: for a model that is no delta, for variables that are not the model's, and for another type.
    """
    net, own = of_delta(model), variables_of(model, variables)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(f"merged weights are of a floating-point type, such as jnp.bfloat16; got {jnp.dtype(dtype)}")
    base, fixed = net.frozen[BASE].tree, net.frozen[FIXED].tree if FIXED in net.frozen else {}
    part, before = net.part, weights_of(base)
    _check_params(net, own["params"])
    params = merged_params(part, base, own["params"], fixed)
    if dtype is not None:
        changed = part.merged(before, own["params"], fixed)
        paths = {path for path, weight in changed.items() if weight.held is not before[path].held}
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf.astype(dtype) if tree.path_of(path) in paths else leaf, params
        )
    return {**state_of(own), "params": params}


def unmerge(model: Model, variables: Any, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Returns variables of the base's model with a delta taken off: w − (merged − base).

    What `merged` returned, of any type, gives the base to the bit; what was trained on, or fused with others, keeps
    what is new.

    Args:
      model: as `delta` made it.
      variables: the delta's variables, or a training state with them.
      weights: variables of the base's model with the delta in them.

    Raises:
      InputError: for a model that is no delta, and for weights of another architecture.
    """
    whole, base = merged(model, variables), plain(of_delta(model).frozen[BASE].tree)
    inside, given_to = whole["params"], variables_of(model, weights)["params"]
    if any(wrong := tree.differences(tree.leaves_by_path(inside), tree.leaves_by_path(given_to))):
        raise InputError(f"the weights are not those of model {model.name!r} {wrong}")

    def without(given_weight, with_delta, alone):
        own = jnp.asarray(given_weight)
        return (own - with_delta.astype(own.dtype).astype(with_delta.dtype)) + alone

    return {**weights, "params": jax.tree.map(without, given_to, inside, base)}


def base_of(model: Model) -> Tree:
    """Returns the parameters of the base as they are held, the same arrays; `plain` multiplies each `Int8` out."""
    return of_delta(model, alone=False).frozen[BASE].tree


def merged_params(part: Part, params: Tree, own: Tree, fixed: Tree) -> Tree:
    """Returns the parameters of the base with a delta in them, as a tree of arrays."""
    weights = part.merged(weights_of(params), own, fixed)
    whole = jax.tree_util.tree_map_with_path(
        lambda path, _: weights[tree.path_of(path)].held, params, is_leaf=lambda node: isinstance(node, Int8)
    )
    return plain(whole)


def of_delta(model: Model, *, alone: bool = True) -> Delta:
    """Returns a model that `delta` made; raises for another, and with `alone` for one that chooses among deltas."""
    if not isinstance(model, Delta):
        raise InputError(f"model {model.name!r} is no delta; jt.deltas.delta(model, base, part) makes one")
    if model.frozen.get(BASE) != model.base:
        raise InputError(
            f"model {model.name!r} is made of a delta and is none itself: give the delta and its own variables, of "
            f"heads jt.models.encoder_of(variables)"
        )
    if alone and model.choices:
        raise InputError(
            f"model {model.name!r} chooses among the deltas {', '.join(model.choices)} with each batch, so it has no "
            f"weights of its own: take one, jt.deltas.delta(model, base, parts[name]) with its parameters [name]"
        )
    return model


def variables_of(model: Model, variables: Any) -> dict[str, Any]:
    """Returns a model's variables, those of its name where a training state is given."""
    if hasattr(variables, "params") and hasattr(variables, "state"):
        if missing := [one.name for one in model.family if one.name not in variables.params]:
            raise InputError(f"no model {missing[0]!r} was trained in that state; it has {sorted(variables.params)}")
        variables = {"params": model.whole(variables.params), **variables.state.get(model.name, {})}
    if not isinstance(variables, Mapping) or "params" not in variables:
        came = sorted(variables) if isinstance(variables, Mapping) else f"a {type(variables).__name__}"
        raise InputError(f"expected the variables of model {model.name!r}, {{'params': ..., **state}}; got {came}")
    return {kind: values for kind, values in variables.items() if kind != FROZEN}


def _check_params(net: Delta, params: Tree) -> None:
    check_params(net.part, net.part.chosen(weights_of(net.frozen[BASE].tree)), params, f"the delta {net.name!r}")


def _check_fits(model: Model, variables: Tree, inputs: Any) -> None:
    """Raises where the base's variables are not those of the model, by path and shape."""
    try:
        expected = jax.eval_shape(model.init, jax.random.key(0), inputs)
    except jax.errors.JAXTypeError:  # an init that computes on the host can't be traced; the model itself will tell
        return
    got = {f"params/{path}": weight.held for path, weight in weights_of(variables["params"]).items()}
    got |= tree.leaves_by_path(state_of(variables))
    wrong = tree.differences(tree.leaves_by_path(dict(expected)), got)
    if any(wrong):
        raise InputError(f"the base is not one of model {model.name!r} {wrong}")


def _places(part: Part, weights: Mapping[str, Weight], shapes: Tree) -> dict[str, tuple[str, ...]]:
    """Returns for each parameter of the base that the delta trains at the paths of what it trains there."""
    found: dict[str, tuple[str, ...]] = {}
    for trained in tree.leaves_by_path(shapes):
        keys = f"{_below(part, trained)}/".split("/")
        above = ("/".join(keys[:count]) for count in range(1, len(keys)))
        for path in (path for path in above if path in weights):
            found[path] = (*found.get(path, ()), trained)
    return found


def _dropped(part: Part, weights: Mapping[str, Weight], params: Tree, key: Any, still: Tree, *, name: str) -> Tree:
    """Returns what dropout leaves of a delta's parameters in this step; those that stay are left alone."""
    if key is None:
        raise InputError(f"the delta {name!r} has dropout, which draws in training: apply(..., train=True, key=...)")
    flags = {} if still is None else tree.leaves_by_path(still)

    def chosen(key_path, leaf, own):
        flag = flags.get(tree.path_of(key_path), False)
        return leaf if flag is False else jnp.where(flag, own, leaf)

    left = part.dropped(named_key(key, "deltas"), weights, params)
    return jax.tree_util.tree_map_with_path(chosen, left, params)


def _below(part: Part, path: str) -> str:
    """Returns the path of a parameter of a delta without the names of the parts that it belongs to."""
    name = next((name for name in part.parts if path.startswith(f"{name}/")), None)
    return path if name is None else _below(part.parts[name], path[len(name) + 1 :])


def _still(params: Tree, places: Mapping[str, tuple[str, ...]], still: Tree) -> Tree:
    """Returns which parameters of the base stay in this update: those at which no parameter of the delta moves."""
    flags = {} if still is None else tree.leaves_by_path(still)

    def stays(key_path, _):
        result: Any = True
        for path in places.get(tree.path_of(key_path), ()):
            flag = flags.get(path, False)
            if flag is False:
                return False
            result = flag if result is True else result & flag
        return result

    return jax.tree_util.tree_map_with_path(stays, params)


def _stages(stages: tuple[str, ...], paths: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the stages in which something trains; none where they leave out some of it."""
    found = tuple(stage for stage in stages if any(tree.matches(path, stage) for path in paths))
    return found if all(tree.matches(path, found) for path in paths) else ()
