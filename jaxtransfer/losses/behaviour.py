"""DELTA: feature maps of the network that trains are held where the pretrained network's are."""

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import check_same, wide


def delta(maps: jax.Array, source: jax.Array, *, weight: jax.Array | None = None) -> jax.Array:
    """Computes ½ Σ_c C w_c mean_p (m_pc − s_pc)² per example: behavioural regularisation, DELTA.

    (Li et al. 2019, arXiv:1901.09229.) Channels whose loss would grow most without them weigh most, w sums to 1:
    `jt.filter_weights` estimates it. Without weights, w_c = 1/C, each channel counts once. This is the authors' code
    with attention; their plain form sums over the positions p, H·W times as much, which the strength takes up.

    Args:
      maps: float [B, H, W, C], or features [B, C], of the network that trains.
      source: float of the same shape, the pretrained network's.
      weight: w [C], finite and not negative; None for the plain form.

    Returns:
      The loss [B], in at least float32.

    Raises:
      InputError: where shapes differ.
    """
    check_same(maps, source, "maps [batch, ..., channels]")
    if maps.ndim < 2:
        raise InputError(f"delta takes maps [batch, ..., channels]; got shape {maps.shape}")
    channels = maps.shape[-1]
    maps, source = wide(maps, source)
    squares = jnp.square(maps - source)
    squares = jnp.mean(squares, axis=tuple(range(1, squares.ndim - 1)))
    if weight is None:
        return 0.5 * jnp.sum(squares, axis=-1)
    if jnp.shape(weight) != (channels,):
        raise InputError(f"weight must have one number for each of the {channels} channels; got {jnp.shape(weight)}")
    return 0.5 * channels * jnp.sum(squares * jnp.asarray(weight, squares.dtype)[None], axis=-1)
