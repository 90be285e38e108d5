"""Triplet losses against loops over all triples; masks against batches without the rows."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_checks import QUICK, agree, finite

import jaxtransfer as jt

triplet, mined_triplet = jt.losses.triplet, jt.losses.mined_triplet
MININGS = {"hard": jt.losses.batch_hard, "all": jt.losses.batch_all, "semi": jt.losses.semi_hard}
LABELS = np.array([1, 0, 1, 5, 0, 1, 0, 8], np.int32)


def distance(x, y, squared):
    square = np.sum((x - y) ** 2)
    return square if squared else np.sqrt(square)


def hinge(gap, margin):
    return np.log1p(np.exp(gap)) if margin is None else max(0, gap + margin)


def triplet_loop(a, p, n, margin, squared):
    triples = zip(a, p, n, strict=True)
    return np.array([hinge(distance(x, y, squared) - distance(x, z, squared), margin) for x, y, z in triples])


def mined_loop(x, margin, squared, mining, labels=LABELS):
    values = np.zeros(len(x))
    for i in range(len(x)):
        d = {j: distance(x[i], x[j], squared) for j in range(len(x)) if j != i}
        p, n = ([d[j] for j in d if (labels[j] == labels[i]) == same] for same in (True, False))
        if not p or not n:
            continue
        if mining == "hard":
            values[i] = hinge(max(p) - min(n), margin)
        elif mining == "all":
            values[i] = np.mean([hinge(near - far, margin) for near in p for far in n])
        else:
            chosen = [min([far for far in n if far > near], default=max(n)) for near in p]
            values[i] = np.mean([hinge(near - far, margin) for near, far in zip(p, chosen, strict=True)])
    return values


FORMS = [(0.2, False), (1.5, True), (None, False)]
MINED = [("hard", 0.2, False), ("hard", None, True), ("all", 1.5, False), ("semi", 0.2, True)]


def test_given_triples(rng):
    def losses(a, p, n):
        return jnp.stack([triplet(a, p, n, margin=margin, squared=squared) for margin, squared in FORMS])

    def loops(a, p, n):
        return np.stack([triplet_loop(a, p, n, margin, squared) for margin, squared in FORMS])

    agree(losses, loops, (rng.normal(size=(6, 3)), rng.normal(size=(6, 3)), 0.5 * rng.normal(size=(6, 3))), rng)


def everything(x, labels, mask=None):
    return jnp.stack([
        mined_triplet(x, labels, margin=margin, squared=squared, mining=MININGS[mining], mask=mask)
        for mining, margin, squared in MINED
    ])  # fmt: skip


def test_mined_triples(rng):
    def loops(x):
        return np.stack([mined_loop(x, margin, squared, mining) for mining, margin, squared in MINED])

    agree(lambda x: everything(x, LABELS), loops, (rng.normal(size=(8, 3)),), rng)


@pytest.mark.slow
def test_a_masked_example_is_not_there(rng, x64):
    x, keep, weights = rng.normal(size=(8, 3)), np.arange(8) % 3 != 1, rng.normal(size=8)

    @partial(jax.jit, compiler_options=QUICK)
    def run(x, labels, weights, mask=None):
        def total(x):
            values = everything(x, labels, mask)
            return jnp.sum(values * weights[None]), values

        return jax.value_and_grad(total, has_aux=True)(x)

    (_, values), slopes = run(np.where(keep[:, None], x, np.nan), LABELS, weights, keep)
    (_, expected), expected_slopes = run(x[keep], LABELS[keep], weights[keep])
    np.testing.assert_allclose(values[:, keep], expected, rtol=1e-11)
    np.testing.assert_allclose(slopes[keep], expected_slopes, rtol=1e-10, atol=1e-13)
    assert not np.any(values[:, ~keep])
    assert not np.any(slopes[~keep])


@pytest.mark.slow
def test_degenerate_features(rng):
    x = rng.normal(size=(8, 3))
    labels = (LABELS, np.zeros(8), np.arange(8))
    twins = x[[0, 0, 1, 1, 2, 2, 3, 3]]
    cases = [(z, y) for z in (np.zeros_like(x), twins, 1e4 * x) for y in labels]
    found = finite(lambda z, y: (everything(z, y.astype(jnp.int32)),), cases)
    for number, (_, y) in enumerate(cases):
        if y is not LABELS:
            np.testing.assert_array_equal(found[number][0], 0)  # no anchor has both a positive and a negative
    run = jax.jit(jax.value_and_grad(lambda z: jnp.sum(everything(z, jnp.zeros(1, jnp.int32)))), compiler_options=QUICK)
    assert not any(np.any(leaf) for leaf in run(jnp.ones((1, 3))))


def test_close_and_equal_rows_keep_their_digits(rng, x64):
    """In float32, of rows far from the origin and near to each other, as loops in float64 have them; twins get 0."""
    x = np.float32(100 + rng.normal(size=(1, 3)) + 1e-3 * rng.normal(size=(8, 3)))
    x[2], labels = x[0], jnp.asarray(LABELS)  # twins of one class
    run = jax.jit(lambda x: jax.value_and_grad(lambda x: jnp.sum(mined_triplet(x, labels, margin=1.0)))(x))
    (value, slope), (_, exact) = run(jnp.asarray(x)), run(jnp.asarray(x, jnp.float64))
    assert float(value) == pytest.approx(np.sum(mined_loop(np.float64(x), 1.0, False, "hard")), rel=1e-6)
    np.testing.assert_allclose(slope, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mining", MININGS)
def test_memory_grows_with_the_square_of_the_batch(mining):
    """Temporaries of the gradient in numbers: a few matrices [B, B], none of them [B, B, D]."""
    size, dim = 256, 128
    arguments = jax.ShapeDtypeStruct((size, dim), jnp.float32), jax.ShapeDtypeStruct((size,), jnp.int32)
    loss = partial(mined_triplet, mining=MININGS[mining])
    program = jax.jit(jax.grad(lambda x, labels: jnp.mean(loss(x, labels)))).lower(*arguments).compile()
    needed = program.memory_analysis().temp_size_in_bytes / 4
    assert needed < 20 * size**2 < size**2 * dim / 5


def test_half_precision(rng):
    x = jnp.bfloat16(rng.normal(size=(8, 3)))
    for losses in (lambda x: mined_triplet(x, LABELS), lambda x: triplet(x, x, x)):
        assert jax.eval_shape(losses, x).dtype == jnp.float32


def test_wrong_shapes_are_refused():
    x = jnp.zeros((4, 3))
    with pytest.raises(jt.InputError, match=r"\[batch, dim\] of one shape; got \(4, 3\), \(4, 3\), \(3, 3\)"):
        triplet(x, x, x[:3])
    with pytest.raises(jt.InputError, match=r"labels integers \[batch\]; got \(4, 3\) and float32 \(4,\)"):
        mined_triplet(x, jnp.zeros(4))
