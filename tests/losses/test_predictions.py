"""Losses of unlabelled predictions against loops in NumPy and the matrices of the released code."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from loss_checks import QUICK, agree, agree_masked, finite, single

import jaxtransfer as jt

entropy, mcc, bnm = jt.losses.entropy, jt.losses.mcc, jt.losses.bnm
information_maximization = jt.losses.information_maximization


def softmax(logits, temperature=1.0):
    logits = logits / temperature
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def entropy_loop(logits, temperature=1.0, eps=0.0):
    out = []
    for row in softmax(logits, temperature):
        out.append(-sum(p * np.log(p + eps) for p in row))
    return np.array(out)


def information_loop(logits, eps=1e-5, weights=None):
    weights = np.ones(len(logits)) if weights is None else weights
    mean = sum(w * p for w, p in zip(weights, softmax(logits), strict=True)) / weights.sum()
    sure = sum(w * h for w, h in zip(weights, entropy_loop(logits, eps=eps), strict=True)) / weights.sum()
    return np.array(sure + sum(p * np.log(p + eps) for p in mean))


def mcc_weights(logits, temperature=1.0):
    """What the released code cuts off from differentiation."""
    sure = 1 + np.exp(-entropy_loop(logits, temperature, 1e-5))
    return len(logits) * sure / sure.sum()


def mcc_loop(logits, temperature=1.0, held=None):
    """As released, by the confusion matrix; `held` are the weights, where they are not those of the logits."""
    p = softmax(logits, temperature)
    weights = mcc_weights(logits, temperature) if held is None else held
    confusion = np.zeros((p.shape[1],) * 2)
    for row, weight in zip(p, weights, strict=True):
        confusion += weight * np.outer(row, row)
    confusion = confusion / confusion.sum(1)
    return np.array((confusion.sum() - np.trace(confusion)) / len(confusion))


def bnm_loop(logits):
    return np.array(-np.linalg.norm(softmax(logits), "nuc") / len(logits))


@pytest.fixture
def logits(rng):
    return 2 * rng.normal(size=(7, 4))


def test_entropy(rng, logits):
    agree(entropy, entropy_loop, [logits], rng)
    agree(partial(entropy, temperature=2.5, eps=1e-3), partial(entropy_loop, temperature=2.5, eps=1e-3), [logits], rng)
    values = jax.jit(entropy)(jnp.float32(logits.reshape(7, 2, 2)))
    np.testing.assert_allclose(values.ravel(), entropy_loop(logits.reshape(14, 2)), rtol=1e-5)


def test_information_maximization(rng, logits):
    agree_masked(information_maximization, information_loop, [logits], rng)
    agree_masked(partial(information_maximization, eps=0), partial(information_loop, eps=0), [logits], rng)
    weights = np.array([2.0, 0, 1, 0.5, 3, 1, 1])
    value = jax.jit(information_maximization)(jnp.float32(logits), mask=jnp.float32(weights))
    np.testing.assert_allclose(value, information_loop(logits, weights=weights), rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_mcc(rng, logits, temperature):
    """The gradient is that of weights which are held."""
    keep = np.arange(7) % 3 != 1
    for kept in (np.ones(7, bool), keep):
        held = mcc_weights(logits[kept], temperature)
        loop = partial(mcc_loop, temperature=temperature, held=held)
        np.testing.assert_allclose(loop(logits[kept]), mcc_loop(logits[kept], temperature), rtol=1e-12)
        agree(partial(mcc, temperature=temperature), loop, [logits], rng, keep=kept)


@pytest.mark.parametrize("shape", [(7, 4), (3, 5), (4, 4)])
def test_bnm(rng, shape):
    agree_masked(bnm, bnm_loop, [2 * rng.normal(size=shape)], rng)


def test_defaults_in_single_precision(logits):
    def losses(x):
        return jnp.stack([information_maximization(x), mcc(x, temperature=2.0), bnm(x)])

    def loops(x):
        return np.stack([information_loop(x), mcc_loop(x, 2.0), bnm_loop(x)])

    single(losses, loops, [logits])


def test_degenerate_rows_are_finite_to_the_second_order(logits):
    keep, one, none = np.ones(7), np.eye(7)[2], np.zeros(7)
    same, sure = np.tile(logits[:1], (7, 1)), np.eye(4)[[0, 1, 2, 3, 0, 1, 1]]
    huge = 3e38 * (2 * sure - 1)
    flat, lost = np.zeros((7, 4)), logits * [1, 1, 1, 0] - [0, 0, 0, 300]  # the last class gets nothing, to rounding
    cases = [(x, m) for x in (same, flat, 1e4 * sure, huge, lost, -huge) for m in (keep, one)] + [(huge, none)]

    def losses(x, m):
        scalars = (information_maximization(x, mask=m), mcc(x, temperature=2.0, mask=m), bnm(x, mask=m))
        return *scalars, information_maximization(x, eps=0, mask=m), entropy(x)

    found = finite(losses, cases)
    np.testing.assert_array_equal(found[-1][:4], 0)
    np.testing.assert_allclose(found[0][3], 0, atol=1e-6)  # the same for all: nothing is told of a class
    np.testing.assert_allclose(found[3][:3], [0, 0.75, -0.5], atol=1e-4)  # one example, equal in all classes
    np.testing.assert_allclose(found[4][1], 0, atol=1e-6)  # sure, and each class there: no confusion
    np.testing.assert_allclose(found[6][1], 0, atol=1e-6)
    np.testing.assert_allclose(found[6][4], 0, atol=1e-6)


def test_the_second_derivative_of_bnm_is_that_of_finite_differences(rng):
    x, d = rng.normal(size=(2, 3, 4))
    with jax.enable_x64(True):
        slope = jax.jit(jax.grad(bnm), compiler_options=QUICK)
        curve = jax.jit(lambda x: jax.jvp(jax.grad(bnm), (x,), (jnp.asarray(d),))[1], compiler_options=QUICK)
        expected = (np.array(slope(x + 1e-5 * d)) - np.array(slope(x - 1e-5 * d))) / 2e-5
        np.testing.assert_allclose(curve(jnp.asarray(x)), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_devices_that_have_a_part_each_get_the_value_of_the_whole(rng):
    x, m = jnp.float32(2 * rng.normal(size=(8, 3))), jnp.float32([1, 1, 0, 1, 1, 1, 0.5, 1])
    mesh = Mesh(np.array(jax.devices()[:4]), ("devices",))

    def losses(x, m, name):
        some = information_maximization(x, mask=m, axis_name=name), mcc(x, temperature=2.0, mask=m, axis_name=name)
        return some[0] + 2 * some[1] + 3 * bnm(x, mask=m, axis_name=name)

    def run(x, m):
        return jax.lax.pmean(losses(x, m, "devices"), "devices")

    rows = PartitionSpec("devices")
    mapped = jax.shard_map(run, mesh=mesh, in_specs=(rows, rows), out_specs=PartitionSpec())
    split, whole = (jax.jit(jax.value_and_grad(one))(x, m) for one in (mapped, partial(losses, name=None)))
    np.testing.assert_allclose(split[0], whole[0], rtol=1e-5)
    np.testing.assert_allclose(split[1], whole[1], rtol=1e-5, atol=1e-6)


def test_what_fits_not_is_refused():
    x = jnp.zeros((4, 3))
    for loss in (information_maximization, bnm, partial(mcc, temperature=1.0)):
        with pytest.raises(jt.InputError, match=r"\[batch, classes\]; got shape \(4,\)"):
            loss(x[:, 0])
        with pytest.raises(jt.InputError, match=r"mask must have one entry per example, \(4,\)"):
            loss(x, mask=jnp.ones(3))
    for loss in (entropy, mcc):
        with pytest.raises(jt.InputError, match="temperature must be positive"):
            loss(x, temperature=0)
    for loss in (entropy, information_maximization):
        with pytest.raises(jt.InputError, match="eps must be finite and not negative"):
            loss(x, eps=-1)
