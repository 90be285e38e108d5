"""Contrastive losses against loops in NumPy over all pairs; masks against batches without the rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_checks import QUICK, agree

import jaxtransfer as jt

info_nce, nt_xent, dcl, supcon, siglip = (
    getattr(jt.losses, name) for name in ("info_nce", "nt_xent", "dcl", "supcon", "siglip")
)
LABELS = np.array([3, 0, 3, -2, 0, 3, 7], np.int32)


def unit(x):
    return x / np.sqrt(np.sum(x**2, axis=-1, keepdims=True))


def log_sum(scores):
    top = max(scores)
    return top + np.log(sum(np.exp(s - top) for s in scores))


def info_nce_loop(a, p, t):
    return np.array([log_sum([a[i] @ x / t for x in p]) - a[i] @ p[i] / t for i in range(len(a))])


def queue_loop(a, p, negatives, t):
    values = []
    for i in range(len(a)):
        own = a[i] @ p[i] / t
        values.append(
            log_sum([own, *(a[i] @ n / t for n in (negatives if negatives.ndim == 2 else negatives[i]))]) - own
        )
    return np.array(values)


def nt_xent_loop(z1, z2, t):
    z, n = np.concatenate([unit(z1), unit(z2)]), len(z1)
    values = np.zeros(2 * n)
    for i in range(2 * n):
        values[i] = log_sum([z[i] @ z[j] / t for j in range(2 * n) if j != i]) - z[i] @ z[(i + n) % (2 * n)] / t
    return (values[:n] + values[n:]) / 2


def dcl_loop(z1, z2, t, weights):
    z1, z2 = unit(z1), unit(z2)
    values = np.zeros(len(z1))
    for one, other in ((z1, z2), (z2, z1)):
        for i in range(len(one)):
            rest = [one[i] @ z[j] / t for z in (one, other) for j in range(len(one)) if j != i]
            values[i] += (log_sum(rest) - weights[i] * (one[i] @ other[i]) / t) / 2
    return values


def sigma_weights(z1, z2, sigma):
    close = np.exp(np.sum(unit(z1) * unit(z2), axis=1) / sigma)
    return 2 - close / np.mean(close)


def supcon_loop(z, labels, t, inside):
    values = np.zeros(len(z))
    for i in range(len(z)):
        scores = {j: z[i] @ z[j] / t for j in range(len(z)) if j != i}
        logs = [scores[j] - log_sum(list(scores.values())) for j in scores if labels[j] == labels[i]]
        if logs:
            values[i] = -np.log(np.mean(np.exp(logs))) if inside else -np.mean(logs)
    return values


def siglip_loop(a, b, t, bias):
    values = np.zeros(len(a))
    for i, j in np.ndindex(len(a), len(b)):
        values[i] += np.log1p(np.exp(-(1 if i == j else -1) * (a[i] @ b[j] / t + bias)))
    return values


@pytest.fixture
def pair(rng):
    return rng.normal(size=(7, 3)), 0.7 * rng.normal(size=(7, 3)) + 0.3


def test_losses_are_their_formulas(rng, pair):
    """With gradients of both sides, the temperature and the bias."""

    def losses(a, b, t, bias):
        return jnp.stack([
            info_nce(a, b, temperature=t, chunk=3),
            info_nce(a, b, temperature=t, symmetric=True, normalize=True, chunk=3),
            nt_xent(a, b, temperature=t, chunk=3),
            dcl(a, b, temperature=t, chunk=3),
            siglip(a, b, temperature=t, bias=bias, chunk=3),
            siglip(b, a, temperature=t, bias=bias, normalize=True, chunk=3),
        ])  # fmt: skip

    def loops(a, b, t, bias):
        x, y = unit(a), unit(b)
        return np.stack([
            info_nce_loop(a, b, t),
            (info_nce_loop(x, y, t) + info_nce_loop(y, x, t)) / 2,
            nt_xent_loop(a, b, t),
            dcl_loop(a, b, t, np.ones(7)),
            siglip_loop(a, b, t, bias),
            siglip_loop(y, x, t, bias),
        ])  # fmt: skip

    agree(losses, loops, (*pair, np.array(0.4), np.array(-0.8)), rng)


@pytest.mark.slow
def test_given_negatives(rng, pair):
    def losses(a, p, shared, own, t):
        return jnp.stack([
            info_nce(a, p, temperature=t, negatives=shared, chunk=3),
            info_nce(a, p, temperature=t, negatives=shared, normalize=True),
            info_nce(a, p, temperature=t, negatives=own),
        ])  # fmt: skip

    def loops(a, p, shared, own, t):
        return np.stack([
            queue_loop(a, p, shared, t),
            queue_loop(unit(a), unit(p), unit(shared), t),
            queue_loop(a, p, own, t),
        ])  # fmt: skip

    agree(losses, loops, (*pair, rng.normal(size=(5, 3)), rng.normal(size=(7, 2, 3)), np.array(0.6)), rng)


def test_weights_of_decoupled_losses(rng, pair):
    weights = {sigma: sigma_weights(*pair, sigma) for sigma in (0.5, 2.0)}  # without a gradient

    def losses(a, b, t):
        return jnp.stack([dcl(a, b, temperature=t, sigma=sigma) for sigma in weights])

    def loops(a, b, t):
        return np.stack([dcl_loop(a, b, t, weight) for weight in weights.values()])

    agree(losses, loops, (*pair, np.array(0.3)), rng)


@pytest.mark.slow
def test_supervised_contrast(rng, pair):
    views = np.stack(pair, axis=1)

    def losses(z, views, t):
        return jnp.stack([
            supcon(z, LABELS, temperature=t, chunk=3),
            supcon(z, LABELS, temperature=t, base_temperature=None, inside=True, chunk=3),
            supcon(views, LABELS, temperature=t, base_temperature=0.3),
            supcon(views, LABELS, temperature=t, base_temperature=None, inside=True),
        ])  # fmt: skip

    def loops(z, views, t):
        flat, twice = views.reshape(14, 3), np.repeat(LABELS, 2)
        outer, inner = (supcon_loop(flat, twice, t, inside).reshape(7, 2).mean(axis=1) for inside in (False, True))
        return np.stack([
            supcon_loop(z, LABELS, t, False) * t / 0.07,
            supcon_loop(z, LABELS, t, True),
            outer * t / 0.3,
            inner,
        ])  # fmt: skip

    agree(losses, loops, (pair[0], views, np.array(0.5)), rng)


def everything(a, b, labels, negatives, mask=None):
    own = jnp.stack([a + b, -b], axis=1)
    return jnp.stack([
        info_nce(a, b, temperature=0.5, symmetric=True, chunk=4, mask=mask),
        info_nce(a, b, temperature=0.5, negatives=negatives, mask=mask),
        info_nce(a, b, temperature=0.5, negatives=own, normalize=True, mask=mask),
        nt_xent(a, b, mask=mask),
        dcl(a, b, sigma=0.5, mask=mask),
        supcon(jnp.stack([a, b], axis=1), labels, mask=mask),
        supcon(a, labels, inside=True, mask=mask),
        siglip(a, b, temperature=0.1, bias=-10.0, mask=mask),
    ])  # fmt: skip


def slopes(a, b, labels, negatives, weights, mask=None):
    def total(a, b, negatives):
        values = everything(a, b, labels, negatives, mask)
        return jnp.sum(values * weights[None]), values

    return jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(a, b, negatives)


run = jax.jit(slopes, compiler_options=QUICK)


@pytest.mark.slow
def test_a_masked_example_is_not_there(rng, pair, x64):
    keep, weights, negatives = np.arange(7) % 3 != 1, rng.normal(size=7), rng.normal(size=(4, 3))
    garbage = np.where(keep[:, None], pair[0], np.nan), np.where(keep[:, None], pair[1], np.inf)
    (_, values), found = run(*garbage, LABELS, negatives, weights, jnp.float32(keep))
    (_, exact), expected = run(*(x[keep] for x in pair), LABELS[keep], negatives, weights[keep])
    np.testing.assert_allclose(values[:, keep], exact, rtol=1e-10, atol=1e-12)
    assert not np.any(values[:, ~keep])
    for one, other in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_allclose(one[keep], other, rtol=1e-9, atol=1e-12)
        assert not np.any(one[~keep])
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-9, atol=1e-12)
    alone = run(*garbage, LABELS, negatives, weights, jnp.float32(np.eye(7)[2]))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(alone))
    (_, values), found = run(*garbage, LABELS, negatives, weights, jnp.zeros(7, jnp.float32))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((values, found)))


def test_degenerate_embeddings(pair):
    x, y = np.float32(pair)
    zero, same, negatives = np.zeros_like(x), np.tile(x[:1], (7, 1)), y[:4]
    one_class, no_pair = np.zeros(7, np.int32), np.arange(7, dtype=np.int32)
    cases = [(zero, y), (x, zero), (zero, zero), (same, same), (x, x), (x, -x), (1e4 * x, y), (1e4 * same, -same)]
    for a, b in cases:
        for labels in (LABELS, one_class, no_pair):
            for leaf in jax.tree.leaves(run(a, b, labels, negatives, np.ones(7, np.float32))):
                assert np.all(np.isfinite(leaf))
    (_, values), _ = run(same, same, one_class, negatives, np.ones(7, np.float32))
    np.testing.assert_allclose(values[0], np.log(7), rtol=1e-5)  # nothing tells the examples apart
    np.testing.assert_allclose(values[3], np.log(13), rtol=1e-5)
    values, _ = run(x, y, no_pair, negatives, np.ones(7, np.float32))
    np.testing.assert_array_equal(values[1][6], 0)  # no positive


@pytest.mark.slow
def test_nan_stays_nan_and_temperatures_are_checked(pair):
    x, y = (jnp.asarray(z, jnp.float32) for z in pair)
    one_nan = x.at[2, 1].set(jnp.nan)
    centre, soft = jnp.zeros(x.shape[1]), [x, y]
    losses = {
        "info_nce": lambda x, t: info_nce(x, y, temperature=t),
        "nt_xent": lambda x, t: nt_xent(x, y, temperature=t),
        "dcl": lambda x, t: dcl(x, y, temperature=t),
        "supcon": lambda x, t: supcon(x, LABELS, temperature=t),
        "siglip": lambda x, t: siglip(x, y, temperature=t, bias=0.0),
        "swav": lambda x, t: jt.losses.swav([x, y], temperature=t),
        "dino": lambda x, t: jt.losses.dino([x, y], soft, center=centre, student_temperature=t),
    }
    without = {
        "triplet": lambda x: jt.losses.triplet(x, y, y + 1),
        "mined_triplet": lambda x: jt.losses.mined_triplet(x, LABELS),
        "barlow_twins": lambda x: jt.losses.barlow_twins(x, y),
        "vicreg": lambda x: jt.losses.vicreg(x, y),
        "negative_cosine": lambda x: jt.losses.negative_cosine(x, y),
    }
    every = {**{name: lambda x, loss=loss: loss(x, 0.5) for name, loss in losses.items()}, **without}
    found = jax.jit(lambda x: {k: jnp.mean(loss(x)) for k, loss in every.items()}, compiler_options=QUICK)(one_nan)
    assert [name for name, value in found.items() if not np.isnan(value)] == []
    for loss in losses.values():
        for temperature in (0.0, -1.0, np.inf):
            with pytest.raises(jt.InputError, match="temperature must be positive and finite"):
                loss(x, temperature)


@pytest.mark.slow
def test_a_batch_of_one(pair):
    def losses(x, y):
        found = [nt_xent(x, y), dcl(x, y, sigma=0.5), info_nce(x, y, temperature=0.5), supcon(x, LABELS[:1])]
        return jnp.sum(jnp.stack(found))

    run = jax.jit(jax.value_and_grad(losses, argnums=(0, 1)), compiler_options=QUICK)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(run(*(np.float32(z[:1]) for z in pair))))


def test_a_small_loss_keeps_its_digits():
    z = 8 * jnp.eye(4)
    values = jax.jit(lambda z: info_nce(z, z, temperature=1.0), compiler_options=QUICK)(z)
    np.testing.assert_allclose(values, np.log1p(3 * np.exp(-64.0)), rtol=1e-5)


def test_half_precision_and_learned_scalars(pair):
    half = [jnp.bfloat16(z) for z in pair]
    losses = jax.jit(
        lambda a, b, t, bias: (nt_xent(a, b), siglip(a, b, temperature=t, bias=bias)), compiler_options=QUICK
    )
    values = losses(*half, jnp.float32(0.1), jnp.float32(-1))
    assert all(value.dtype == jnp.float32 for value in values)
    np.testing.assert_allclose(values, losses(*(jnp.float32(z) for z in half), 0.1, -1.0), rtol=1e-6)
    grads = jax.eval_shape(jax.grad(lambda a, b: jnp.sum(nt_xent(a, b)), argnums=(0, 1)), *half)
    assert all(g.dtype == jnp.bfloat16 for g in grads)


@pytest.mark.slow
def test_memory_is_linear():
    """Compiled, not run: value and gradient of 4096 pairs, whose matrix of 8192² takes 268 MB."""
    z = jax.ShapeDtypeStruct((4096, 128), jnp.float32)
    for loss in (nt_xent, lambda a, b: info_nce(a, b, temperature=0.1, symmetric=True)):
        grads = jax.jit(jax.value_and_grad(lambda a, b, f=loss: jnp.mean(f(a, b)), argnums=(0, 1)))
        compiled = grads.lower(z, z).compile(QUICK)
        assert compiled.memory_analysis().temp_size_in_bytes < 4096**2 * 4 / 2


def test_wrong_shapes_are_refused():
    x = jnp.zeros((4, 3))
    for loss in (nt_xent, dcl):
        with pytest.raises(jt.InputError, match=r"embeddings \[batch, dim\] of one shape.*got \(4, 3\) and \(4, 2\)"):
            loss(x, x[:, :2])
    with pytest.raises(jt.InputError, match=r"negatives must be \[any, 3\], shared, or \[4, any, 3\].*got \(5, 2, 3\)"):
        info_nce(x, x, temperature=1.0, negatives=jnp.zeros((5, 2, 3)))
    with pytest.raises(jt.InputError, match="symmetric needs the negatives of the batch"):
        info_nce(x, x, temperature=1.0, negatives=x, symmetric=True)
    with pytest.raises(jt.InputError, match=r"labels integers \[batch\]; got \(4, 3\) and float32 \(4,\)"):
        supcon(x, jnp.zeros(4))
    with pytest.raises(jt.InputError, match=r"mask must have one entry per example, \(4,\); got \(3,\)"):
        siglip(x, x, temperature=1.0, bias=0.0, mask=jnp.ones(3))
