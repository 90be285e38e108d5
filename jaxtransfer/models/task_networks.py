"""Networks of several tasks by name, each made of an encoder and the number of classes of each task."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtransfer import tree
from jaxtransfer.errors import InputError, unknown
from jaxtransfer.model import Model
from jaxtransfer.models.cross_stitch import cross_stitch
from jaxtransfer.models.experts import cgc, mmoe, ple
from jaxtransfer.models.heads import head, outputs_of, with_heads
from jaxtransfer.models.layers import max_pool
from jaxtransfer.models.task_attention import task_attention

MIDDLE = 128  # outputs of the experts of a second level
_MAP = re.compile(r"stage(\d+)")


class TaskNetwork(NamedTuple):
    """A way to make one network of several tasks.

    Attributes:
      build: `build(encoder, heads, experts, image_shape) -> Model`.
      shared: path pattern of what several tasks share, behind the model's name.
      encoder: whether there is one encoder, the part `encoder`, which goes on by itself.
      experts: whether it has several, so that their number has a meaning.
    """

    build: Callable[..., Model]
    shared: str
    encoder: bool = False
    experts: bool = False


def _ple(encoder: Model, heads: Mapping[str, Model], experts: int, image_shape: Any) -> Model:
    middle = head(MIDDLE, MIDDLE, batch_norm=False)
    return ple([([encoder] * experts, [encoder]), ([middle] * experts, [middle])], **heads)


def _attention(encoder: Model, heads: Mapping[str, Model], experts: int, image_shape: Any) -> Model:
    return task_attention(encoder, maps_of(encoder, image_shape), **heads)


_EXPERTS = r"(?:level\d+_)?(?:expert\d+|gate)"
NETWORKS: dict[str, TaskNetwork] = {
    "shared-bottom": TaskNetwork(
        lambda encoder, heads, experts, image_shape: with_heads(encoder, **heads), "encoder", encoder=True
    ),
    "mmoe": TaskNetwork(
        lambda encoder, heads, experts, image_shape: mmoe([encoder] * experts, **heads), _EXPERTS, experts=True
    ),
    "cgc": TaskNetwork(
        lambda encoder, heads, experts, image_shape: cgc([encoder] * experts, [encoder], **heads),
        _EXPERTS,
        experts=True,
    ),
    "ple": TaskNetwork(_ple, _EXPERTS, experts=True),
    "cross-stitch": TaskNetwork(
        lambda encoder, heads, experts, image_shape: cross_stitch(encoder, **heads), r"[^/]*_encoder|stitches"
    ),
    "attention": TaskNetwork(_attention, "encoder", encoder=True),
}


def task_network(name: str, encoder: Model, tasks: Mapping[str, int], *, image_shape: Any, experts: int = 3) -> Model:
    """Returns a network with an output for each task, its logits, under the task's name.

    Args:
      name: a key of `NETWORKS`.
      encoder: what gives `features`, and for `attention` maps `stage1`, `stage2`, ...
      tasks: by name how many classes each has.
      image_shape: (H, W, C) of the inputs.
      experts: shared ones, where there are several.

    Raises:
      InputError: for an unknown name, for no tasks, a task that is called as an output of the encoder is, or as what no
        parameter can be; and what the constructor raises.
    """
    if name not in NETWORKS:
        raise unknown("architecture", name, NETWORKS)
    if not tasks:
        raise InputError("a network of several tasks has one or more, by name; got none")
    given = _outputs_of(encoder, image_shape)
    for task in tasks:
        if task in given or not re.fullmatch(r"[\w.-]+", task):
            others = ", ".join(given)
            raise InputError(
                f"a task can't be called {task!r}: names are letters, digits, '_', '.' and '-', and none of {others}, "
                f"which are the network's own"
            )
    if nothing_shared(encoder, image_shape):
        raise InputError(
            "the encoder has no layers before its head, so that tasks would share nothing; choose a deeper one"
        )
    heads = {task: head(classes, batch_norm=False) for task, classes in tasks.items()}
    return NETWORKS[name].build(encoder, heads, experts, image_shape)


def maps_of(encoder: Model, image_shape: Any) -> tuple[str, ...]:
    """Returns the maps `stage1`, `stage2`, ... of an encoder on which attention can lie, from the input on.

    The last one, and before it those that max pooling brings to the sides of the next.

    Raises:
      InputError: for an encoder without maps.
    """
    shapes = _outputs_of(encoder, image_shape)
    numbered = {int(number[1]): name for name in shapes if (number := _MAP.fullmatch(name))}
    found: list[str] = []
    for name in (numbered[number] for number in sorted(numbered, reverse=True)):
        shape = shapes[name].shape
        if len(shape) != 4:
            continue
        if not found or _fits(shape, shapes[found[0]].shape):
            found.insert(0, name)
    if not found:
        told = ", ".join(f"{name} [B, {', '.join(map(str, one.shape[1:]))}]" for name, one in shapes.items())
        raise InputError(
            f"attention lies on maps [B, H, W, C] of the network, and this one gives none called stage1, stage2, ...: "
            f"{told}. Choose a convolutional network, or another architecture"
        )
    return tuple(found)


def _fits(shape: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether max pooling brings a map to the sides of the next one."""
    window = shape[1] // after[1]
    if shape[1:3] == after[1:3]:
        return True
    if window < 2 or min(shape[1:3]) < window:
        return False
    pooled = jax.eval_shape(lambda x: max_pool(x, window), jax.ShapeDtypeStruct(shape, jnp.float32)).shape
    return pooled[1:3] == after[1:3]


def nothing_shared(encoder: Model, image_shape: Any) -> bool:
    """Whether an encoder has no parameters but those of its own head, which the heads of tasks stand in for."""
    inputs = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    params = jax.eval_shape(lambda x: encoder.init(jax.random.key(0), x), inputs)["params"]
    return all(tree.matches(path, encoder.head) for path in tree.leaves_by_path(params))


def _outputs_of(encoder: Model, image_shape: Any) -> dict[str, Any]:
    inputs = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    variables = jax.eval_shape(lambda x: encoder.init(jax.random.key(0), x), inputs)
    return outputs_of(encoder, variables, inputs)
