"""Rules of the Gram matrix, against the gradients in double precision: NumPy, SciPy, optimality conditions."""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportFunctionMemberAccess=false

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import jaxtransfer as jt
from jaxtransfer import multitask

RADIUS = 0.4
RULES = {
    "cagrad": functools.partial(multitask.cagrad, c=RADIUS, rescale=0),
    "con_fig": multitask.con_fig,
    "aligned_mtl": multitask.aligned_mtl,
    "fair": functools.partial(multitask.fair_grad, alpha=2.0),
    "fair_grad": multitask.fair_grad,
    "imtl": multitask.imtl,
    "nash": functools.partial(multitask.nash_mtl, max_norm=0),
    "nash_mtl": multitask.nash_mtl,
    "regularized": functools.partial(multitask.up_grad, regularization=1e-2),
    "up_grad": multitask.up_grad,
}
COUNTS = [2, pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(8, marks=pytest.mark.slow)]


@functools.cache
def solved(tasks):
    """All rules on a stack of systems of gradients, in one program: {system: (gradients, {rule: weights})}."""
    rng = np.random.default_rng(tasks)
    signs = np.where(np.arange(tasks) % 2, -1, 1)
    one = rng.normal(size=20)
    systems = {
        "random": rng.normal(size=(tasks, 20)),
        "agreeing": rng.normal(size=(tasks, 20)) + rng.normal(size=20),
        "fighting": rng.normal(size=(tasks, 20)) + 0.7 * np.outer(signs, rng.normal(size=20)),
        "uneven": rng.normal(size=(tasks, 20)) * 10.0 ** rng.uniform(-2, 2, (tasks, 1)),
        "far apart": rng.normal(size=(tasks, 20)) * 10.0 ** np.linspace(-12, 8, tasks)[:, None],
        "one is done": np.concatenate([np.zeros((1, 20)), rng.normal(size=(tasks - 1, 20))]),
        "parallel": np.outer(rng.uniform(0.5, 2, tasks), one),
        "opposed": np.outer(signs * rng.uniform(0.5, 2, tasks), one),
        "dependent": rng.normal(size=(tasks, 3)),
        "done": np.zeros((tasks, 20)),
    }
    gram = jnp.float32(np.stack([rows @ rows.T for rows in systems.values()]))
    run = jax.jit(jax.vmap(lambda g: {name: rule(g, jnp.ones(tasks), None, {})[0] for name, rule in RULES.items()}))
    found = jax.tree.map(np.float64, run(gram))
    return {
        system: (rows, {name: weights[number] for name, weights in found.items()})
        for number, (system, rows) in enumerate(systems.items())
    }


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(np.linalg.norm(want), 1e-30))


def without_zeros(rows):
    return rows[np.linalg.norm(rows, axis=1) > 0]


@pytest.mark.slow
@pytest.mark.parametrize("tasks", COUNTS)
def test_weights_are_numbers_whatever_the_gradients(tasks):
    for system, (rows, found) in solved(tasks).items():
        for name, weights in found.items():
            assert np.all(np.isfinite(weights)), (system, name, weights)
            if not np.any(rows):
                assert np.abs(weights).max() <= 2


@pytest.mark.parametrize("tasks", COUNTS)
def test_cagrad_by_its_optimality_conditions(tasks):
    """d − g₀ is a mixture of gradients of length c ‖g₀‖; those in it gain least from d, and all alike."""
    for system, (rows, found) in solved(tasks).items():
        mean, direction = rows.mean(0), found["cagrad"] @ rows
        size = np.linalg.norm(mean)
        added = (found["cagrad"] - 1 / tasks) * np.linalg.norm(rows, axis=1)
        assert added.min() >= -1e-6 * size, system
        np.testing.assert_allclose(np.linalg.norm(direction - mean), RADIUS * size, rtol=1e-5, err_msg=system)
        lengths = np.linalg.norm(rows, axis=1)
        gains = (rows @ direction)[lengths > 0]
        if not len(gains):
            continue
        some = lengths > 0
        within = 1e-5 * lengths[some] * np.linalg.norm(direction)
        in_it = added[some] > 1e-4 * size
        level = gains[in_it][np.argmin(lengths[some][in_it])]
        assert np.all(gains >= level - within), system
        assert np.all((gains <= level + within)[in_it]), system


