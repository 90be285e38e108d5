"""All pairs of two batches in linear memory: reductions along a matrix of scores aᵢ·bⱼ that is never held.

Tile by tile the matrix is made for the value, and again for the derivative: time N·M·D, memory (N + M)·D and one tile,
exact to rounding. A temperature goes into the rows beforehand: a/τ, or z/√τ where both sides are z.

Under `jit` on a mesh this partitions by itself. Every sweep adds up along a row alone, so a row stays on its device and
meets all columns, which are gathered once, before the loops. A tile takes every t-th row: a share of each device.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import EXACT

Tree = Any
Pairs = Callable[[Tree, Tree], jax.Array]


class Side(NamedTuple):
    """The examples on one side of the matrix.

    Attributes:
      x: float [N, D].
      keep: booleans [N]; where false the example is in no pair, and x must be finite there, such as 0.
      tags: arrays [N] in any tree: what a rule for pairs knows of an example.
    """

    x: jax.Array
    keep: jax.Array
    tags: Tree = ()


class Reduction(NamedTuple):
    """How the scores of a row become one value; a score of −∞ must change nothing.

    Attributes:
      part: of scores [r, c] the partial result, a tree of [r].
      merge: two partial results to one.
      empty: the partial result of no scores, numbers.
      value: of a partial result the value [r].
      slope: of scores [r, c] and the value [r, 1] or [1, c] of their row the derivative of the value by the score.
    """

    part: Callable[[jax.Array], Tree]
    merge: Callable[[Tree, Tree], Tree]
    empty: Tree
    value: Callable[[Tree], jax.Array]
    slope: Callable[[jax.Array, jax.Array], jax.Array]


def every_pair(one: Tree, other: Tree) -> jax.Array:
    """Counts all pairs."""
    return jnp.ones((1, 1), bool)


def others(one: jax.Array, other: jax.Array) -> jax.Array:
    """Counts pairs with different tags: those of different examples, where the tag is an example's number."""
    return one != other


def everywhere(side: Tree, axis_name: str | None) -> Any:
    """Returns the rows [N, ...] of all devices of an axis, in order; None without an axis: there are no others."""
    return None if axis_name is None else jax.lax.all_gather(side, axis_name, tiled=True)


def total(x: jax.Array, axis_name: str | None) -> jax.Array:
    """Returns the sum over the devices of an axis; without an axis there are no others."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def numbers(size: int, axis_name: str | None) -> jax.Array:
    """Returns the numbers of this device's `size` examples among those of all devices of an axis."""
    return jnp.arange(size) + (0 if axis_name is None else size * jax.lax.axis_index(axis_name))


LARGEST_TILE = {"cpu": 1024, "gpu": 8192}  # measured: a core's cache; an H100, where 4096 takes 13 % longer
_FLOOR = -3e38  # below any score, and still finite in float32


