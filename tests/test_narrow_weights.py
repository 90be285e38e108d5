"""Weights stored in bfloat16: what stands still as they are, and moves beside a float32 copy or rounded at random."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.forward import Forward

KEY = jax.random.key(2)
BF16 = ml_dtypes.bfloat16
WAYS = {
    "master": jt.optim.master_weights,
    "stochastic": lambda optimizer: jt.optim.stochastic_rounding(optimizer, 7),
}


def linear(shape=(16, 8)):
    """A loss whose gradient doesn't depend on the weights: the mean over rows of the sum of x·w."""

    def init(key, x):
        w = jnp.linspace(0.5, 2, np.prod(shape), dtype=jnp.float32).reshape(shape)
        return {"params": {"w": w.astype(jnp.bfloat16), "scale": jnp.ones(shape[1:], jnp.float32)}}

    def apply(variables, x, *, train, key):
        w, scale = variables["params"]["w"], variables["params"]["scale"]
        return {"output": x @ w.astype(jnp.float32) + scale[None]}, {}

    model = jt.Model(init, apply, name="net")
    forward = Forward.of(model, "image")

    def loss(outputs, params, state, batch, ctx):
        value = ctx.mean(outputs[forward]["output"].sum(1))
        return value.value, state, {"linear": value}

    return model, jt.Objective("linear", (forward,), loss)


def rows(seed=0, count=8):
    return {"image": np.random.default_rng(seed).integers(-1, 2, (count, 16)).astype(np.float32)}


def numbers(values):
    return [np.asarray(leaf).astype(np.float64) for leaf in jax.tree.leaves(values)]


def bits(values):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(values)]


def after(optimizer, params, grads, steps):
    """Returns parameters and state after that many steps of one gradient."""

    @jax.jit
    def run(params, state):
        def one(_, carry):
            params, state = carry
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, steps, one, (params, state))

    return run(params, optimizer.init(params))


def test_small_updates_of_bfloat16_stand_still_and_each_way_mends_it():
    params = {"w": jnp.ones(4096, jnp.bfloat16)}
    grads = jax.tree.map(jnp.ones_like, params)
    sgd, steps = optax.sgd(1e-4), 100  # 1e-4 is far less than half of what 1 and its neighbours differ by, 2e-3
    still, _ = after(sgd, params, grads, steps)
    assert bits(still) == bits(params)
    master, state = after(WAYS["master"](sgd), params, grads, steps)
    np.testing.assert_allclose(state.master["w"], 0.99, rtol=0, atol=2e-6)
    assert master["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(master["w"]), np.asarray(state.master["w"]).astype(BF16))
    rounded, state = after(WAYS["stochastic"](sgd), params, grads, steps)
    assert rounded["w"].dtype == jnp.bfloat16
    found = numbers(rounded)[0]
    ulp, share = 2.0**-8, 1e-4 * 2**8  # a step goes down by a whole unit with this probability
    deviation = ulp * np.sqrt(steps * share * (1 - share) / len(found))
    assert abs(found.mean() - 0.99) < 5 * deviation < 0.002
    assert len(np.unique(found)) > 3
    assert [np.asarray(leaf).dtype for leaf in jax.tree.leaves(state.inner_state)] == []  # sgd keeps nothing


def test_rounding_at_random_is_right_on_average_and_gives_neighbours():
    rng, draws = np.random.default_rng(1), 4096
    values = np.concatenate(
        [rng.normal(size=20), 10.0 ** rng.uniform(-36, 36, 20), [1.999, -3.9999, 2.0, -0.0, 1 + 2.0**-8]]
    ).astype(np.float32)
    tiled = {"w": jnp.asarray(np.repeat(values[:, None], draws, 1))}
    optimizer = jt.optim.stochastic_rounding(optax.identity(), jax.random.key(5))
    told, _ = after(optimizer, {"w": jnp.zeros((len(values), draws), jnp.bfloat16)}, tiled, 1)
    found = numbers(told)[0]
    # the neighbours, by the bits of NumPy: what is cut off, and one more in the last place
    words = values.view(np.uint32)
    low = (words >> 16 << 16).view(np.float32).astype(np.float64)
    high = ((words >> 16) + 1 << 16).astype(np.uint32).view(np.float32).astype(np.float64)
    assert np.all((found == low[:, None]) | (found == high[:, None]))
    share = (values.astype(np.float64) - low) / (high - low)
    up = (found == high[:, None]).mean(1)
    assert np.all(np.abs(up - share) <= 5 * np.sqrt(share * (1 - share) / draws))
    assert np.all(up[share == 0] == 0)  # what bfloat16 can hold stays
    assert np.count_nonzero((up > 0) & (up < 1)) > 30


def test_what_is_not_finite_stays_so():
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    changes = {"w": jnp.array([jnp.inf, -jnp.inf, jnp.nan], jnp.float32)}
    for way in WAYS.values():
        told, _ = after(way(optax.identity()), params, changes, 1)
        np.testing.assert_array_equal(numbers(told)[0], [np.inf, -np.inf, np.nan])


def test_a_copy_moves_as_weights_in_float32_do():
    rng = np.random.default_rng(3)
    narrow = {"w": jnp.asarray(rng.normal(size=(5, 3)), jnp.bfloat16), "b": jnp.asarray(rng.normal(size=3), np.float32)}
    grads = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), narrow)
    wide, wide_grads = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (narrow, grads))
    inner = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-3, weight_decay=0.1))
    found, state = after(WAYS["master"](inner), narrow, grads, 7)
    expected, _ = after(inner, wide, wide_grads, 7)
    np.testing.assert_allclose(state.master["w"], expected["w"], rtol=0, atol=1e-7)
    np.testing.assert_allclose(found["b"], expected["b"], rtol=0, atol=1e-7)
    assert isinstance(state.master["b"], optax.MaskedNode)  # no copy of what is float32 anyway
    assert bits(found["w"]) == bits(np.asarray(state.master["w"]).astype(BF16))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.inner_state)} == {"float32", "int32"}