@pytest.mark.slow
def test_cagrad_is_what_scipy_finds():
    for system in ("random", "agreeing", "fighting"):
        rows, found = solved(3)[system]
        mean = rows.mean(0)

        def value(w, rows=rows, mean=mean):
            return (w @ rows) @ mean + RADIUS * np.linalg.norm(mean) * np.linalg.norm(w @ rows)

        best = scipy.optimize.minimize(
            value,
            np.full(3, 1 / 3),
            bounds=[(0, 1)] * 3,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-15, "maxiter": 1000},
        )
        gains = rows @ (found["cagrad"] @ rows)
        assert gains.min() == pytest.approx(best.fun, rel=1e-5, abs=1e-5 * (mean @ mean))
    released, _ = multitask.cagrad(jnp.float32(rows @ rows.T), None, None, {}, c=RADIUS)
    np.testing.assert_allclose(released, found["cagrad"] / (1 + RADIUS**2), rtol=1e-5)


@pytest.mark.parametrize("tasks", COUNTS)
@pytest.mark.parametrize(("name", "alpha"), [("fair_grad", 1), ("fair", 2), ("nash", 1)])
def test_gains_are_powers_of_the_weights(tasks, name, alpha):
    """FairGrad and Nash-MTL: the direction is that of the equation's solution, which SciPy finds in log a."""
    for system in ("random", "agreeing", "fighting", "uneven", "one is done", "parallel"):
        rows, found = solved(tasks)[system]
        some = np.linalg.norm(rows, axis=1) > 0
        assert np.all(found[name][some] > 0)
        assert not np.any(found[name][~some])
        rows = rows[some]
        if not len(rows):
            continue
        gram, weights = rows @ rows.T, found[name][some]
        np.testing.assert_allclose(gram @ weights * weights ** (1 / alpha), 1, rtol=1e-4, err_msg=system)
        residuals = functools.partial(lambda log, gram: np.exp(log / alpha) * (gram @ np.exp(log)) - 1, gram=gram)
        start = -np.log(np.linalg.norm(rows, axis=1))
        best = scipy.optimize.root(residuals, start, method="lm", options={"xtol": 1e-15, "ftol": 1e-15})
        assert np.abs(residuals(best.x)).max() < 1e-9, system
        close(weights @ rows, np.exp(best.x) @ rows)
        if name == "nash":  # whatever the scale of the losses
            np.testing.assert_allclose(np.linalg.norm(weights @ rows), np.sqrt(len(rows)), rtol=1e-4, err_msg=system)


@pytest.mark.parametrize("tasks", COUNTS)
def test_the_bargain_is_no_longer_than_allowed(tasks):
    for system, (rows, found) in solved(tasks).items():
        free, bound = found["nash"] @ rows, found["nash_mtl"] @ rows
        assert np.linalg.norm(bound) <= 1 + 1e-4, system
        if system not in ("opposed", "dependent"):  # where they may cancel
            np.testing.assert_allclose(bound, free / max(np.linalg.norm(free), 1), atol=3e-5, err_msg=system)


def projected(rows, gram=None):
    """The mean projection onto the dual cone, by non-negative least squares."""
    vectors = rows if gram is None else np.linalg.cholesky(gram)
    weights = np.zeros(len(rows))
    for task, own in enumerate(vectors):
        weights[task] += 1
        others = np.delete(np.arange(len(rows)), task)
        lengths = np.linalg.norm(vectors[others], axis=1)
        lengths[lengths == 0] = 1
        if len(others) and np.any(own):
            added = scipy.optimize.nnls(-(vectors[others] / lengths[:, None]).T, own / np.linalg.norm(own))[0]
            weights[others] += added * np.linalg.norm(own) / lengths
    return weights / len(rows)


