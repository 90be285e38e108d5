"""Rules that look at the losses alone: derivatives of what they lower, by finite differences; what they remember."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jaxtransfer import multitask


def followed(rule, series, **settings):
    """The weights [updates, T] that a rule gives for losses one after another, in one program."""
    run = jax.jit(lambda values, key, state: rule(None, values, key, state, **settings))
    state, found = getattr(rule, "init", lambda count: {})(len(series[0])), []
    for number, values in enumerate(series):
        weights, state = run(jnp.float32(values), jax.random.key(number), state)
        found.append(np.float64(weights))
    return np.array(found)


def slope(function, values):
    return scipy.optimize.approx_fprime(values, function, 1e-7)


SERIES = np.random.default_rng(0).uniform(0.2, 3, (12, 3))


def test_equal_weights_are_known_before_anything_runs():
    weights, _ = jax.eval_shape(lambda v: multitask.equal(None, v, None, {}), jnp.ones(4))
    assert weights.shape == (4,)
    assert isinstance(multitask.equal(None, jnp.ones(4), None, {})[0], np.ndarray)


def test_geometric_is_the_derivative_of_the_geometric_mean():
    for values, weights in zip(SERIES, followed(multitask.geometric, SERIES), strict=True):
        np.testing.assert_allclose(weights, slope(lambda v: np.prod(v) ** (1 / 3), values), rtol=1e-5)
    degenerate = followed(
        multitask.geometric, [[0.0, 1.0, 2.0], [0.0, 0.0, 0.0], [1e-30, 1e20, 1e20], [-1.0, 1.0, 1.0]]
    )
    assert np.all(np.isfinite(degenerate[:3]))
    assert np.all(np.isnan(degenerate[3]))


def test_stch_is_the_derivative_of_the_smooth_maximum():
    found = followed(multitask.stch, SERIES, mu=0.3, warmup=4)
    np.testing.assert_allclose(found[:4], 1 / SERIES[:4], rtol=1e-5)
    usual = SERIES[:4].mean(0)
    for values, weights in zip(SERIES[4:], found[4:], strict=True):
        want = slope(lambda v: 3 * 0.3 * np.log(np.sum(np.exp(np.log(v / usual) / 0.3))), values)
        np.testing.assert_allclose(weights, want, rtol=1e-4, atol=1e-6)
    assert np.all(np.isfinite(followed(multitask.stch, [[0.0, 1e8, 1.0]] * 3, warmup=1)))


def test_dwa_compares_windows():
    found = followed(multitask.dwa, SERIES, temperature=0.7, every=3)
    np.testing.assert_array_equal(found[:6], np.ones((6, 3)))
    means = SERIES.reshape(4, 3, 3).mean(1)
    for window in (2, 3):
        rate = np.exp(means[window - 1] / means[window - 2] / 0.7)
        np.testing.assert_allclose(found[3 * window : 3 * window + 3], [3 * rate / rate.sum()] * 3, rtol=1e-5)
    np.testing.assert_allclose(followed(multitask.dwa, np.zeros((4, 2)), every=1), 1)


@pytest.mark.slow
def test_a_task_without_a_label_in_a_batch_has_no_say():
    """Its loss is 0 in every other batch: the others are weighed as without it, and no 0 is remembered."""
    often = SERIES.copy()
    often[::2, 1] = 0
    rest = SERIES[:, [0, 2]]
    there, others = often[1::2], [0, 2]
    for name, settings in (
        ("geometric", {}),
        ("famo", {"decay": 0.0, "rate": 0.0}),
        ("stch", {"warmup": 2, "mu": 50.0}),
    ):
        rule = getattr(multitask, name)
        found, alone = followed(rule, often, **settings), followed(rule, rest, **settings)
        assert np.all(found[::2, 1] == 0)
        ratio = found[::2, others] / alone[::2]
        np.testing.assert_allclose(ratio[:, 0], ratio[:, 1], rtol=1e-4, err_msg=name)
    found = followed(multitask.geometric, often)
    np.testing.assert_allclose(found[::2, others], followed(multitask.geometric, rest)[::2], rtol=1e-5)
    _, state = multitask.stch(None, jnp.float32([1, 0]), None, {**multitask.stch.init(2)}, warmup=2)
    _, state = multitask.stch(None, jnp.float32([3, 5]), None, state, warmup=2)
    np.testing.assert_allclose(state["total"] / state["counted"], [2, 5])
    found = followed(multitask.dwa, often, temperature=0.7, every=4)
    means = [often[start : start + 4].sum(0) / (often[start : start + 4] != 0).sum(0) for start in (0, 4)]
    rate = np.exp(means[1] / means[0] / 0.7)
    np.testing.assert_allclose(found[8:], [3 * rate / rate.sum()] * 4, rtol=1e-5)
    state = multitask.famo.init(3)
    for values in often:
        _, state = multitask.famo(None, jnp.float32(values), None, state)
    np.testing.assert_allclose(state["last"], np.log(often[-1]), rtol=1e-5)
    assert np.abs(np.sqrt(state["square"])).max() < np.abs(np.diff(np.log(there), axis=0)).max()  # no jump to log 1e-8
    none, state = multitask.famo(None, jnp.zeros(3), None, state)
    np.testing.assert_array_equal(none, 0)
    for rule in (multitask.geometric, multitask.stch, multitask.dwa):
        assert np.all(np.isfinite(followed(rule, np.zeros((3, 2)))))


def test_random_weights_are_a_softmax_of_normal_numbers():
    found = followed(multitask.random_weights, SERIES)
    numbers = np.exp([np.asarray(jax.random.normal(jax.random.key(number), (3,))) for number in range(12)])
    np.testing.assert_allclose(found, numbers / numbers.sum(1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(multitask.random_weights(None, jnp.ones(4), None, {})[0], 0.25)
    other = followed(multitask.random_weights, SERIES, draw=jax.random.uniform)
    assert np.all(other.max(1) / other.min(1) <= np.e)


@pytest.mark.parametrize("least", [0.0, (0.1, 0.0, 0.15)])
def test_famo_learns_which_loss_falls_the_slowest(least):
    rate, decay = 0.1, 0.05
    run = jax.jit(functools.partial(multitask.famo, rate=rate, decay=decay, least=least))
    state = multitask.famo.init(3)
    scales, mean, square, last = (np.zeros(3) for _ in range(4))
    for number, values in enumerate(SERIES):
        found, state = run(None, jnp.float32(values), None, state)
        above = values - np.array(least) + 1e-8
        if number:
            fell = last - np.log(above)
            slopes = slope(lambda s, fell=fell: np.exp(s) / np.exp(s).sum() @ fell, scales) + decay * scales
            mean, square = 0.9 * mean + 0.1 * slopes, 0.999 * square + 0.001 * slopes**2
            step = mean / (1 - 0.9**number) / (np.sqrt(square / (1 - 0.999**number)) + 1e-8)
            scales = scales - rate * step
        last = np.log(above)
        shares = np.exp(scales) / np.exp(scales).sum()
        np.testing.assert_allclose(found, shares / above / (shares / above).sum(), rtol=2e-4, atol=1e-6)


@pytest.mark.slow
def test_graddrop_keeps_one_sign_of_each_entry():
    rng, leak = np.random.default_rng(2), 0.2
    gradients, key = rng.normal(size=(3, 40, 5)).astype(np.float32), jax.random.key(4)
    gradients[:, 0] = 0
    mix, _ = multitask.graddrop(None, jnp.ones(3), None, {}, leak=leak, f=jnp.square)
    plain, _ = multitask.graddrop(None, jnp.ones(3), None, {})
    drawn = np.asarray(jax.random.uniform(key, (40, 5)))
    sizes = np.abs(gradients).sum(0)
    purity = (1 + gradients.sum(0) / np.where(sizes == 0, 1, sizes)) / 2
    for got, chance, number, passed in (
        (mix(jnp.asarray(gradients), key), purity**2, drawn, leak),
        (plain(jnp.asarray(gradients), None), purity, 0.5, 0.0),
    ):
        want = np.zeros((40, 5))
        for gradient in gradients:
            kept = np.where(gradient > 0, chance > number, (chance < number) & (gradient < 0))
            want += np.where(kept, gradient, passed * gradient)
        np.testing.assert_allclose(got, want, atol=1e-6)