@pytest.mark.parametrize("way", WAYS)
def test_accumulation_sums_in_float32_and_moves_once(way):
    """Four gradients, one large: in bfloat16 the small ones would be lost beside it."""
    params = {"w": jnp.zeros(64, jnp.bfloat16)}
    optimizer = WAYS[way](optax.MultiSteps(optax.sgd(1.0), 4).gradient_transformation())
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for number, gradient in enumerate((256.0, 0.5, 0.5, 0.5)):
        updates, state = update({"w": jnp.full(64, gradient, jnp.bfloat16)}, state, params)
        params = optax.apply_updates(params, updates)
        assert bool(np.any(numbers(params)[0])) == (number == 3)
    found = state.master["w"] if way == "master" else numbers(params)[0]
    expected = -257.5 / 4  # bfloat16 has −64.5 and −64
    if way == "master":
        np.testing.assert_array_equal(found, expected)
    else:
        assert set(np.unique(found)) == {-64.5, -64.0}


@pytest.mark.parametrize("way", WAYS)
def test_accumulation_around_sums_in_float32_and_rounds_the_mean_alone(way):
    params, optimizer = {"w": jnp.zeros(64, jnp.bfloat16)}, WAYS[way](optax.sgd(1.0))
    around = optax.MultiSteps(optimizer, 4)
    state, update = around.init(params), jax.jit(around.update)
    for gradient in (256.0, 0.5, 0.5, 0.5):
        updates, state = update({"w": jnp.full(64, gradient, jnp.bfloat16)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(numbers(params)[0], -64.5)  # of −64.375; without the small ones it is −64
    narrow = optax.MultiSteps(optimizer, 4, accumulator_dtype=jnp.bfloat16).gradient_transformation()
    with pytest.raises(
        jt.InputError, match="sums gradients in bfloat16, where small ones are lost; leave its accumulator_dtype out"
    ):
        jt.init(linear()[1], narrow, KEY, rows())


def curved():
    """A loss whose gradient does depend on the weights: the mean over rows of ½ (x·w)², and its gradient by NumPy."""

    def init(key, x):
        return {"params": {"w": jnp.linspace(0.5, 2, 16, dtype=jnp.float32).astype(jnp.bfloat16)}}

    def apply(variables, x, *, train, key):
        return {"output": x @ variables["params"]["w"].astype(jnp.float32)}, {}

    forward = Forward.of(jt.Model(init, apply, name="net"), "image")

    def loss(outputs, params, state, batch, ctx):
        value = ctx.mean(0.5 * outputs[forward]["output"] ** 2)
        return value.value, state, {"curved": value}

    def gradient(x, w):
        return (x.T.astype(np.float64) @ (x @ w)) / len(x)

    return jt.Objective("curved", (forward,), loss), gradient


def test_a_search_for_sharpness_moves_the_copies():
    """`optax.contrib.sam` in two steps: up from what is stored, and down from where the climb began."""
    objective, gradient = curved()
    climb, rate, batch = 2.0**-6, 2.0**-5, rows()
    optimizer = jt.optim.master_weights(optax.contrib.sam(optax.sgd(rate), optax.sgd(climb)))
    state, step = jt.init(objective, optimizer, KEY, batch), jt.train_step(objective, optimizer)
    copy = numbers(state.params)[0]

    def at_stored(w):  # the gradient of what is stored, in its type
        return gradient(batch["image"], w.astype(BF16).astype(np.float64)).astype(BF16).astype(np.float64)

    for _ in range(3):
        above = copy + climb * at_stored(copy)
        state, _ = step(state, batch)
        np.testing.assert_allclose(state.opt_state.master["net"]["w"], above, rtol=0, atol=1e-6)
        copy = copy - rate * at_stored(above)
        state, _ = step(state, batch)
        np.testing.assert_allclose(state.opt_state.master["net"]["w"], copy, rtol=0, atol=1e-6)
    assert bits(state.params) == [np.asarray(state.opt_state.master["net"]["w"]).astype(BF16).tobytes()]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", ["one device", "pmap"])
def test_a_search_for_sharpness_in_one_step_climbs_in_float32(way, place, mesh_of):
    objective, gradient = curved()
    climb, rate, batch = 2.0**-6, 2.0**-5, rows()
    sam = optax.contrib.sam(optax.sgd(rate), optax.sgd(climb), opaque_mode=True)
    optimizer = WAYS[way](sam)
    options = {} if place == "one device" else {"mesh": mesh_of(4), "mode": "pmap"}
    state = jt.init(objective, optimizer, KEY, batch)
    first = numbers(state.params)[0]
    state, _ = jt.train_step(objective, optimizer, **options)(state, batch)
    above = first + climb * gradient(batch["image"], first).astype(BF16).astype(np.float64)
    expected = first - rate * gradient(batch["image"], above)
    plain = first - rate * gradient(batch["image"], first)
    if way == "master":
        assert np.abs(plain - expected).max() > 1e-3
        np.testing.assert_allclose(state.opt_state.master["net"]["w"], expected, rtol=0, atol=1e-6)
    else:
        assert np.all(np.abs(numbers(state.params)[0] - expected) < 2.0**-7 * np.abs(expected))
    with pytest.raises(jt.InputError, match=r"\(no grad_fn under loss_scaled\): grad_fn must be provided"):
        jt.init(objective, jt.optim.loss_scaled(optimizer), KEY, batch)


@pytest.mark.parametrize("way", WAYS)
def test_one_device_a_mesh_and_pmap_store_the_same_bits_and_averages_move_in_float32(way, mesh_of):
    net, objective = linear()
    objective = objective + jt.averaged(jt.ema(net, 0.5))
    ended = []
    for place in ({}, {"mesh": mesh_of(4)}, {"mesh": mesh_of(4), "mode": "pmap"}):
        optimizer = WAYS[way](optax.sgd(2.0**-9, momentum=0.5))
        state, step = jt.init(objective, optimizer, KEY, rows()), jt.train_step(objective, optimizer, **place)
        first, kept = numbers(state.params), np.float64(state.state["net_ema"]["params"]["w"])
        for number in range(3):  # an average follows at the beginning of the next step
            kept = 0.5 * (kept + np.asarray(state.params["net"]["w"]).astype(np.float64)) if number else kept
            state, _ = step(state, rows(number))
        assert state.params["net"]["w"].dtype == jnp.bfloat16
        average = state.state["net_ema"]["params"]["w"]
        assert average.dtype == jnp.float32
        np.testing.assert_allclose(average, kept, rtol=1e-6)
        assert all(np.any(now != then) for now, then in zip(numbers(state.params), first, strict=True))
        assert np.any(numbers(average)[0] != first[1])
        ended.append(bits((state.params, state.state, state.opt_state)))
    assert ended[0] == ended[1] == ended[2]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_ends_with_the_same_bits(way, tmp_path):
    _, objective = linear()
    batches = [rows(seed) for seed in range(6)]

    def run(out, steps, key=7):
        ways = {**WAYS, "stochastic": lambda inner: jt.optim.stochastic_rounding(inner, key)}
        optimizer = jt.optim.loss_scaled(ways[way](optax.adam(1e-4)), every=2)
        return jt.fit(objective, optimizer, batches, steps=steps, out=out, progress=False).state

    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "broken", 3)
    if way == "stochastic":
        with pytest.raises(jt.InputError, match="another optimizer"):
            run(tmp_path / "broken", 6, key=8)
    resumed = run(tmp_path / "broken", 6)
    assert bits((whole.params, whole.opt_state)) == bits((resumed.params, resumed.opt_state))


@pytest.mark.parametrize("way", WAYS)
def test_an_overflow_leaves_weights_and_copies(way):
    _net, objective = linear()
    optimizer = jt.optim.loss_scaled(WAYS[way](optax.adam(0.1)), initial=4.0)
    state, step = jt.init(objective, optimizer, KEY, rows()), jt.train_step(objective, optimizer)
    before = bits((state.params, state.opt_state.inner_state))
    state, metrics = step(state, {"image": np.full((8, 16), np.inf, np.float32)})
    assert float(metrics["loss_scale/skipped"]) == 1
    assert bits((state.params, state.opt_state.inner_state)) == before
    state, _ = step(state, rows())
    assert bits(state.params) != before[: len(jax.tree.leaves(state.params))]


def test_inside_of_only_what_is_frozen_has_no_copy_and_stays():
    _net, objective = linear()
    optimizer = jt.optim.only(jt.optim.master_weights(optax.sgd(1e-4)), "net/scale")
    state, step = jt.init(objective, optimizer, KEY, rows()), jt.train_step(objective, optimizer)
    first = bits(state.params["net"]["w"])
    assert all(leaf.shape != (16, 8) for leaf in jax.tree.leaves(state.opt_state))
    state, _ = step(state, rows())
    assert bits(state.params["net"]["w"]) == first


def test_another_key_and_another_step_draw_otherwise_and_another_parameter_changes_none():
    params = {"a": jnp.ones(256, jnp.bfloat16), "b": jnp.ones(256, jnp.bfloat16)}
    grads = jax.tree.map(jnp.ones_like, params)

    def run(key, params, steps=1):
        return after(jt.optim.stochastic_rounding(optax.sgd(1e-3), key), params, grads, steps)[0]

    one = run(1, params)
    assert bits(one["a"]) != bits(one["b"])
    assert bits(run(2, params)["a"]) != bits(one["a"])
    assert bits(run(jax.random.key(1), params)) == bits(one)
    alone = {"a": params["a"]}
    grads = {"a": grads["a"]}
    assert bits(run(1, alone)["a"]) == bits(one["a"])
    second = numbers(run(1, alone, 2))[0] - numbers(one["a"])[0]
    assert np.any((second != 0) != (numbers(one["a"])[0] != 1))


@pytest.mark.parametrize("way", WAYS)
def test_what_would_change_rounded_weights_may_not_stand_around(way):
    _net, objective = linear()
    ours = WAYS[way](optax.sgd(0.1))
    for wrong in (
        optax.chain(ours, optax.scale(0.5)),
        jt.optim.lookahead(ours),
        WAYS[way](ours),
        jt.optim.scale_rate(ours, 2.0, "net/scale"),
        optax.apply_if_finite(ours, 3),  # whose two cases would be of two types
    ):
        with pytest.raises(jt.InputError, match="master_weights and stochastic_rounding"):
            jt.init(objective, wrong, KEY, rows())
    for fine in (
        optax.chain(optax.clip(1.0), ours),
        optax.MultiSteps(ours, 2).gradient_transformation(),
        jt.optim.loss_scaled(jt.optim.by_path({"net/scale": ours, ".*": WAYS[way](optax.adam(0.1))})),
        optax.inject_hyperparams(lambda learning_rate: WAYS[way](optax.sgd(learning_rate)))(learning_rate=0.1),
    ):
        jt.init(objective, fine, KEY, rows())
    with pytest.raises(jt.InputError, match="needs the parameters"):
        ours.update({}, ours.init({}))


def test_what_can_not_be_rounded_is_told():
    half = {"net": {"w": jnp.ones(2, jnp.float16)}}
    with pytest.raises(jt.InputError, match="'net/w' is float16"):
        jt.optim.stochastic_rounding(optax.sgd(0.1), 0).init(half)
    jt.optim.master_weights(optax.sgd(0.1)).init(half)
    for way in WAYS.values():
        with pytest.raises(jt.InputError, match="'net/w' is float8_e4m3fn"):
            way(optax.sgd(0.1)).init({"net": {"w": jnp.ones(2, jnp.float8_e4m3fn)}})
    for wrong in (True, 0.5, None, "seed", jnp.zeros(2), jax.random.split(KEY)):
        with pytest.raises(jt.InputError, match="stochastic_rounding draws by a seed"):
            jt.optim.stochastic_rounding(optax.sgd(0.1), wrong)


def test_the_smallest_numbers_of_float16_stay():
    """Those below 6.1e-5 have fewer bits: rounding alone, without a cast, makes them zero."""
    params = {"w": jnp.asarray([3e-5, -5.9e-5, 6.1e-5, 1e-6, 1e-7, 0.0, 1.0, -3e4], jnp.float16)}
    grads = {"w": jnp.asarray([1, 1, 1, -1, 0, 1, 0.5, 2], jnp.float16)}
    found, state = after(WAYS["master"](optax.sgd(1e-7)), params, grads, 3)
    assert bits(found["w"]) == bits(np.asarray(state.master["w"]).astype(np.float16))
    np.testing.assert_allclose(numbers(found)[0][:4], [2.97e-5, -5.93e-5, 6.07e-5, 1.3e-6], rtol=0, atol=4e-8)


def test_penalties_towards_anchors_and_frozen_teachers_compute_in_float32_beside_narrow_weights():
    net = jt.models.mlp(3, hidden=(8,), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    batch = {"image": rows()["image"].reshape(8, 4, 4, 1), "label": np.arange(8) % 3}
    wide = jt.models.mlp(3, hidden=(8,))
    anchor = wide.init(jax.random.key(9), batch["image"])["params"]
    teacher = jt.frozen(wide, {"params": anchor})
    objective = jt.l2_sp({"model": anchor}) + jt.distillation(net, teacher) + jt.classification(net)
    optimizer = jt.optim.master_weights(optax.sgd(0.1))
    state = jt.init(objective, optimizer, KEY, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    start = numbers(state.params["model"])
    expected = 0.5 * sum(np.square(a - b).sum() for a, b in zip(start, numbers(anchor), strict=True))
    state, metrics = jt.train_step(objective, optimizer)(state, batch)
    assert {value.dtype for value in metrics.values()} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(metrics["l2_sp"], expected, rtol=1e-6)
    said = jt.evaluate(jt.classification(dataclasses.replace(teacher)), jt.TrainState.of({}), [batch])["loss"]
    logits, _ = wide.apply({"params": anchor}, batch["image"], train=False, key=None)
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits["logits"], jnp.asarray(batch["label"])).mean()
    np.testing.assert_allclose(said, entropy, rtol=1e-6)


def test_a_copy_follows_what_others_make_of_the_weights():
    """Two turns that move the same weights, by far less than bfloat16 adds: both arrive, and a jump is kept."""
    params = {"w": jnp.asarray([1.0, 16.0, -0.01, 0.0], jnp.bfloat16)}
    grads = jax.tree.map(jnp.ones_like, params)
    one, two = (jt.optim.master_weights(optax.sgd(rate)) for rate in (2e-3, 1e-3))
    states = [one.init(params), two.init(params)]

    @jax.jit
    def step(params, states):
        moved = []
        for optimizer, state in zip((one, two), states, strict=True):
            updates, state = optimizer.update(grads, state, params)
            params, moved = optax.apply_updates(params, updates), [*moved, state]
        return params, moved

    for _ in range(50):
        params, states = step(params, states)
    expected = np.float64([1, 16, -0.01, 0]) - 50 * 3e-3
    np.testing.assert_allclose(numbers(params)[0], expected, rtol=2**-7)
    params = {"w": jnp.asarray([0.001, 0.002, 300.0, -4.0], jnp.bfloat16)}
    begun = numbers(params)[0]
    params, states = step(params, states)
    np.testing.assert_allclose(numbers(params)[0], begun - 3e-3, rtol=2**-7, atol=1e-6)


def test_weights_that_would_stand_still_are_told_and_frozen_ones_are_not():
    _, objective = linear()
    with pytest.warns(UserWarning, match="'net/w' is stored in bfloat16, in which small updates are lost"):
        jt.init(objective, optax.sgd(0.1), KEY, rows())
    partly = jt.optim.by_path({"net/scale": jt.optim.master_weights(optax.sgd(0.1)), ".*": optax.sgd(0.1)})
    with pytest.warns(UserWarning, match="'net/w' is stored in bfloat16, in which small updates are lost"):
        jt.init(objective, partly, KEY, rows())
    for adapting in (False, True):
        jt.init(objective, jt.optim.freeze(optax.sgd(0.1), "net/w", adapt_statistics=adapting), KEY, rows())
    for way in WAYS.values():
        jt.init(objective, way(optax.sgd(0.1)), KEY, rows())