@pytest.mark.parametrize("tasks", COUNTS)
def test_up_grad_conflicts_with_no_task(tasks):
    for system, (rows, found) in solved(tasks).items():
        want, got = projected(rows) @ rows, found["up_grad"] @ rows
        np.testing.assert_allclose(got, want, atol=1e-5 * np.linalg.norm(rows, axis=1).max(), err_msg=system)
        if system != "opposed":  # where the direction is nothing but rounding
            lengths = np.linalg.norm(rows, axis=1)
            assert np.all(rows @ got >= -1e-5 * lengths * np.linalg.norm(got)), system
        if np.any(rows):
            gram = rows @ rows.T
            weights = projected(rows, gram + 1e-2 * np.trace(gram) * np.eye(tasks))
            np.testing.assert_allclose(found["regularized"] @ rows, weights @ rows, atol=1e-5 * np.abs(rows).max())


@pytest.mark.parametrize("tasks", COUNTS)
def test_imtl_and_con_fig_go_equally_far_along_all(tasks):
    for system in ("random", "agreeing", "fighting", "uneven", "far apart"):
        rows, found = solved(tasks)[system]
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        along = unit @ (found["imtl"] @ rows)
        np.testing.assert_allclose(along, along.mean(), rtol=3e-5, err_msg=system)
        assert found["imtl"].sum() == pytest.approx(1, abs=1e-5)
    for system, (rows, found) in solved(tasks).items():
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        if not np.any(lengths) or (system == "opposed" and tasks % 2 == 0):  # no direction is as near to all
            np.testing.assert_array_equal(found["imtl"], np.zeros(tasks))
            np.testing.assert_allclose(found["con_fig"] @ rows, 0, atol=1e-5)
            continue
        unit = np.divide(rows, lengths, where=lengths > 0, out=np.zeros_like(rows))
        direction = np.linalg.pinv(unit, rcond=1e-5) @ np.ones(tasks)
        direction /= np.linalg.norm(direction)
        close(found["con_fig"] @ rows, (rows @ direction).sum() * direction, 2e-5)
        close(found["imtl"] @ rows, (found["imtl"] @ rows @ direction) * direction, 2e-5)


@pytest.mark.parametrize("tasks", COUNTS)
def test_aligned_gradients_are_orthogonal_and_alike(tasks):
    for system in ("random", "agreeing", "fighting", "uneven", "one is done", "parallel"):
        rows, found = solved(tasks)[system]
        left, values, right = np.linalg.svd(rows, full_matrices=False)
        kept = values**2 > tasks * np.finfo(np.float32).eps * values[0] ** 2
        want = values[kept].min(initial=np.inf) * left.T[kept].sum(1) @ right[kept] if kept.any() else 0 * rows[0]
        atol = 1e-5 * (np.linalg.norm(want) + 1e-1 * values[0] * (system == "uneven"))
        np.testing.assert_allclose(found["aligned_mtl"] @ rows, want, atol=atol, err_msg=system)
    np.testing.assert_array_equal(solved(tasks)["done"][1]["aligned_mtl"], np.ones(tasks))


def test_gradvac_turns_gradients_towards_their_usual_cosines():
    rng = np.random.default_rng(3)
    run = jax.jit(lambda gram, key, state: multitask.gradvac(gram, None, key, state, decay=0.3))
    state, usual = multitask.gradvac.init(4), np.zeros((4, 4))
    for step in range(4):
        rows, key = rng.normal(size=(4, 6)) * 10.0 ** rng.uniform(-3, 3, (4, 1)), jax.random.key(step)
        weights, state = run(jnp.float32(rows @ rows.T), key, state)
        total, changed = 0, 0
        for task, task_key in enumerate(jax.random.split(key, 4)):
            own = rows[task]
            for other in np.asarray(jax.random.permutation(task_key, 4)):
                if other == task:
                    continue
                now = own @ rows[other] / np.linalg.norm(own) / np.linalg.norm(rows[other])
                if now < (goal := usual[task, other]):
                    changed += 1
                    by = goal * np.sqrt(1 - now**2) - now * np.sqrt(1 - goal**2)
                    own = (
                        own
                        + np.linalg.norm(own) * by / np.linalg.norm(rows[other]) / np.sqrt(1 - goal**2) * rows[other]
                    )
                    assert own @ rows[other] / np.linalg.norm(own) / np.linalg.norm(rows[other]) == pytest.approx(goal)
                usual[task, other] = 0.7 * goal + 0.3 * now
            total = total + own
        assert changed >= 2
        close(np.float64(weights) @ rows, total, 2e-5)
        np.testing.assert_allclose(state["cosines"], usual, atol=1e-5)
    weights, state = run(jnp.float32([[1, -1, 0, 2], [-1, 1, 0, -2], [0] * 4, [2, -2, 0, 4]]), None, state)
    assert np.all(np.isfinite(weights))
    assert np.all(np.isfinite(state["cosines"]))


