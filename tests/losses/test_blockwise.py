"""Reductions over all pairs against the matrix itself: value, gradient, gradient of the gradient, devices, memory."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from loss_checks import QUICK

import jaxtransfer as jt
from jaxtransfer.losses.blockwise import LOG_SUM_EXP, SOFTPLUS_SUM, Side, every_pair, others, reduce_pairs

N, M, D = 7, 10, 3


def plain(reduction, rows, columns, pairs):
    scores = rows.x @ columns.x.T
    counted = pairs(rows.tags[:, None], columns.tags[None]) & rows.keep[:, None] & columns.keep[None]
    if reduction is SOFTPLUS_SUM:
        return tuple(jnp.sum(jnp.where(counted, jax.nn.softplus(scores), 0), axis=axis) for axis in (1, 0))
    return tuple(jax.nn.logsumexp(scores, axis=axis, where=counted) for axis in (1, 0))


def weigh(values):
    """A sum that tells entries apart, empty ones left out, and is not linear."""
    kept = [jnp.where(jnp.isfinite(value), value, 0) for value in values if value is not None]
    return sum(jnp.sum(jnp.sin(value) * jnp.arange(1, len(value) + 1)) for value in kept)


@pytest.fixture
def sides(rng):
    keep, tags = np.arange(N) != 4, np.array([0, 1, 2, 2, 1, 5, 9])
    column_keep = np.arange(M) % 4 != 1
    return (
        (rng.normal(size=(N, D)), rng.normal(size=(M, D)) + 0.5),
        (jnp.array(keep), jnp.array(column_keep), jnp.array(tags), jnp.array([2, 2, 0, 3, 1, 1, 2, 8, 2, 2])),
    )


def forms(arrays, rest, reduction, reduce):
    """Two sides with a rule, both ways and by rows alone; one side against itself."""
    (a, b), (keep_a, keep_b, tags_a, tags_b) = arrays, rest
    rows, columns = Side(a, keep_a, tags_a), Side(b, keep_b, tags_b)
    everything = Side(a, jnp.ones(N, bool), tags_a)
    return (
        *reduce(reduction, rows, columns, others, True),
        reduce(reduction, everything, columns, every_pair, False)[0],
        reduce(reduction, rows, None, others, False)[0],
    )


def by_matrix(reduction, rows, columns, pairs, both):
    return plain(reduction, rows, rows if columns is None else columns, pairs)


@pytest.mark.parametrize(
    ("reduction", "chunks"), [(LOG_SUM_EXP, (1, 3, 64)), (SOFTPLUS_SUM, (4,))], ids=["exp", "softplus"]
)
def test_tiles_of_any_size_are_the_matrix(sides, reduction, chunks, x64):
    arrays, rest = jax.tree.map(jnp.asarray, sides)

    def run(reduce):
        def total(arrays):
            values = forms(arrays, rest, reduction, reduce)
            return weigh(values), values

        return jax.jit(jax.value_and_grad(total, has_aux=True), compiler_options=QUICK)(arrays)

    expected = run(by_matrix)
    assert np.isneginf(expected[0][1][0][4]) or reduction is SOFTPLUS_SUM  # a row without pairs is among them
    for chunk in chunks:

        def by_tiles(reduction, rows, columns, pairs, both, chunk=chunk):
            return reduce_pairs(reduction, rows, columns, pairs=pairs, both=both, chunk=chunk)

        for found, exact in zip(*(jax.tree.leaves(result) for result in (run(by_tiles), expected)), strict=True):
            assert found.dtype == jnp.float64
            np.testing.assert_allclose(found, exact, rtol=1e-11, atol=1e-12)


@pytest.mark.slow
def test_the_gradient_has_a_gradient(sides, x64):
    arrays, rest = jax.tree.map(jnp.asarray, sides)

    def by_tiles(reduction, rows, columns, pairs, both):
        return reduce_pairs(reduction, rows, columns, pairs=pairs, both=both, chunk=4)

    def curve(reduce):
        slopes = jax.grad(lambda arrays: weigh(forms(arrays, rest, LOG_SUM_EXP, reduce)))
        steep = jax.grad(lambda arrays: sum(jnp.sum(jnp.cos(leaf)) for leaf in jax.tree.leaves(slopes(arrays))))
        return jax.jit(steep, compiler_options=QUICK)(arrays)

    for found, exact in zip(curve(by_tiles), curve(by_matrix), strict=True):
        np.testing.assert_allclose(found, exact, rtol=1e-9, atol=1e-11)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda a: reduce_pairs(LOG_SUM_EXP, Side(a, rest[0], rest[2]))[0], arrays[:1], arrays[:1])


def test_a_chunk_has_a_size():
    with pytest.raises(jt.InputError, match="chunk must be at least 1, the largest side of a tile; got 0"):
        reduce_pairs(LOG_SUM_EXP, Side(jnp.zeros((2, 2)), jnp.ones(2, bool)), chunk=0)


def total(a, b, chunk):
    number = jnp.arange(len(a))
    one, other = (Side(x, jnp.ones(len(a), bool), number) for x in (a, b))
    rows, columns = reduce_pairs(LOG_SUM_EXP, one, other, pairs=others, both=True, chunk=chunk)
    own, _ = reduce_pairs(LOG_SUM_EXP, one, pairs=others, chunk=chunk)
    assert columns is not None
    return jnp.mean(rows * columns + own)


def on_devices(count, chunk):
    rows = NamedSharding(Mesh(np.array(jax.devices()[:count]), ("data",)), PartitionSpec("data"))
    slopes = jax.value_and_grad(lambda a, b: total(a, b, chunk), argnums=(0, 1))
    return jax.jit(slopes, in_shardings=rows, out_shardings=(None, (rows, rows)), compiler_options=QUICK)


@pytest.mark.slow
def test_devices_keep_their_rows(rng):
    """The same numbers on eight devices, columns gathered once and not in the loops, less memory on each."""
    a, b = (np.float32(rng.normal(size=(512, 8))) for _ in range(2))
    compiled = {count: on_devices(count, 256).lower(a, b).compile() for count in (1, 8)}
    found = {count: run(a, b) for count, run in compiled.items()}
    for one, eight in zip(*(jax.tree.leaves(result) for result in found.values()), strict=True):
        np.testing.assert_allclose(eight, one, rtol=0, atol=1e-5 * np.max(np.abs(one)))
    memory = {count: run.memory_analysis() for count, run in compiled.items()}
    one, eight = (m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes for m in memory.values())
    assert eight < 0.7 * one
    text = compiled[8].as_text()
    entry = text[text.index("\nENTRY ") :]
    assert re.search(r" all-gather\(", entry)
    assert not re.search(r" (all-gather|all-reduce|all-to-all|collective-permute)(-start)?\(", text.replace(entry, ""))
    assert not re.search(r"f32\[512,512\]", text)
