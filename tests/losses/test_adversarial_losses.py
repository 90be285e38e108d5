"""Losses of adversaries against loops in double precision and, for reversed gradients, against derivatives by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_checks import QUICK, agree, finite, single

import jaxtransfer as jt

L = jt.losses


def compiled(function):
    return jax.jit(function, compiler_options=QUICK)


def test_reversal_is_the_identity_to_the_bit_for_whatever_stands_there(rng):
    x = np.float32([0.0, -0.0, 1e-45, 1e38, np.inf, -np.inf, np.nan, *rng.normal(size=9)])
    run = compiled(L.gradient_reversal)
    for coefficient in (0.0, 0.3, 1e30):
        assert np.asarray(run(x, coefficient)).tobytes() == x.tobytes()
    assert L.gradient_reversal(jnp.ones(2, jnp.bfloat16), 0.5).dtype == jnp.bfloat16


def test_reversal_of_any_order_and_mode(rng):
    """f(R(g(x))) with g = x³, f = sin: the first derivative is −c f'g', the second that of this formula, and so on."""
    x, c = float(rng.normal()), 0.7

    def value(x, c):
        return jnp.sin(L.gradient_reversal(x**3, c))

    with jax.enable_x64(True):

        def all_of_them(x, c):
            first = jax.grad(value)
            forward = jax.jvp(lambda x: value(x, c), (x,), (1.0,))[1]
            second = jax.grad(first)(x, c), jax.jvp(lambda x: first(x, c), (x,), (1.0,))[1]
            return first(x, c), forward, *second, jax.grad(value, argnums=1)(x, c), jax.grad(first, argnums=1)(x, c)

        first, forward, back, ahead, by_c, mixed = compiled(all_of_them)(x, c)
    slope = -c * np.cos(x**3) * 3 * x**2  # what is differentiated again: cos at R(x³), a reversal itself, times x²
    assert [float(first), float(forward)] == pytest.approx([slope, slope])
    again = -c * (-np.sin(x**3) * -c * 3 * x**2 * 3 * x**2 + np.cos(x**3) * 6 * x)
    assert [float(back), float(ahead)] == pytest.approx([again, again])
    assert float(by_c) == 0
    assert float(mixed) == pytest.approx(slope / c)


def test_reversal_under_vmap_and_a_scan_of_schedules(rng):
    x, rates = jnp.float32(rng.normal(size=(3, 4))), jnp.float32([0.0, 0.5, 2.0])

    def total(x):
        rows = jax.vmap(L.gradient_reversal)(x, rates)
        _, others = jax.lax.scan(lambda carry, pair: (carry, L.gradient_reversal(*pair)), 0, (x, rates))
        return jnp.sum(rows + 10 * others)

    np.testing.assert_allclose(compiled(jax.grad(total))(x), -11 * np.asarray(rates)[:, None] * np.ones((3, 4)))


def test_reversal_refuses():
    with pytest.raises(jt.InputError, match="only floats"):
        L.gradient_reversal(jnp.arange(3))
    with pytest.raises(jt.InputError, match="is a scalar"):
        L.gradient_reversal(jnp.ones(3), jnp.ones(3))


def discrepancy(p1, p2):
    return np.array(
        [sum(abs(a - b) for a, b in zip(*pair, strict=True)) / len(pair[0]) for pair in zip(p1, p2, strict=True)]
    )


def test_classifier_discrepancy(rng):
    arrays = [rng.dirichlet(np.ones(5), size=4) for _ in range(2)]
    agree(L.classifier_discrepancy, discrepancy, arrays, rng)
    single(L.classifier_discrepancy, discrepancy, arrays)
    same = jnp.float32(arrays[0])
    value, gradient = jax.value_and_grad(lambda p: jnp.sum(L.classifier_discrepancy(p, same)))(same)
    assert float(value) == 0
    assert not np.any(gradient)
    for wrong in ((jnp.ones(3), jnp.ones(3)), (jnp.ones((3, 2)), jnp.ones((3, 4)))):
        with pytest.raises(jt.InputError, match="batch, classes"):
            L.classifier_discrepancy(*wrong)


def disparity(source, source_adversarial, target, target_adversarial, margin=4.0):
    """Example by example, 1 − p as it is released."""
    near = far = 0.0
    for clear, scores in zip(source, source_adversarial, strict=True):
        shifted = scores - scores.max()
        near += -(shifted - np.log(np.exp(shifted).sum()))[np.argmax(clear)] / len(source)
    for clear, scores in zip(target, target_adversarial, strict=True):
        p = np.exp(scores - scores.max())
        p = p[np.argmax(clear)] / p.sum()
        far += np.log(min(1 - p + 1e-6, 1)) / len(target)
    return far - margin * near


@pytest.mark.parametrize("margin", [4.0, 1.5, 0.0])
def test_mdd(rng, margin):
    """Values, and slopes along random directions, of domains of unequal size; predicted logits get no gradient."""
    arrays = [2 * rng.normal(size=size) for size in ((5, 3), (5, 3), (4, 3), (4, 3))]
    agree(L.mdd, disparity, arrays, rng, margin=margin)
    slopes = compiled(jax.grad(functools.partial(L.mdd, margin=margin), argnums=(0, 2)))(*map(jnp.float32, arrays))
    assert not any(np.any(slope) for slope in slopes)


def test_mdd_leaves_rows_out(rng):
    arrays = [rng.normal(size=size) for size in ((5, 3), (5, 3), (4, 3), (4, 3))]
    keep = np.array([1, 0, 1, 1, 0], bool), np.array([0, 1, 1, 0], bool)
    garbage = [np.where(keep[n // 2][:, None], x, np.nan) for n, x in enumerate(arrays)]
    kept = [x[keep[n // 2]] for n, x in enumerate(arrays)]
    run = compiled(jax.value_and_grad(lambda arrays, s, t: L.mdd(*arrays, source_mask=s, target_mask=t)))
    with jax.enable_x64(True):
        value, gradients = run([jnp.asarray(x) for x in garbage], *map(jnp.asarray, keep))
        assert float(value) == pytest.approx(disparity(*kept), rel=1e-12)
        assert all(np.all(np.isfinite(g)) for g in gradients)
        nothing, gradients = run([jnp.full(x.shape, jnp.nan) for x in arrays], jnp.zeros(5, bool), jnp.zeros(4, bool))
        assert float(nothing) == 0
        assert not any(np.any(g) for g in gradients)


@pytest.mark.slow
def test_mdd_is_finite_where_the_adversary_is_sure(rng):
    sure = np.array([[100.0, 0, 0], [0, 1e30, 0], [0, 0, 0], [-1e30, 0, 0]])
    finite(lambda a, b: [L.mdd(a, b, b, a)], [(sure, sure), (sure, -sure), (sure[:1], sure[1:2])])
    far = L.mdd(sure[2:3], jnp.float32(sure[2:3]), jnp.float32(sure[:1]), jnp.float32(sure[:1]), margin=0.0)
    assert float(far) == pytest.approx(np.log(1e-6), rel=1e-6)


def test_mdd_refuses():
    x = jnp.ones((2, 3))
    with pytest.raises(jt.InputError, match="of one shape"):
        L.mdd(x, jnp.ones((3, 3)), x, x)
    with pytest.raises(jt.InputError, match="margin"):
        L.mdd(x, x, x, x, margin=-1.0)


def unknown(logits, threshold=0.5):
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p = p[:, -1] / p.sum(axis=1)
    return -threshold * np.log(p + 1e-6) - (1 - threshold) * np.log(1 - p + 1e-6)


def test_open_set(rng):
    logits = 2 * rng.normal(size=(5, 4))
    agree(L.open_set, unknown, [logits], rng, threshold=0.3)
    single(L.open_set, unknown, [logits])
    finite(lambda x: [L.open_set(x)], [(np.array([[1e30, 0], [0, 1e30], [-1e30, 0]]),), (np.zeros((1, 2)),)])
    with pytest.raises(jt.InputError, match="known classes"):
        L.open_set(jnp.ones((2, 1)))
    with pytest.raises(jt.InputError, match="threshold"):
        L.open_set(jnp.ones((2, 3)), threshold=1.5)


def strongest(source, target, k=1):
    values = (np.linalg.eigvalsh(rows @ rows.T)[::-1] for rows in (source, target))
    return sum(np.sum(one[:k]) for one in values)


@pytest.mark.parametrize(("sizes", "k"), [((5, 3, 8), 1), ((4, 6, 3), 2), ((4, 4, 4), 4)])
def test_bsp(rng, sizes, k):
    arrays = [rng.normal(size=(rows, sizes[2])) for rows in sizes[:2]]
    agree(functools.partial(L.bsp, k=k), functools.partial(strongest, k=k), arrays, rng)
    value = compiled(functools.partial(L.bsp, k=k))(*map(jnp.float32, arrays))
    assert float(value) == pytest.approx(strongest(*arrays, k=k), rel=1e-5)


def test_bsp_leaves_rows_out(rng):
    arrays = [rng.normal(size=(rows, 4)) for rows in (6, 5)]
    run = compiled(jax.value_and_grad(lambda pair, s, t: L.bsp(*pair, k=2, source_mask=s, target_mask=t)))
    for rows in (([0, 2, 3], [1, 4]), ([5], [0, 1, 2, 3, 4]), ([], [2])):
        keep = [np.isin(np.arange(len(x)), own) for x, own in zip(arrays, rows, strict=True)]
        garbage = [np.where(own[:, None], x, np.nan) for x, own in zip(arrays, keep, strict=True)]
        with jax.enable_x64(True):
            value, gradients = run([jnp.asarray(x) for x in garbage], *map(jnp.asarray, keep))
        expected = 0.0
        for x, own, gradient in zip(arrays, keep, gradients, strict=True):
            u, s, vt = np.linalg.svd(x[own], full_matrices=False)
            expected += np.sum(s[:2] ** 2)
            np.testing.assert_allclose(np.asarray(gradient)[own], 2 * (u[:, :2] * s[:2]) @ vt[:2], atol=1e-12)
            assert not np.any(np.asarray(gradient)[~own])
        assert float(value) == pytest.approx(expected, rel=1e-12)


def test_bsp_is_finite_where_values_repeat_or_vanish(rng):
    rank_one = np.outer(rng.normal(size=4), rng.normal(size=4))
    cases = [np.zeros((4, 4)), np.eye(4), rank_one, np.ones((4, 4)), np.diag([2, 1, 1, 0.0])]
    values = finite(lambda x: (L.bsp(x, x), L.bsp(x, x[:3], k=2)), [(case,) for case in cases])
    expected = [strongest(x, x) for x in cases], [strongest(x, x[:3], k=2) for x in cases]
    np.testing.assert_allclose(
        [[float(v) for v in pair] for pair in values], np.transpose(expected), rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize(
    ("shapes", "k", "message"),
    [(((4,), (4,)), 1, "of one width"), (((4, 3), (4, 2)), 1, "of one width"), (((4, 3), (2, 3)), 3, r"\[1, 2\]")],
)
def test_bsp_refuses(shapes, k, message):
    with pytest.raises(jt.InputError, match=message):
        L.bsp(*(jnp.ones(shape) for shape in shapes), k=k)


@pytest.mark.slow
def test_split_over_devices_they_are_those_of_the_whole_batch(rng):
    """Under pmap, with rows left out: each device has the whole value, and the mean of the gradients is the whole's."""
    rows = [jnp.float32(rng.normal(size=size)) for size in ((8, 3), (8, 3), (4, 3), (4, 3))]
    masks = jnp.float32([1, 1, 0, 1, 1, 1, 1, 0]), jnp.float32([1, 0, 1, 1])
    kernel = jnp.float32(rng.normal(size=(3, 3)))

    def total(kernel, rows, masks, name):
        options = {"source_mask": masks[0], "target_mask": masks[1], "axis_name": name}
        source, source_adversarial, target, target_adversarial = (x @ kernel for x in rows)
        far = L.mdd(source, source_adversarial, target, target_adversarial, margin=2.0, **options)
        return far + L.bsp(source, target, k=2, **options)

    expected = compiled(jax.value_and_grad(functools.partial(total, name=None)))(kernel, rows, masks)
    split = jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), (rows, masks))

    def run(kernel, rows, masks):
        value, slope = jax.value_and_grad(total)(kernel, rows, masks, "devices")
        return value, jax.lax.pmean(slope, "devices")

    found = jax.pmap(run, axis_name="devices", in_axes=(None, 0, 0), devices=jax.devices()[:4])(kernel, *split)
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, np.broadcast_to(want, got.shape), rtol=1e-5, atol=1e-5)
