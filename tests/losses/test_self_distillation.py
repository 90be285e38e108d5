"""BYOL's cosine, SwAV and DINO against loops in NumPy, with what their gradients must not reach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_checks import QUICK, agree, finite

import jaxtransfer as jt

dino, dino_center, negative_cosine, sinkhorn, swav = (
    getattr(jt.losses, name) for name in ("dino", "dino_center", "negative_cosine", "sinkhorn", "swav")
)


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / np.sum(e)


def sinkhorn_loop(scores, epsilon, iterations):
    """As released: a matrix [K, B] whose rows, then columns are scaled."""
    q = np.exp(scores / epsilon).T
    q = q / q.sum()
    for _ in range(iterations):
        for k in range(len(q)):
            q[k] /= q[k].sum() * len(q)
        for b in range(q.shape[1]):
            q[:, b] /= q[:, b].sum() * q.shape[1]
    return (q / q.sum(axis=0)).T


def cross(targets, views, temperature):
    values = np.zeros(len(views[0]))
    for b in range(len(values)):
        pairs = [(q[b], view[b]) for i, q in enumerate(targets) for v, view in enumerate(views) if i != v]
        values[b] = np.mean([-np.sum(q * np.log(softmax(s / temperature))) for q, s in pairs])
    return values


@pytest.fixture
def views(rng):
    return list(0.3 * rng.normal(size=(3, 5, 4)))


def test_negative_cosine(rng, views):
    def loop(p, t):
        return np.array([-(x @ y) / np.sqrt((x @ x) * (y @ y)) for x, y in zip(p, t, strict=True)])

    agree(negative_cosine, loop, views[:2], rng)
    zero = np.zeros((5, 4))
    found = finite(lambda p, t: (negative_cosine(p, t),), [(zero, zero), (zero, views[0]), (views[0], views[0])])
    np.testing.assert_allclose(found[2][0], -1, rtol=1e-6)
    np.testing.assert_array_equal(found[1][0], 0)
    assert negative_cosine(jnp.ones((1, 2), jnp.bfloat16), jnp.ones((1, 2), jnp.bfloat16)).dtype == jnp.float32


SETTINGS = [(0.05, 3), (0.5, 1), (0.3, 0)]


def test_sinkhorn(rng, views):
    def codes(scores, mask=None):
        return jnp.stack([sinkhorn(scores, epsilon=e, iterations=n, mask=mask) for e, n in SETTINGS])

    def loops(scores):
        return np.stack([sinkhorn_loop(scores, *setting) for setting in SETTINGS])

    agree(codes, loops, views[:1], rng)
    keep, run = np.arange(5) % 3 != 1, jax.jit(codes, compiler_options=QUICK)
    found = run(jnp.float32(np.where(keep[:, None], views[0], np.nan)), keep)
    np.testing.assert_allclose(found[:, keep], loops(views[0][keep]), rtol=1e-4, atol=1e-7)
    assert not np.any(found[:, ~keep])
    assert np.all(np.isfinite(run(jnp.float32(1e6 * views[0]), keep)))


def test_sinkhorn_spreads_the_examples(rng):
    scores = jnp.float32(rng.normal(size=(12, 3)))
    codes = jax.jit(lambda scores: sinkhorn(scores, epsilon=1.0, iterations=6), compiler_options=QUICK)(scores)
    np.testing.assert_allclose(jnp.sum(codes, axis=0), 4, rtol=1e-3)


def test_swav(rng, views):
    queues = list(0.3 * rng.normal(size=(2, 3, 4)))
    codes = [sinkhorn_loop(view, 0.1, 2) for view in views[:2]]  # without a gradient
    queued = [sinkhorn_loop(np.concatenate([q, v]), 0.05, 3)[3:] for q, v in zip(queues, views, strict=False)]

    def losses(views, t):
        given = swav(views, temperature=t, epsilon=0.1, iterations=2), swav(views, temperature=t, queues=queues)
        return jnp.stack([*given, swav(views, codes=1, temperature=t, epsilon=0.1, iterations=2)])

    def loops(views, t):
        return np.stack([cross(codes, views, t), cross(queued, views, t), cross(codes[:1], views, t)])

    agree(losses, loops, (views, np.array(0.4)), rng)


def test_swav_masks(rng, views):
    keep = np.arange(5) != 3
    run = jax.jit(jax.value_and_grad(lambda v, m: jnp.sum(swav(v, mask=m)[:3])), compiler_options=QUICK)
    garbage = [np.float32(np.where(keep[:, None], view, np.nan)) for view in views]
    value, slopes = run(garbage, np.float32(keep))
    expected, expected_slopes = run([np.float32(view[keep]) for view in views], np.ones(4, np.float32))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for one, other in zip(slopes, expected_slopes, strict=True):
        np.testing.assert_allclose(one[keep], other, rtol=1e-4, atol=1e-6)
        assert not np.any(one[~keep])
    value, slopes = run(garbage, np.zeros(5, np.float32))
    assert all(np.all(np.isfinite(leaf)) for leaf in (value, *slopes))


def test_dino(rng, views):
    teacher, center = list(rng.normal(size=(2, 5, 4))), rng.normal(size=4)
    targets = [np.stack([softmax((row - center) / 0.3) for row in view]) for view in teacher]

    def losses(views, t):
        return dino(views, teacher, center=jnp.asarray(center), student_temperature=t, teacher_temperature=0.3)

    agree(losses, lambda views, t: cross(targets, views, t), (views, np.array(0.5)), rng)
    slopes = jax.grad(lambda teacher, center: jnp.sum(dino(teacher, teacher, center=center)), argnums=1)
    np.testing.assert_array_equal(slopes([jnp.float32(view) for view in teacher], jnp.float32(center)), 0)


def test_dino_center(rng, views):
    center, keep = rng.normal(size=4).astype(np.float32), np.array([1, 1, 0, 1, 1], np.float32)
    garbage = [np.float32(np.where(keep[:, None] > 0, view, np.nan)) for view in views]
    moved = dino_center(center, garbage, momentum=0.7, mask=keep)
    rows = np.concatenate([view[keep > 0] for view in views])
    np.testing.assert_allclose(moved, 0.7 * center + 0.3 * rows.mean(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(dino_center(center, garbage, mask=np.zeros(5)), center)


def test_degenerate_logits(rng, views):
    zero, huge = np.zeros((5, 4)), 1e4 * rng.normal(size=(5, 4))

    def losses(one, two, center):
        return swav([one, two]), dino([one, two], [two], center=center), sinkhorn(one)

    finite(losses, [(zero, zero, zero[0]), (huge, -huge, zero[0]), (huge, zero, huge[0])])


def test_wrong_views_are_refused(views):
    views = [jnp.asarray(view) for view in views]
    with pytest.raises(jt.InputError, match=r"scores must be at least 2 views \[batch, outputs\] of one shape"):
        swav(views[:1])
    with pytest.raises(jt.InputError, match=r"codes must be between 1 and the 3 views.*got 4, None queues"):
        swav(views, codes=4)
    with pytest.raises(jt.InputError, match=r"teacher must be the first views of the student's 3 \(5, 4\)"):
        dino(views, views, center=jnp.zeros(3))
    with pytest.raises(jt.InputError, match=r"prediction and target must be \[batch, dim\] of one shape"):
        negative_cosine(views[0], views[1][:2])
    with pytest.raises(jt.InputError, match=r"scores must be \[batch, prototypes\]; got \(4,\)"):
        sinkhorn(views[0][0])