def _largest(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    top = jnp.max(scores, axis=1, initial=_FLOOR)
    return top, jnp.sum(jnp.exp(scores - top[:, None]), axis=1)


def _merge(one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    top = jnp.maximum(one[0], other[0])
    return top, one[1] * jnp.exp(one[0] - top) + other[1] * jnp.exp(other[0] - top)


LOG_SUM_EXP = Reduction(
    part=_largest,
    merge=_merge,
    empty=(_FLOOR, 0),
    value=lambda part: part[0] + jnp.log(part[1]),
    slope=lambda scores, value: jnp.exp(scores - jnp.where(value > _FLOOR, value, 0)),
)
SOFTPLUS_SUM = Reduction(
    part=lambda scores: jnp.sum(jax.nn.softplus(scores), axis=1),
    merge=jnp.add,
    empty=0,
    value=lambda part: part,
    slope=lambda scores, value: jax.nn.sigmoid(scores),
)


def reduce_pairs(
    reduction: Reduction,
    rows: Side,
    columns: Side | None = None,
    *,
    pairs: Pairs = every_pair,
    both: bool = False,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Reduces the scores aᵢ·bⱼ of each row i over the columns j, without ever holding the matrix.

    Reverse-mode derivatives of any order exist; forward mode is refused by JAX.

    Args:
      reduction: `LOG_SUM_EXP`, −∞ for a row without pairs, or `SOFTPLUS_SUM`.
      rows: a, N examples.
      columns: b, M examples; by default the rows again, which saves a third of the derivative.
      pairs: the rule of which pairs count: tags of one side [r, 1] and of the other [1, c] to booleans that broadcast
        to [r, c]. It must not matter which side is which.
      both: whether to reduce each column over the rows as well.
      chunk: the largest side of a tile; by default 1024 on CPU, where a tile then stays in the cache, 8192 on GPU, 4096
        elsewhere, or somewhat less, so that tiles are of equal size.

    Returns:
      Values [N] of the rows; and [M] of the columns, or None.

    Raises:
      InputError: for a chunk below 1.
    """
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk must be at least 1, the largest side of a tile; got {chunk}")
    return _values(reduction, pairs, both, chunk, rows, columns)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _values(reduction, pairs, both, chunk, rows, columns):
    def along(one, other):
        def part(row, column):
            return reduction.part(_scores(pairs, row, column))

        return reduction.value(sweep(part, reduction.merge, reduction.empty, one, other, chunk))

    return along(rows, rows if columns is None else columns), along(columns, rows) if both else None


def _forward(reduction, pairs, both, chunk, rows, columns):
    values = _values(reduction, pairs, both, chunk, rows, columns)  # as a whole, so that it is differentiable again
    return values, (rows, columns, values)


def _backward(reduction, pairs, both, chunk, kept, changes):
    """The weight of a score is Σ change · slope, over its row's and its column's value; daᵢ = Σⱼ weight · bⱼ."""
    rows, columns, values = kept

    def part(row, column):
        (row, *of_row), (column, *of_column) = row, column
        scores = _scores(pairs, row, column)
        weights = jnp.zeros((), scores.dtype)
        for axis, (value, change) in ((1, of_row), (0, of_column)):
            if value is not None:
                value, change = jnp.expand_dims(value, axis), jnp.expand_dims(change, axis)
                weights += change * reduction.slope(scores, value)
        return jnp.matmul(weights, column.x, precision=EXACT)

    one = rows, values[0], changes[0]
    other = one if columns is None else (columns, values[1], changes[1])

    def slopes(mine, theirs):
        return Side(sweep(part, jnp.add, 0, mine, theirs, chunk), None, None)  # pyright: ignore[reportArgumentType]

    return slopes(one, other), None if columns is None else slopes(other, one)


_values.defvjp(_forward, _backward)


def _scores(pairs: Pairs, row: Side, column: Side) -> jax.Array:
    """The scores [r, c], −∞ for pairs that don't count."""
    scores = jnp.matmul(row.x, column.x.T, precision=EXACT)
    counted = pairs(jax.tree.map(lambda x: x[:, None], row.tags), jax.tree.map(lambda x: x[None], column.tags))
    return jnp.where(row.keep[:, None] & column.keep[None] & counted, scores, -jnp.inf)


def sweep(part, merge, empty, rows: Tree, columns: Tree, chunk: int | None) -> Tree:
    """Merges `part(rows, columns)`, results per row, of all tiles along the columns: leaves [N, ...]."""
    size, width = (len(jax.tree.leaves(side)[0]) for side in (rows, columns))
    down, across = _tiles(size, chunk), _tiles(width, chunk)
    rows = jax.tree.map(lambda x: jnp.moveaxis(_fill(x, down).reshape(-1, down, *x.shape[1:]), 1, 0), rows)
    columns = jax.tree.map(lambda x: _fill(x, across), columns)

    def block(number):  # slicing a sharded axis is what gathers the columns, and XLA does so before the loops
        def cut(x):
            return jax.lax.dynamic_slice_in_dim(x, number * (len(x) // across), len(x) // across)

        return jax.tree.map(cut, columns)

    def along(row):
        def step(before, number):
            return merge(before, jax.checkpoint(part)(row, block(number))), None

        shapes = jax.eval_shape(lambda: part(row, block(0)))
        start = jax.tree.map(_full, empty, shapes)
        return jax.lax.scan(step, start, jnp.arange(across))[0]

    found = jax.lax.map(along, rows)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])[:size], found)


def _full(number: float, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns an array of one number; inside `shard_map` it varies over the axes that `like` does, as a loop asks."""
    axes = getattr(like, "vma", None) or getattr(getattr(like, "manual_axis_type", None), "varying", ())
    x = jnp.full(like.shape, number, like.dtype)
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x


def _tiles(size: int, chunk: int | None) -> int:
    """The number of tiles along a side: where chosen here one that divides it, if near, as filling up takes time."""
    if chunk is not None:
        return max(-(-size // chunk), 1)
    fewest = max(-(-size // LARGEST_TILE.get(jax.default_backend(), 4096)), 1)
    return next((count for count in range(fewest, 2 * fewest + 1) if size % count == 0), fewest)


def _fill(x: jax.Array, count: int) -> jax.Array:
    """Appends zeros, examples that are not kept, up to a multiple of count."""
    return jnp.pad(x, [(0, -len(x) % count)] + [(0, 0)] * (x.ndim - 1)) if len(x) % count else x