@pytest.mark.slow
def test_vaccine_begins_as_pcgrad():
    rows = np.random.default_rng(5).normal(size=(5, 3))
    gram, key = jnp.float32(rows @ rows.T), jax.random.key(1)
    weights, _ = multitask.gradvac(gram, None, key, multitask.gradvac.init(5))
    np.testing.assert_allclose(weights @ rows, multitask.pcgrad(gram, None, key, {})[0] @ rows, atol=1e-4)


def test_db_mtl_makes_relative_gradients_equally_long():
    rng = np.random.default_rng(6)
    rows, values = rng.normal(size=(4, 9)) * 10.0 ** rng.uniform(-5, 5, (4, 1)), rng.uniform(0.1, 5, 4)
    rows[2] = 0
    weights, _ = multitask.db_mtl(jnp.float32(rows @ rows.T), jnp.float32(values), None, {})
    logs = rows / values[:, None]
    lengths = np.linalg.norm(logs, axis=1)
    close(np.float64(weights) @ rows, lengths.max() * (without_zeros(logs) / lengths[lengths > 0, None]).sum(0))


def test_gradnorm_learns_weights_by_the_derivative_of_its_own_loss():
    rng, alpha, rate = np.random.default_rng(7), 1.2, 0.05
    run = jax.jit(functools.partial(multitask.gradnorm, alpha=alpha, rate=rate))
    state, scales, first = multitask.gradnorm.init(3), np.zeros(3), None

    def weights_of(scales):
        return 3 * np.exp(scales) / np.exp(scales).sum()

    for _ in range(4):
        rows, values = rng.normal(size=(3, 5)) * 10.0 ** rng.uniform(-1, 1, (3, 1)), rng.uniform(0.5, 2, 3)
        weights, state = run(jnp.float32(rows @ rows.T), jnp.float32(values), None, state)
        np.testing.assert_allclose(weights, weights_of(scales), rtol=1e-5)
        first = values if first is None else first
        left, lengths = values / first, np.linalg.norm(rows, axis=1)
        mean = (weights_of(scales) * lengths).mean()
        goal = mean * (left / left.mean()) ** alpha

        def loss(scales, lengths=lengths, goal=goal, mean=mean):
            return np.abs(weights_of(scales) * lengths - goal).sum() / mean

        scales = scales - rate * scipy.optimize.approx_fprime(scales, loss, 1e-7)
        np.testing.assert_allclose(state["scales"], scales, atol=1e-5)
    for rows in (np.zeros((3, 2)), np.eye(3)[:, :2]):
        weights, state = run(jnp.float32(rows @ rows.T), jnp.zeros(3), None, state)
        assert np.all(np.isfinite(state["scales"]))
        assert weights.sum() == pytest.approx(3, rel=1e-5)


