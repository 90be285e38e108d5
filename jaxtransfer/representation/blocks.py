"""What measures compute in blocks of rows, each program compiled once per shape."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_BLOCK = 1024  # queries that are compared at a time
_BANK_BLOCK = 8192  # vectors that are compared with queries at a time


def finite(rows: Any) -> bool:
    """Whether all is finite: a NaN takes part in no comparison, and the score would be that of chance."""
    return bool(np.isfinite(rows).all())


def unit(rows: Any) -> np.ndarray:
    """Returns rows of length 1, of any scale: their squares neither overflow nor vanish; zeros stay zero."""
    rows = np.asarray(rows)
    rows = rows / np.maximum(np.abs(rows).max(axis=1, keepdims=True, initial=0), np.finfo(np.float32).tiny)
    rows = rows.astype(np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def banked(rows: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows [M, S, D] and labels [M, S], the last ones filled with zeros and labels of -1."""
    size = min(_BANK_BLOCK, len(rows))
    missing = -len(rows) % size
    rows = np.concatenate([rows, np.zeros((missing, rows.shape[1]), rows.dtype)])
    labels = np.concatenate([labels, np.full(missing, -1, labels.dtype)])
    return rows.reshape(-1, size, rows.shape[1]), labels.reshape(-1, size)


@functools.partial(jax.jit, static_argnames="k")
def voted(queries: jax.Array, bank: jax.Array, labels: jax.Array, temperature: float, *, k: int) -> jax.Array:
    """Returns the class [Q] that the k nearest of a bank [M, S, D] vote for; labels [M, S] below 0 are no examples."""

    def nearer(found, block):
        rows, theirs = block
        cosines = jnp.where(theirs >= 0, queries @ rows.T, -jnp.inf)
        theirs = jnp.broadcast_to(theirs, cosines.shape)
        cosines, theirs = (jnp.concatenate(both, axis=1) for both in zip(found, (cosines, theirs), strict=True))
        cosines, places = jax.lax.top_k(cosines, k)
        return (cosines, jnp.take_along_axis(theirs, places, axis=1)), None

    none = jnp.full((len(queries), k), -jnp.inf, queries.dtype), jnp.full((len(queries), k), -1, labels.dtype)
    (cosines, theirs), _ = jax.lax.scan(nearer, none, (bank, labels))
    weights = jnp.exp((cosines - cosines[:, :1]) / temperature)
    # Votes of one class stand side by side after sorting and are added into one place: [Q, k], however many classes.
    theirs, weights = jax.lax.sort((theirs, weights), num_keys=1)
    places = jnp.cumsum(jnp.diff(theirs, axis=1, prepend=theirs[:, :1]) != 0, axis=1)
    votes = jnp.zeros_like(weights).at[jnp.arange(len(queries))[:, None], places].add(weights)
    winner = jnp.argmax(votes, axis=1)
    return jnp.max(jnp.where(places == winner[:, None], theirs, -1), axis=1)


@functools.partial(jax.jit, static_argnames="k")
def nearest(rows: jax.Array, bank: jax.Array, *, k: int) -> jax.Array:
    """Returns the places [Q, k] in a bank [N, D] of each row's nearest, the nearest first."""
    return jax.lax.top_k(rows @ bank.T, k)[1]


@jax.jit
def potentials(rows: jax.Array, bank: jax.Array, t: float) -> jax.Array:
    """Returns Σⱼ exp(−t ‖x − yⱼ‖²) of each unit vector x over the unit vectors y of a bank."""
    return jnp.sum(jnp.exp(-t * jnp.maximum(2 - 2 * rows @ bank.T, 0)), axis=1)


def in_blocks(rows: np.ndarray) -> Iterable[np.ndarray]:
    """Yields the rows in blocks of one shape, the last one filled with zeros: one program serves all."""
    size = min(_BLOCK, len(rows))
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        yield np.concatenate([part, np.zeros((size - len(part), rows.shape[1]), rows.dtype)])
