"""Attention for each task on the maps of one encoder, as in MTAN."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError, unknown
from jaxtransfer.model import Model
from jaxtransfer.models.batch_norm import BatchNorm
from jaxtransfer.models.composition import composed, distinct, vectors_of
from jaxtransfer.models.layers import global_avg_pool, max_pool
from jaxtransfer.models.linen import linen


class TaskAttention(nn.Module):
    """Picks from each of an encoder's maps what one task needs."""

    axis: str | None = None

    @nn.compact
    def __call__(self, maps, *, train: bool = False):
        """Returns the features [B, C] for `maps`, a tuple of [B, H, W, C] from the input to the last."""

        def conv(x, filters, name):
            x = nn.Conv(filters, (1, 1), name=f"{name}_conv")(x)
            return BatchNorm(train, axis=self.axis, name=f"{name}_norm")(x)

        picked = None
        for number, features in enumerate(maps, 1):
            if features.ndim != 4:
                raise InputError(f"attention reads maps [B, H, W, C]; got shape {features.shape}")
            channels, seen = features.shape[-1], features
            if picked is not None:
                passed = nn.relu(conv(picked, channels, f"pass{number}"))
                seen = jnp.concatenate([features, _shrunk(passed, features.shape[1:3])], axis=-1)
            hidden = nn.relu(conv(seen, channels, f"hidden{number}"))
            mask = nn.sigmoid(conv(hidden, channels, f"mask{number}"))
            picked = mask * features
        return {"output": global_avg_pool(picked)}


def task_attention(encoder: Model, maps: tuple[str, ...], /, **heads: Model) -> Model:
    """Returns one encoder whose maps each task reads through soft masks of its own: a multi-task attention network.

    With p_j the encoder's j-th map and N batch norm, a task has

        a_j = σ(N(V relu(N(W [p_j; h_j])))) ⊙ p_j,    h_j = pool(relu(N(U a_{j−1}))),

    h missing in the first; V, W and U are 1×1 convolutions, and its head reads the mean of the last a over the
    positions. (Liu et al. 2019, "End-to-end multi-task learning with attention", arXiv:1803.10704.) There a mask is
    computed from the middle of a block and laid on its end, and U is a convolution 3×3; here both are the map that the
    encoder gives, so that it works with every one that names its maps. The parameters are `encoder`,
    `<task>_attention` and `<task>`, the outputs the encoder's, `<task>_features` and `<task>`.

        net = jt.models.task_attention(jt.models.resnet20(10), ("stage1", "stage2", "stage3"), left=head, right=head)

    Args:
      encoder: what gives the maps [B, H, W, C]; the result has its name.
      maps: their names, from the input on; the sides of each are those of the one before, or a whole part of them.
      **heads: by task: models of vectors.

    Raises:
      InputError: for no maps, no tasks, and names that collide; at init, for an output that isn't there or is no map.
    """
    if not maps or isinstance(maps, str) or not heads:
        raise InputError("attention needs a tuple of names of maps, and a head for each task")
    masks = {task: f"{task}_attention" for task in heads}
    distinct("encoder", *masks.values(), *heads)
    parts = {"encoder": encoder, **{mask: linen(TaskAttention(), name=mask) for mask in masks.values()}, **heads}

    def run(call, inputs):
        outputs = dict(call("encoder", inputs))
        if missing := [name for name in maps if name not in outputs]:
            raise unknown(f"output of {encoder.name!r}", missing[0], outputs)
        seen = tuple(outputs[name] for name in maps)
        for task, mask in masks.items():
            outputs[f"{task}_features"] = call(mask, seen)["output"]
            outputs[task] = vectors_of(task, call(task, outputs[f"{task}_features"]))
        return outputs

    inside = tuple(f"encoder/(?:{stage})" for stage in encoder.stages or (".*",))
    stages = (*inside, "|".join([*masks.values(), *heads]))
    return composed(encoder, parts, run, stages=stages)


def _shrunk(x: jax.Array, sides: tuple[int, int]) -> jax.Array:
    """Returns a map after max pooling to the sides of another one."""
    if x.shape[1:3] == sides:
        return x
    window = x.shape[1] // sides[0]
    pooled = max_pool(x, window) if window > 1 and min(x.shape[1:3]) >= window else x
    if pooled.shape[1:3] != sides:
        raise InputError(f"a map of sides {x.shape[1:3]} can't be pooled to {sides}: take maps whose sides divide")
    return pooled
