"""Networks between a student and its teacher: they bring two outputs to one shape, for losses that compare maps.

An adapter is a model of a pair `(student, teacher)`, maps [B, H, W, C], vectors [B, D], or tuples of them; its outputs
are `student`, `teacher` or both, and what a loss asks for besides.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.models.batch_norm import BatchNorm
from jaxtransfer.models.linen import linen

RELEASED_SCALE = 4.993  # log(exp(5 − 1e-5) − 1): a variance of 5 under softplus


def regressor(*, hidden: tuple[int, ...] = ()) -> Model:
    """Returns the regressor of FitNets (Romero et al. 2015, arXiv:1412.6550): the student's map to the teacher's shape.

    A 1×1 convolution (a linear layer, for vectors) to the teacher's channels; a map of another size is resized to the
    teacher's, linearly, smoothed where it shrinks.

    Args:
      hidden: channels of further 1×1 convolutions before it, each with ReLU.
    """
    return linen(Regressor(tuple(hidden)), name="regressor")


def variational() -> Model:
    """Returns the regressor of VID (Ahn et al. 2019, arXiv:1904.05835): a mean for the teacher's map, and a scale.

    The mean comes of three 1×1 convolutions with ReLU between them; the scale [C] of each channel's variance, which
    `jt.losses.vid` reads, starts at a variance of 5. Both as in the released code.
    """
    return linen(Variational(), name="variational")


def review(*, channels: int | None = None) -> Model:
    """Returns the attention-based fusion of knowledge review (Chen et al. 2021, arXiv:2104.09044).

    For tuples of maps, shallow to deep: each of the student's maps is joined with what the deeper ones left over and
    brought to the shape of the teacher's, for `jt.losses.review_kd`.

    Args:
      channels: of the maps that are handed up; those of the student's deepest map, 512 at most, by default.
    """
    return linen(Review(channels), name="review")


class Regressor(nn.Module):
    """See `regressor`."""

    hidden: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, pair):
        """Returns the student's output in the shape of the teacher's."""
        x, target = pair
        x = _resized(x, target)
        for number, channels in enumerate(self.hidden, 1):
            x = nn.relu(nn.Dense(channels, name=f"hidden{number}")(x))
        return {"student": nn.Dense(target.shape[-1], name="output")(x)}


class Variational(nn.Module):
    """See `variational`."""

    @nn.compact
    def __call__(self, pair):
        """Returns the predicted mean as `student`, and `scale`."""
        x, target = pair
        x, channels = _resized(x, target), target.shape[-1]
        for number in (1, 2):
            x = nn.relu(nn.Dense(channels, use_bias=False, name=f"hidden{number}")(x))
        scale = self.param("scale", nn.initializers.constant(RELEASED_SCALE), (channels,))
        return {"student": nn.Dense(channels, use_bias=False, name="output")(x), "scale": scale}


class Review(nn.Module):
    """See `review`."""

    channels: int | None = None
    axis: str | None = None

    @nn.compact
    def __call__(self, pair, *, train: bool):
        """Returns the student's fused maps in the shapes of the teacher's, shallow to deep."""
        maps, targets = pair
        if not isinstance(maps, tuple) or len(maps) != len(targets) or any(x.ndim != 4 for x in (*maps, *targets)):
            raise InputError("knowledge review fuses tuples of maps [B, H, W, C]: taps=[('stage1', 'stage2', ...)]")
        channels = self.channels or min(512, maps[-1].shape[-1])

        def conv(x, filters, size, name):
            kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # kaiming_uniform with a = 1
            x = nn.Conv(filters, (size, size), use_bias=False, kernel_init=kernel, name=f"{name}_conv")(x)
            return BatchNorm(train, axis=self.axis, name=f"{name}_norm")(x)

        out, rest = [], None
        for level in reversed(range(len(maps))):
            x = conv(maps[level], channels, 1, f"squeeze{level}")
            if rest is not None:
                rest = _nearest(rest, x)
                joint = nn.Conv(2, (1, 1), name=f"attention{level}")(jnp.concatenate([x, rest], -1))
                first, second = jnp.split(nn.sigmoid(joint), 2, axis=-1)
                x = x * first + rest * second
            rest = _nearest(x, targets[level])
            out.append(conv(rest, targets[level].shape[-1], 3, f"expand{level}"))
        return {"student": tuple(reversed(out))}


def _resized(x: Any, target: Any) -> jax.Array:
    if x.ndim != target.ndim or x.ndim not in (2, 4):
        raise InputError(f"expected two maps [B, H, W, C] or two vectors [B, D]; got {x.shape} and {target.shape}")
    shape = (*target.shape[:-1], x.shape[-1])
    return x if x.shape == shape else jax.image.resize(x, shape, "linear")


def _nearest(x: Any, target: Any) -> jax.Array:
    shape = (*target.shape[:-1], x.shape[-1])
    return x if x.shape == shape else jax.image.resize(x, shape, "nearest")
