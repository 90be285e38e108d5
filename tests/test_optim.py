"""Which parameters move, how fast and when; the methods that are made of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt

STAGES = ("stem", "stage1", "stage2", "head")


def a_tree(rng):
    make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {"m": {name: {"kernel": make(2, 3), "bias": make(3)} for name in STAGES}}


def trajectory(optimizer, params, grads):
    """The parameters after each of the gradients, the first ones included, and the last state."""
    state, update, out = optimizer.init(params), jax.jit(optimizer.update), [params]
    for grad in grads:
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
        out.append(params)
    return [jt.tree.leaves_by_path(p) for p in out], state


def stage_of(path):
    return path.split("/")[1]


def sizes(state):
    return sum(leaf.size for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("make", [lambda: optax.adam(0.1), lambda: optax.sgd(0.1, momentum=0.9), lambda: optax.sgd(1)])
@pytest.mark.parametrize("frozen", ["head", ("stem", "stage1"), "bias"])
def test_freeze(rng, make, frozen):
    params, grads = a_tree(rng), [a_tree(rng) for _ in range(3)]
    (first, *_, last), state = trajectory(jt.optim.freeze(make(), frozen), params, grads)
    alone, _ = trajectory(make(), params, grads)
    still = [p for p in first if jt.tree.matches(p, frozen)]
    assert 0 < len(still) < len(first)
    for path in first:
        if path in still:
            assert np.asarray(first[path]).tobytes() == np.asarray(last[path]).tobytes()
        else:
            np.testing.assert_array_equal(last[path], alone[-1][path])
            assert np.any(first[path] != last[path])
    # no state for what is frozen
    whole = sizes(make().init(params))
    per_scalar = (whole - whole % sizes(params)) // sizes(params)
    assert sizes(state) == whole - per_scalar * sum(first[p].size for p in still)


def test_only(rng):
    params, grads = a_tree(rng), [a_tree(rng) for _ in range(2)]
    (first, *_, last), state = trajectory(jt.optim.only(optax.adam(0.1), ("head", "m/stem/bias")), params, grads)
    moved = {p for p in first if np.any(first[p] != last[p])}
    assert moved == {"m/head/kernel", "m/head/bias", "m/stem/bias"}
    assert sizes(state) == 2 * (6 + 3 + 3) + 1  # two moments; one count: both patterns are one optimiser's
    rest = [p for p in first if p not in moved]
    assert all(np.asarray(first[p]).tobytes() == np.asarray(last[p]).tobytes() for p in rest)


def test_by_path_gives_each_the_first_rule(rng):
    params, grad = a_tree(rng), a_tree(rng)
    rules = {"head/bias": optax.sgd(0.5), "head": optax.sgd(0.25), ".*": optax.sgd(0.125)}
    (first, last), _ = trajectory(jt.optim.by_path(rules), params, [grad])
    grad = jt.tree.leaves_by_path(grad)
    for path in first:
        rate = 0.5 if path == "m/head/bias" else 0.25 if "head" in path else 0.125
        np.testing.assert_array_equal(last[path], first[path] - rate * grad[path])


def test_by_path_must_cover(rng):
    params = a_tree(rng)
    with pytest.raises(jt.InputError, match=r"must cover every parameter, but leave out m/stage1/bias"):
        jt.optim.by_path({"head": optax.sgd(1), "stem|stage2": optax.sgd(1)}).init(params)
    with pytest.raises(jt.InputError, match="'tail' selects no parameter"):
        jt.optim.by_path({"tail": optax.sgd(1), ".*": optax.sgd(1)}).init(params)
    with pytest.raises(jt.InputError, match="'haed' selects no parameter"):
        jt.optim.freeze(optax.sgd(1), "haed").init(params)
    with pytest.raises(jt.InputError, match="'haed' selects no parameter"):
        jt.optim.only(optax.sgd(1), "haed").init(params)
    with pytest.raises(jt.InputError, match="must cover"):
        jt.optim.layerwise_decay(optax.sgd(1), STAGES[1:], decay=0.5).init(params)
    with pytest.raises(jt.InputError, match="must cover"):
        jt.optim.gradual_unfreeze(optax.sgd(1), STAGES[1:], every=2).init(params)


def test_several_patterns_are_trained_together(rng):
    """A clip by the global norm is that of all that trains, however it is selected."""
    clipped = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(1.0))
    params, grad = a_tree(rng), a_tree(rng)
    trains = [grad["m"][stage] for stage in ("stem", "head")]
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(trains)))
    for optimizer in (
        jt.optim.only(clipped, ("stem", "head")),
        jt.optim.freeze(clipped, ("stage1", "stage2")),
        jt.optim.by_path({"stem": clipped, "stage.": optax.set_to_zero(), "head": clipped}),
    ):
        (_, moved), _ = trajectory(optimizer, params, [grad])
        for path, leaf in jt.tree.leaves_by_path(params).items():
            step = 0.5 / norm * jt.tree.leaves_by_path(grad)[path] if stage_of(path) in ("stem", "head") else 0
            np.testing.assert_allclose(moved[path], leaf - step, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("search", [True, False])
def test_what_asks_for_the_loss_is_told_it_of_its_part_alone(rng, search):
    """Line search, and sharpness-aware steps, of a part are those of a problem in which the rest is a constant."""
    start, goal = a_tree(rng), a_tree(rng)
    sam = optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.2), opaque_mode=True)
    inner = optax.lbfgs(memory_size=3) if search else sam

    def loss(params):
        errors = jax.tree.map(lambda leaf, aim: jnp.sum((leaf - aim) ** 4), params, goal)
        return sum(jax.tree.leaves(errors)) * jnp.mean(params["m"]["stem"]["bias"] ** 2)

    def of_head(head):
        return loss({"m": start["m"] | {"head": head}})

    def followed(optimizer, loss, params):
        state = optimizer.init(params)
        for _ in range(4):
            value, grad = jax.value_and_grad(loss)(params)
            told = {"value": value, "grad": grad, "value_fn": loss}
            told = told if search else {"grad_fn": lambda params, _: jax.grad(loss)(params)}
            updates, state = optimizer.update(grad, state, params, **told)
            params = optax.apply_updates(params, updates)
        return params

    expected = followed(inner, of_head, start["m"]["head"])
    rest = [jt.optim.only(inner, "head"), jt.optim.freeze(inner, STAGES[:-1])]
    rest.append(jt.optim.only(jt.optim.freeze(inner, "stem"), ("stem", "head")))
    for optimizer in rest:
        found = followed(optimizer, loss, start)
        for name, leaf in found["m"]["head"].items():
            np.testing.assert_allclose(leaf, expected[name], rtol=1e-5, atol=1e-5)
        for stage in STAGES[:-1]:
            jax.tree.map(np.testing.assert_array_equal, found["m"][stage], start["m"][stage])


@pytest.mark.parametrize("decay", [1.0, 0.5, 0.75])
@pytest.mark.parametrize("make", [lambda: optax.sgd(1.0), lambda: optax.adamw(0.1)])
def test_layerwise_rates_are_powers_of_the_decay(rng, decay, make):
    params, grad = a_tree(rng), a_tree(rng)
    scaled = jt.optim.layerwise_decay(make(), STAGES, decay=decay)
    got, _ = scaled.update(grad, scaled.init(params), params)
    plain, _ = make().update(grad, make().init(params), params)
    plain = jt.tree.leaves_by_path(plain)
    for path, update in jt.tree.leaves_by_path(got).items():
        rate = np.float32(decay ** (3 - STAGES.index(stage_of(path))))
        np.testing.assert_array_equal(update, np.asarray(plain[path]) * rate, err_msg=path)


def test_gradual_unfreezing_begins_each_stage_at_its_step(rng):
    params, grads = a_tree(rng), [a_tree(rng) for _ in range(8)]
    path, _ = trajectory(jt.optim.gradual_unfreeze(optax.sgd(0.1, momentum=0.9), STAGES, every=2), params, grads)
    begins = {"head": 0, "stage2": 2, "stage1": 4, "stem": 6}
    for name in path[0]:
        begin = begins[stage_of(name)]
        for step in range(8):
            same = np.asarray(path[step][name]).tobytes() == np.asarray(path[step + 1][name]).tobytes()
            assert same == (step < begin), (name, step)
        # the momentum starts when the stage does
        alone, _ = trajectory(optax.sgd(0.1, momentum=0.9), params, grads[begin:])
        np.testing.assert_allclose(path[-1][name], alone[-1][name], rtol=1e-6)


def test_wrong_numbers_are_refused():
    for decay in (0.0, -1.0, 1.5):
        with pytest.raises(jt.InputError, match=r"decay must be in \(0, 1\]"):
            jt.optim.layerwise_decay(optax.sgd(1), STAGES, decay=decay)
    with pytest.raises(jt.InputError, match="every must be at least one step; got 0"):
        jt.optim.gradual_unfreeze(optax.sgd(1), STAGES, every=0)
    model = jt.models.mlp(3)
    for probe in (0.0, 1.0, 1.2):
        with pytest.raises(jt.InputError, match=r"in \(0, 1\); got"):
            jt.methods.lp_ft(model, optax.sgd(1), probe=probe)


@pytest.fixture
def task(rng):
    images = rng.normal(size=(12, 4, 4, 1)).astype(np.float32)
    return {"image": images, "label": (np.arange(12) % 3).astype(np.int32)}


def train(stage, batch, steps=2, params=None, state=None):
    """Start and end of a stage, as arrays by path of params and of batch statistics."""
    key = jax.random.key(0)
    current = jt.init(stage.objective, stage.optimizer, key, batch, params=params, state=state)
    start = jax.tree.map(np.array, (current.params, current.state))
    step = jt.train_step(stage.objective, stage.optimizer)
    for _ in range(steps):
        current, metrics = step(current, batch)
    assert all(np.isfinite(float(value)) for value in metrics.values())
    end = jax.tree.map(np.array, (current.params, current.state))
    return start, end


def moved(start, end):
    start, end = jt.tree.leaves_by_path(start), jt.tree.leaves_by_path(end)
    return {path for path in start if start[path].tobytes() != end[path].tobytes()}


@pytest.mark.slow
def test_linear_probe_trains_only_the_head_and_leaves_batch_statistics_alone(task):
    model = jt.models.small_cnn(3, width=2)
    (stage,) = jt.methods.linear_probe(model, optax.sgd(0.1, momentum=0.9))
    (params, state), (new_params, new_state) = train(stage, task)
    assert moved(params, new_params) == {"model/head/kernel", "model/head/bias"}
    assert moved(state, new_state) == set()
    assert len(jax.tree.leaves(state)) == 6
    (stage,) = jt.methods.full(model, optax.sgd(0.1))
    (params, state), (new_params, new_state) = train(stage, task)
    assert moved(params, new_params) == set(jt.tree.leaves_by_path(params))
    assert moved(state, new_state) == set(jt.tree.leaves_by_path(state))


@pytest.mark.slow
def test_lp_ft_shares_the_steps_and_the_head(task):
    model = jt.models.small_cnn(3, width=2)
    stages = jt.methods.lp_ft(model, optax.sgd(0.01), probe=0.3, probe_optimizer=optax.sgd(1.0), label_smoothing=0.1)
    assert [stage.name for stage in stages] == ["linear-probe", "full"]
    assert [stage.share for stage in stages] == pytest.approx([0.3, 0.7])
    (params, _), (probed, statistics) = train(stages[0], task, 1)
    head = probed["model"]["head"]["kernel"] - params["model"]["head"]["kernel"]
    assert np.abs(head).max() > 1e-3  # with the rate of the probe
    (start, start_statistics), (tuned, _) = train(stages[1], task, 1, probed, statistics)
    assert moved(start, probed) == set()
    assert moved(start_statistics, statistics) == set()
    assert moved(start, tuned) == set(jt.tree.leaves_by_path(tuned))
    assert [s.share for s in jt.methods.lp_ft(model, optax.sgd(0.01))] == [0.5, 0.5]


@pytest.mark.slow
def test_discriminative_and_gradual_cover_the_model(task):
    model = jt.models.small_cnn(3, width=2)
    (stage,) = jt.methods.gradual(model, optax.sgd(0.1), every=1)
    (params, _), (after, _) = train(stage, task, 2)
    assert {path.split("/")[1].split("_")[0] for path in moved(params, after)} == {"head", "stage2"}
    (full,), (slow,) = (
        jt.methods.full(model, optax.sgd(1.0)),
        jt.methods.discriminative(model, optax.sgd(1.0), decay=0.5),
    )
    (start, _), (fast, _) = train(full, task, 1)
    _, (decayed, _) = train(slow, task, 1)
    start, fast, decayed = map(jt.tree.leaves_by_path, (start, fast, decayed))
    for path in start:
        depth = ["stem", "stage1", "stage2", "head"].index(path.split("/")[1].split("_")[0])
        want = (fast[path] - start[path]) * 0.5 ** (3 - depth)
        np.testing.assert_allclose(decayed[path] - start[path], want, rtol=1e-3, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("with_fisher", [False, True])
@pytest.mark.parametrize("new_head", [False, True])
def test_anchored_is_l2_sp_on_the_body_and_l2_on_a_new_head(rng, with_fisher, new_head):
    model = jt.models.mlp(3, hidden=(4,))
    batch = {"image": rng.normal(size=(6, 2)).astype(np.float32), "label": np.arange(6) % 3}
    anchor, _ = jt.classification(model).init(jax.random.key(5), batch)
    fisher = jax.tree.map(lambda w: jnp.asarray(rng.exponential(size=w.shape), jnp.float32), anchor)
    (stage,) = jt.methods.anchored(
        model,
        optax.sgd(0.1),
        anchor,
        strength=0.3,
        fisher=fisher if with_fisher else None,
        head_strength=0.2,
        new_head=new_head,
    )
    assert stage.name == ("l2-sp-fisher" if with_fisher else "l2-sp")
    params, state = stage.objective.init(jax.random.key(6), batch)
    context = jt.Context(step=jnp.int32(0))
    loss, _, metrics = stage.objective(params, state, batch, context)
    w, w0, f = map(jt.tree.leaves_by_path, (params, anchor, fisher))
    penalty = 0.0
    for path in w:
        if "head" in path and new_head:
            penalty += 0.1 * np.sum(np.asarray(w[path], np.float64) ** 2)
        else:
            weight = np.asarray(f[path], np.float64) if with_fisher else 1.0
            penalty += 0.15 * np.sum(weight * (np.asarray(w[path], np.float64) - np.asarray(w0[path])) ** 2)
    assert float(loss) - float(metrics["classification"].value) == pytest.approx(penalty, rel=1e-5)


@pytest.mark.parametrize(("every", "alpha"), [(1, 0.3), (3, 0.5), (4, 1.0), (2, 0.0)])
def test_lookahead(rng, every, alpha):
    params, grads = a_tree(rng), [a_tree(rng) for _ in range(7)]
    got, state = trajectory(jt.optim.lookahead(optax.sgd(0.1, momentum=0.9), every=every, alpha=alpha), params, grads)
    fast = {path: np.array(leaf, np.float64) for path, leaf in got[0].items()}
    slow, speed = dict(fast), dict.fromkeys(fast, 0.0)
    for number, grad in enumerate(jt.tree.leaves_by_path(one) for one in grads):
        for path in fast:
            speed[path] = 0.9 * speed[path] + np.asarray(grad[path], np.float64)
            fast[path] = fast[path] - 0.1 * speed[path]
            if (number + 1) % every == 0:
                slow[path] = slow[path] + alpha * (fast[path] - slow[path])
                fast[path] = slow[path]
            np.testing.assert_allclose(got[number + 1][path], fast[path], atol=1e-6)
    for path, leaf in jt.tree.leaves_by_path(state.slow).items():
        np.testing.assert_allclose(leaf, slow[path], atol=1e-6)


def test_lookahead_counts_updates_and_not_the_batches_of_one(rng):
    params = {"w": jnp.ones(3)}
    grads = [{"w": jnp.asarray(rng.normal(size=3), jnp.float32)} for _ in range(12)]
    inside, _ = trajectory(jt.optim.lookahead(optax.MultiSteps(optax.sgd(0.1), 3), every=2), params, grads)
    around, _ = trajectory(optax.MultiSteps(jt.optim.lookahead(optax.sgd(0.1), every=2), 3), params, grads)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6), inside, around)


def test_lookahead_around_what_is_frozen_and_in_half_precision(rng):
    params = a_tree(rng)
    optimizer = jt.optim.lookahead(jt.optim.freeze(optax.sgd(0.1), "stem"), every=2)
    state = optimizer.init(params)
    assert jt.optim.held_still(state, params)["m"]["stem"]["kernel"] is True
    got, _ = trajectory(optimizer, params, [params] * 3)
    for path, leaf in got[-1].items():
        assert np.array_equal(leaf, got[0][path]) == (stage_of(path) == "stem")
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    got, state = trajectory(jt.optim.lookahead(optax.sgd(0.1), every=2), half, [half] * 2)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in got[-1].values())
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.slow))


@pytest.mark.parametrize("how", [{"every": 0}, {"alpha": 1.5}])
def test_lookahead_refuses(how):
    with pytest.raises(jt.InputError, match="every of 1 or more and alpha in"):
        jt.optim.lookahead(optax.sgd(1.0), **how)
    optimizer = jt.optim.lookahead(optax.sgd(1.0))
    with pytest.raises(jt.InputError, match="needs the parameters"):
        optimizer.update({}, optimizer.init({}))
