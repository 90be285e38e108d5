"""Implicit MAML: its gradient against a dense solve and finite differences, its memory, its edges."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import jaxtransfer as jt
from tests.meta.test_maml import MODEL, OBJECTIVE, episodes, image_episodes, normed_model

STRENGTH = 0.8


def plain_loss(params, part):
    hidden = jnp.tanh(part["input"] @ params["body"]["w"] + params["body"]["b"][None])
    return jnp.mean((hidden @ params["head"]["w"] - part["value"]) ** 2)


def parts(params, adapted):
    """φ and ψ as vectors, and the function from the two back to the parameters."""
    fast, unravel_fast = ravel_pytree({name: params[name] for name in adapted})
    rest, unravel_rest = ravel_pytree({name: value for name, value in params.items() if name not in adapted})
    return fast, rest, lambda fast, rest: {**unravel_fast(fast), **unravel_rest(rest)}


def adapted_by_hand(theta, psi, build, support, steps, rate=0.1, strength=STRENGTH):
    gradient = jax.grad(lambda phi: plain_loss(build(phi, psi), support))

    def update(_, phi):
        return phi - rate * (gradient(phi) + strength * (phi - theta))

    return jax.lax.fori_loop(0, steps, update, theta)


def outer_by_hand(params, batch, adapted, steps):
    """The outer loss, each inner problem solved by a plain loop."""
    theta, psi, build = parts(params["model"], adapted)

    def task(support, query):
        return plain_loss(build(adapted_by_hand(theta, psi, build, support, steps), psi), query)

    return jnp.mean(jax.vmap(task)(batch["support"], batch["query"]))


def conjugate_gradients(matrix, right, steps):
    solved, residual, search = jnp.zeros_like(right), right, right
    for _ in range(steps):
        length = residual @ residual / (search @ matrix @ search)
        solved, before = solved + length * search, residual @ residual
        residual = residual - length * (matrix @ search)
        search = residual + residual @ residual / before * search
    return solved


def dense(params, batch, adapted, steps, damping=0.0, strength=STRENGTH, cg_steps=None):
    """The meta-gradient with the Hessian written out: (θ's, ψ's) as vectors."""
    theta, psi, build = parts(params["model"], adapted)

    def task(support, query):
        phi = adapted_by_hand(theta, psi, build, support, steps, strength=strength)

        def inner(phi, psi):
            return plain_loss(build(phi, psi), support)

        g, direct = jax.grad(lambda phi, psi: plain_loss(build(phi, psi), query), argnums=(0, 1))(phi, psi)
        matrix = jax.hessian(inner)(phi, psi) / strength + (1 + damping) * jnp.eye(len(theta))
        few = cg_steps is not None
        solved = conjugate_gradients(matrix, g, cg_steps) if few else jnp.linalg.solve(matrix, g)
        mixed = jax.jacobian(jax.grad(inner), argnums=1)(phi, psi)
        return solved, direct - mixed.T @ solved / strength

    return jax.jit(lambda b: [jnp.mean(x, axis=0) for x in jax.vmap(task)(b["support"], b["query"])])(batch)


def started(batch, **keywords):
    keywords = {"inner": optax.sgd(0.1), "steps": 1000, "strength": STRENGTH, "cg_steps": 40, **keywords}
    objective = jt.meta.implicit_maml(OBJECTIVE, **keywords)
    params, state = objective.init(jax.random.key(0), batch)
    return params, jax.jit(jax.value_and_grad(lambda p: objective(p, state, batch, jt.Context(key=None))[0]))


def as_vectors(gradient, adapted):
    return parts(gradient["model"], adapted)[:2]


@pytest.mark.parametrize(
    ("adapt", "adapted", "inner", "at_once"),
    [
        pytest.param(".*", ("body", "head"), optax.sgd(0.1), None, marks=pytest.mark.slow),
        ("head", ("head",), optax.sgd(0.05, momentum=0.8), 2),
        pytest.param("body", ("body",), optax.sgd(0.1), 1, marks=pytest.mark.slow),
    ],
)
def test_the_gradient_of_a_solved_inner_problem_is_exact(adapt, adapted, inner, at_once, rng, x64):
    """Against the dense solve, and against finite differences of the solved inner problem."""
    batch = episodes(rng, np.float64)
    params, f = started(batch, adapt=adapt, inner=inner, at_once=at_once)
    value, gradient = f(params)
    expected = dense(params, batch, adapted, 1000)
    for got, exact in zip(as_vectors(gradient, adapted), expected, strict=True):
        assert np.linalg.norm(got - exact) <= 1e-9 * np.linalg.norm(exact)

    outer = jax.jit(lambda params: outer_by_hand(params, batch, adapted, 1000))
    assert float(value) == pytest.approx(float(outer(params)), rel=1e-6)
    direction = jax.tree.map(lambda p: rng.normal(size=p.shape), params)
    ahead, behind = (outer(jax.tree.map(lambda p, d: p + s * d, params, direction)) for s in (1e-5, -1e-5))  # noqa: B023
    slope = sum(np.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
    assert float(slope) == pytest.approx(float((ahead - behind) / 2e-5), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "strength", "cg_steps", "damping"),
    [(2, 3.0, None, 0.5), pytest.param(3, 2.0, 1, 0.0, marks=pytest.mark.slow), (3, 2.0, 2, 0.3)],
)
def test_each_argument_is_where_the_formula_has_it(steps, strength, cg_steps, damping, rng, x64):
    batch = episodes(rng, np.float64)
    params, f = started(batch, steps=steps, strength=strength, cg_steps=cg_steps or 40, damping=damping)
    got = as_vectors(f(params)[1], ("body", "head"))[0]
    exact, _ = dense(params, batch, ("body", "head"), steps, damping, strength, cg_steps)
    np.testing.assert_allclose(got, exact, rtol=1e-8, atol=1e-12)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_steps(rng):
    batch = episodes(rng)

    def memory(steps):
        params, f = started(batch, steps=steps)
        return f.lower(params).compile().memory_analysis().temp_size_in_bytes

    assert memory(50) == memory(5)


@pytest.mark.slow
def test_it_takes_sums_penalties_frozen_trees_and_schedules(rng, x64):
    batch = episodes(rng, np.float64)
    fresh = OBJECTIVE.init(jax.random.key(0), jax.tree.map(lambda x: x[0], batch["support"]))[0]
    anchor = jax.tree.map(lambda p: np.zeros(p.shape), fresh)
    task = 0.5 * OBJECTIVE + (lambda step: 1.0 + step) * jt.l2_sp(anchor, strength=0.1)
    objective = 2.0 * jt.meta.implicit_maml(task, inner=optax.sgd(0.1), steps=2000, strength=STRENGTH, cg_steps=40)
    objective = objective + 0.01 * jt.l2(only="head")
    state = jt.init(objective, optax.sgd(0.1), jax.random.key(0), batch)
    before = jax.tree.map(np.array, state.params)  # a copy: the step owns the state
    after, metrics = jt.train_step(objective, optax.sgd(0.1))(state, batch)
    assert set(metrics) == {"loss", "implicit_maml", "regression", "l2_sp", "l2"}

    def outer(params):
        """The same, by a plain loop that is differentiated through."""
        theta, unravel = ravel_pytree(params["model"])

        def term(phi, part):
            return 0.5 * plain_loss(unravel(phi), part) + 0.05 * jnp.sum(phi**2)

        def one(support, query):
            def update(phi, _):
                return phi - 0.1 * (jax.grad(term)(phi, support) + STRENGTH * (phi - theta)), None

            return term(jax.lax.scan(update, theta, length=2000)[0], query)

        tasks = jnp.mean(jax.vmap(one)(batch["support"], batch["query"]))
        return 2.0 * tasks + 0.005 * jnp.sum(params["model"]["head"]["w"] ** 2)

    value, gradient = jax.jit(jax.value_and_grad(outer))(before)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-9)
    for path, leaf in jt.tree.leaves_by_path(gradient).items():
        changed = (jt.tree.leaves_by_path(before)[path] - jt.tree.leaves_by_path(after.params)[path]) / 0.1
        np.testing.assert_allclose(changed, leaf, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_dead_units_and_zero_gradients_stay_finite(masked, rng):
    def init(key, x):
        body = {"w": jax.random.normal(key, (3, 6)).at[:, 0].set(0), "b": jnp.zeros(6).at[0].set(-5)}
        return {"params": {"body": body, "head": {"w": jnp.ones((6, 2))}}}

    def apply(variables, x, *, train, key):
        p = variables["params"]
        return {"logits": jax.nn.relu(x @ p["body"]["w"] + p["body"]["b"][None]) @ p["head"]["w"]}, {}

    batch = episodes(rng)
    if masked:
        batch = {name: {**part, "mask": np.zeros(part["input"].shape[:2])} for name, part in batch.items()}
    task = jt.regression(jt.Model(init, apply))
    objective = jt.meta.implicit_maml(task, inner=optax.adam(0.01), steps=5, strength=0.01)
    params, state = objective.init(jax.random.key(0), batch)
    gradient = jax.jit(jax.grad(lambda p: objective(p, state, batch, jt.Context(key=None))[0]))(params)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(gradient))
    assert float(jnp.max(jnp.abs(gradient["model"]["body"]["w"][:, 0]))) == 0
    assert (float(jnp.max(jnp.abs(gradient["model"]["head"]["w"]))) == 0) == masked


@pytest.mark.slow
def test_tasks_split_over_devices_give_the_same_numbers(rng):
    batch, optimizer, task = image_episodes(rng, tasks=8), optax.sgd(0.1), jt.classification(normed_model())

    def run(at_once=None, **kwargs):
        keywords = {"inner": optax.sgd(0.1), "steps": 3, "strength": 2.0, "cg_steps": 3}
        objective = jt.meta.implicit_maml(task, at_once=at_once, **keywords)
        state = jt.init(objective, optimizer, jax.random.key(0), batch)
        step = jt.train_step(objective, optimizer, **kwargs)
        for _ in range(2):
            state, metrics = step(state, batch)
        return jax.device_get((state.params, metrics))

    one, mesh = run(), jax.make_mesh((4,), ("tasks",), devices=jax.devices()[:4])
    for four in (run(at_once=4, mesh=mesh), run(mesh=mesh, mode="pmap")):
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
            assert np.max(np.abs(a - b)) <= 1e-5 * max(np.max(np.abs(a)), 1e-3)


@pytest.mark.slow
def test_it_is_evaluated_as_maml_with_the_proximal_term_is(rng):
    batch = image_episodes(rng)
    task = jt.classification(normed_model())
    for statistics in (jt.meta.transductive, jt.meta.running):
        keywords = {"inner": optax.sgd(0.1), "steps": 1, "statistics": statistics}  # the first pull is zero
        objectives = [jt.meta.implicit_maml(task, strength=1.0, **keywords), jt.maml(task, **keywords)]
        state = jt.init(objectives[0], optax.sgd(0.1), jax.random.key(0), batch)
        ours, theirs = (jt.evaluate(objective, state, [batch]) for objective in objectives)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)


def test_misuse_is_one_clear_error(rng):
    batch = episodes(rng)

    def start(**kwargs):
        keywords = {"inner": optax.sgd(0.1), "steps": 1, "strength": 1.0, **kwargs}
        jt.init(jt.meta.implicit_maml(jt.regression(MODEL), **keywords), optax.sgd(0.1), jax.random.key(0), batch)

    for strength in (0, -1.0, float("nan")):
        with pytest.raises(jt.InputError, match=f"above 0; got {strength}"):
            start(strength=strength)
    with pytest.raises(jt.InputError, match="cg_steps must be at least 1; got 0"):
        start(cg_steps=0)
    with pytest.raises(jt.InputError, match=r"damping must be at least 0; got -0\.1"):
        start(damping=-0.1)
    with pytest.raises(jt.InputError, match="'tail'"):
        start(adapt="tail")
    with pytest.raises(jt.InputError, match="implicit_maml: per_step"):
        start(statistics=jt.meta.per_step)
