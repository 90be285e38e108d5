"""Cross-stitch networks: one network for each task, whose activations are mixed after each stage."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model, given
from jaxtransfer.models.composition import distinct, vectors_of
from jaxtransfer.models.heads import by_kind, by_part, outputs_of

AXIS = "cross_stitch"  # of the copies
UNITS = "stitches"


def cross_stitch(encoder: Model, at: Sequence[str] | None = None, /, **heads: Model) -> Model:
    """Returns a copy of an encoder for each task, joined by cross-stitch units.

    After some of the layers the activations x of the T copies become Σ_s α_ts x_s, α [T, T] learned for each unit, from
    0.9 on its diagonal and 0.1 / (T − 1) beside it; a task's head reads the features of its copy. (Misra et al. 2016,
    "Cross-stitch networks", arXiv:1604.03539, with one α for all channels; LibMTL begins with α = 1 throughout.) The
    copies run in step, as one network on stacked weights, so that any encoder of Flax Linen layers does.

        net = jt.models.cross_stitch(jt.models.lenet(10), left=jt.models.head(10), right=jt.models.head(10))

    Its parameters are `<task>_encoder`, `stitches` and `<task>`; its outputs `<task>_features` and `<task>`. Begin with
    pretrained copies where there are any, as the paper does.

    Args:
      encoder: what gives `features`, made of Flax Linen layers; the result has its name.
      at: the layers behind which activations are mixed, as they are called in the parameters, `stage1_conv` say; by
        default the last one of each of the encoder's stages. Where an activation function follows, it comes after.
      **heads: by task: models of vectors.

    Raises:
      InputError: for no tasks, and names that collide; at init, for layers that the encoder does not have.
    """
    if not heads or isinstance(at, str):
        raise InputError("a cross-stitch network needs a head for each task, and the names of layers in a list")
    copies = {task: f"{task}_encoder" for task in heads}
    distinct(UNITS, *copies.values(), *heads)
    count = len(heads)

    def init(key, inputs):
        keys = jax.random.split(key, 2 * count)
        variables: dict[str, Any] = {}
        for drawn, copy in zip(keys[:count], copies.values(), strict=True):
            variables[copy] = dict(encoder.init(drawn, inputs))
        first = variables[next(iter(copies.values()))]
        called: list[str] = []
        with _intercepted(lambda path, found: called.append(path) or found):
            shape = vectors_of(encoder.name, outputs_of(encoder, first, inputs))
        for drawn, (task, head) in zip(keys[count:], heads.items(), strict=True):
            variables[task] = dict(head.init(drawn, jnp.zeros(shape.shape, shape.dtype)))
        beside = 0.1 / max(count - 1, 1)
        alpha = beside + (0.9 - beside) * jnp.eye(count) if count > 1 else jnp.ones((1, 1))
        variables[UNITS] = {"params": dict.fromkeys(_units(encoder, called, at), alpha)}
        return by_kind(variables)

    def apply(variables, inputs, *, train, key, axis=None, still=None):
        own = by_part(variables, (*copies.values(), UNITS, *heads))
        units, still = own[UNITS]["params"], still or {}
        keys = None if key is None else jax.random.split(key, 2 * count)
        flags = [still.get(copy) for copy in copies.values()]

        def one(variables, number, key):
            def mixed(path, found):
                if path not in units:
                    return found
                alpha = jnp.asarray(units[path])[number]
                return jnp.tensordot(alpha.astype(found.dtype), jax.lax.all_gather(found, AXIS), 1)

            where = given(axis=axis, still=None if all(f is None for f in flags) else _each(flags, variables, number))
            with _intercepted(mixed):
                return encoder.apply(variables, inputs, train=train, key=key, **where)

        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(own[copy] for copy in copies.values()))
        drawn = None if keys is None else keys[:count]
        run = jax.vmap(one, in_axes=(0, 0, None if drawn is None else 0), axis_name=AXIS)
        found, new = run(stacked, jnp.arange(count), drawn)
        vectors, outputs = vectors_of(encoder.name, found), {}
        states = {copy: jax.tree.map(lambda x, n=n: x[n], dict(new)) for n, copy in enumerate(copies.values())}
        for number, (task, head) in enumerate(heads.items()):
            outputs[f"{task}_features"] = vectors[number]
            where = given(axis=axis, still=still.get(task))
            drawn = None if keys is None else keys[count + number]
            told, state = head.apply(own[task], vectors[number], train=train, key=drawn, **where)
            outputs[task], states[task] = vectors_of(task, told), dict(state)
        return outputs, by_kind(states)

    frozen = {copy: encoder.frozen for copy in copies.values() if encoder.frozen}
    frozen |= {task: head.frozen for task, head in heads.items() if head.frozen}
    inside = "|".join(copies.values())
    stages = (*(f"(?:{inside})/(?:{stage})" for stage in encoder.stages or (".*",)), "|".join((UNITS, *heads)))
    return Model(init, apply, encoder.name, stages, frozen)


@contextlib.contextmanager
def _intercepted(change: Callable[[str, Any], Any]) -> Iterator[None]:
    """Gives what each layer returns to `change(path, found)`, and goes on with what that returns."""

    def intercept(call, args, kwargs, context):
        found = call(*args, **kwargs)
        if context.method_name != "__call__" or not isinstance(found, jax.Array):
            return found
        return change("/".join(context.module.path), found)

    with nn.intercept_methods(intercept):
        yield


def _units(encoder: Model, called: list[str], at: Sequence[str] | None) -> list[str]:
    """Returns the layers that have a unit: those asked for, or the last one of each stage but the head."""
    if at is not None:
        if missing := [path for path in at if path not in called]:
            raise InputError(f"encoder {encoder.name!r} has no layer {missing[0]!r}; it calls {tree.listed(called)}")
        return list(at)
    outer = [path for path in called if path and "/" not in path]
    last = [[path for path in outer if tree.matches(path, stage)][-1:] for stage in encoder.stages[:-1]]
    if not any(last):
        raise InputError(
            f"encoder {encoder.name!r} tells no layers by stage: a cross-stitch network is of Flax Linen layers; name "
            f"them, cross_stitch(encoder, ['layer1', 'layer2'], ...); it calls {tree.listed(called) or 'none'}"
        )
    return [path for found in last for path in found]


def _each(flags: list[Any], variables: Any, number: jax.Array) -> Any:
    """Returns which parameters of the copy with a number are still; those that differ between copies by an array."""
    moves = jax.tree.map(lambda _: False, variables["params"])

    def leaf(*own):
        if all(flag is own[0] for flag in own):
            return own[0]
        return jnp.stack([jnp.asarray(flag) for flag in own])[number]

    return jax.tree.map(leaf, *(moves if flag is None else flag for flag in flags))