def test_a_task_without_a_label_in_a_batch_has_no_say():
    rows = np.array([[1.0, 0.5], [0, 0], [-0.5, 1.0]])
    gram, values = jnp.float32(rows @ rows.T), jnp.float32([1, 0, 2])
    weights, _ = multitask.mgda(gram, values, None, {})
    alone, _ = multitask.mgda(gram[::2, ::2], values[::2], None, {})
    assert weights[1] == 0
    np.testing.assert_allclose(np.asarray(weights)[[0, 2]], alone, rtol=1e-6)
    np.testing.assert_array_equal(multitask.mgda(gram, values + 1, None, {})[0], [0, 1, 0])  # it is at its least
    state = multitask.gradnorm.init(3)
    for number in (0, 4, 2):
        _, state = multitask.gradnorm(gram, jnp.float32([1, number, 2]), None, state)
    assert state["first"].tolist() == [1, 4, 2]
    assert np.all(np.isnan(multitask.db_mtl(gram, -values, None, {})[0]))  # no logarithm, and no step upwards


def test_settings_without_meaning_are_refused():
    gram = jnp.eye(2)
    for rule in (
        functools.partial(multitask.cagrad, c=1.0),
        functools.partial(multitask.cagrad, rescale=3),
        functools.partial(multitask.fair_grad, alpha=0.0),
        functools.partial(multitask.up_grad, regularization=-1.0),
        functools.partial(multitask.dwa, temperature=0.0),
        functools.partial(multitask.stch, warmup=0),
    ):
        with pytest.raises(jt.InputError, match=rule.func.__name__):
            rule(gram, jnp.ones(2), None, {})


def test_cagrad_is_the_best_in_many_systems():
    """Of lengths up to 10^12 apart and however alike: those in the mixture gain least, and all the same."""
    rng, tasks = np.random.default_rng(0), 8
    rows = rng.normal(size=(1500, tasks, 20)) + rng.normal(size=(1500, 1, 20)) * rng.choice([0, 0, 1, 3], (1500, 1, 1))
    rows *= 10.0 ** (rng.uniform(-1, 1, (1500, tasks, 1)) * rng.choice([0, 1, 3, 6], (1500, 1, 1)))
    run = jax.jit(jax.vmap(lambda gram: RULES["cagrad"](gram, jnp.ones(tasks), None, {})[0]))
    weights = np.float64(run(jnp.float32(rows @ rows.transpose(0, 2, 1))))
    for one, found in zip(rows, weights, strict=True):
        direction, lengths, size = found @ one, np.linalg.norm(one, axis=1), np.linalg.norm(one.mean(0))
        gains, within = one @ direction, 1e-5 * lengths * np.linalg.norm(direction)
        in_it = (found - 1 / tasks) * lengths > 1e-4 * size
        level = gains[in_it][np.argmin(lengths[in_it])] if in_it.any() else -np.inf
        assert np.all(gains >= level - within)
        assert np.all((gains <= level + within)[in_it])


def test_cagrad_where_two_gradients_cancel():
    """A mixture of length 0 and no answer of length 1: the direction stays in the ball, and no other is better."""
    rng, tasks = np.random.default_rng(0), 4
    rows = rng.normal(size=(18, tasks, 8))
    nearly = np.repeat([0, 1e-3, 1e-2], 6)[:, None]
    rows[:, 1] = -2 * rows[:, 0] + nearly * rows[:, 1]
    weights = np.float64(
        jax.jit(jax.vmap(lambda gram: RULES["cagrad"](gram, None, None, {})[0]))(
            jnp.float32(rows @ rows.transpose(0, 2, 1))
        )
    )
    for one, found in zip(rows, weights, strict=True):
        mean, direction = one.mean(0), found @ one
        far = RADIUS * np.linalg.norm(mean)
        best = scipy.optimize.minimize(  # over directions and the least gain, the last entry
            lambda x: -x[-1],
            np.r_[mean, (one @ mean).min()],
            jac=lambda x: np.r_[np.zeros(len(x) - 1), -1],
            constraints=[
                {"type": "ineq", "fun": lambda x, g=one: g @ x[:-1] - x[-1]},
                {"type": "ineq", "fun": lambda x, m=mean, r=far: r**2 - np.sum((x[:-1] - m) ** 2)},
            ],
            method="SLSQP",
            options={"ftol": 1e-12, "maxiter": 500},
        )
        assert np.linalg.norm(direction - mean) <= (1 + 1e-5) * far
        assert (one @ direction).min() >= best.x[-1] - 2e-3 * (mean @ mean)
