"""Prototypical, matching and relation networks and R2-D2 against NumPy loops; distances and misuse."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.linear_model import Ridge

import jaxtransfer as jt
from tests.meta import few_shot_tasks as tasks
from tests.meta.few_shot_tasks import WAYS

KEY = jax.random.key(0)


def relation(model, ways, output="maps", **kwargs):
    return jt.meta.relation(model, tasks.comparison(), ways=ways, output=output, **kwargs)


LEARNERS = {
    "prototypical": lambda model, ways, **kw: jt.meta.prototypical(model, ways=ways, **kw),
    "matching": lambda model, ways, **kw: jt.meta.matching(model, ways=ways, **kw),
    "relation": relation,
    "r2d2": lambda model, ways, **kw: jt.meta.r2d2(model, ways=ways, **kw),
}


def start(objective, batch):
    params, state = objective.init(KEY, batch)
    return params, state, np.asarray(params["model"]["w"], np.float64)


def cosine(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


@pytest.mark.parametrize(
    ("distance", "temperature"),
    [("squared_euclidean", 1.0), ("squared_euclidean", 3.0), ("cosine_distance", 0.1)],
)
def test_prototypical_is_the_loop_written_out(distance, temperature, rng, x64):
    batch = tasks.vectors(rng)
    function = {
        "squared_euclidean": lambda a, b: np.sum((a - b) ** 2),
        "cosine_distance": lambda a, b: 1 - cosine(a, b),
    }[distance]
    objective = jt.meta.prototypical(
        tasks.linear_encoder(),
        ways=WAYS,
        distance=getattr(jt.meta, distance),
        temperature=temperature,
        view="input",
    )
    params, state, w = start(objective, batch)

    def logits(support, labels, query):
        return [-function(query, support[labels == way].mean(0)) / temperature for way in range(WAYS)]

    loss, accuracy = tasks.mean_loss(logits, w, batch)
    got = tasks.scores(objective, params, state, batch)
    assert got == pytest.approx({"loss": loss, "prototypical": loss, "accuracy": accuracy}, rel=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_matching_is_the_loop_written_out(temperature, rng, x64):
    batch = tasks.vectors(rng)
    objective = jt.meta.matching(tasks.linear_encoder(), ways=WAYS, temperature=temperature, view="input")
    params, state, w = start(objective, batch)

    def logits(support, labels, query):
        attention = np.exp([cosine(query, x) / temperature for x in support])
        attention /= attention.sum()
        return [np.log(attention[labels == way].sum()) for way in range(WAYS)]

    loss, accuracy = tasks.mean_loss(logits, w, batch)
    got = tasks.scores(objective, params, state, batch)
    assert got == pytest.approx({"loss": loss, "matching": loss, "accuracy": accuracy}, rel=1e-9)


def test_matching_takes_another_distance(rng, x64):
    batch = tasks.vectors(rng, shots=(1, 1, 1))
    kwargs = {"ways": WAYS, "view": "input", "distance": jt.meta.squared_euclidean, "temperature": 2.0}
    attention = jt.meta.matching(tasks.linear_encoder(), **kwargs)
    nearest = jt.meta.prototypical(tasks.linear_encoder(), **kwargs)  # with one shot they are the same
    params, state, _ = start(attention, batch)
    got, expected = (tasks.scores(o, params, state, batch)["loss"] for o in (attention, nearest))
    assert got == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", ["score_error", "cross_entropy"])
def test_relation_is_the_loop_written_out(loss, rng, x64):
    batch = tasks.vectors(rng)
    function = jt.meta.score_error if loss == "score_error" else jt.losses.cross_entropy
    objective = jt.meta.relation(
        tasks.linear_encoder(), tasks.comparison(), ways=WAYS, loss=function, output="maps", view="input"
    )
    params, state, w = start(objective, batch)
    a, b = (np.asarray(params["relation"][name], np.float64) for name in "ab")
    errors = []

    def logits(support, labels, query):
        out = []
        for way in range(WAYS):
            summed = support[labels == way].sum(0).reshape(2, 2)
            pair = np.concatenate([summed, query.reshape(2, 2)], axis=-1)
            out.append((np.tanh(pair.ravel() @ a) @ b)[0])
        errors.append(1 / (1 + np.exp(-np.array(out))))
        return out

    value, accuracy = tasks.mean_loss(logits, w, batch)
    if loss == "score_error":
        value = np.mean((np.array(errors) - np.eye(WAYS)[batch["query"]["label"].ravel()]) ** 2)
    got = tasks.scores(objective, params, state, batch)
    assert got == pytest.approx({"loss": value, "relation": value, "accuracy": accuracy}, rel=1e-9)


@pytest.mark.parametrize("shots", [(1, 1, 1), (1, 2, 3)])  # fewer and more examples than features
def test_r2d2_is_scikit_learns_ridge(shots, rng, x64):
    batch = tasks.vectors(rng, shots=shots)
    objective = jt.meta.r2d2(tasks.linear_encoder(), ways=WAYS, strength=0.7, scale=4.0, bias=0.3, view="input")
    params, state, w = start(objective, batch)
    assert np.exp(params["r2d2"]["log_lambda"]) == pytest.approx(0.7)

    def logits(support, labels, query):
        ridge = Ridge(alpha=0.7, fit_intercept=False).fit(support, np.eye(WAYS)[labels])
        return 4.0 * ridge.predict(query[None])[0] + 0.3

    loss, accuracy = tasks.mean_loss(logits, w, batch)
    got = tasks.scores(objective, params, state, batch)
    assert got == pytest.approx({"loss": loss, "r2d2": loss, "accuracy": accuracy}, rel=1e-8)
    assert jt.meta.r2d2(tasks.linear_encoder(), ways=WAYS, view="input").init(KEY, batch)[0]["r2d2"] == {
        "log_lambda": 0,
        "scale": 1,
        "bias": 0,
    }


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (4, 4)])
def test_both_forms_of_the_ridge_solve_the_normal_equations(shape, rng, x64):
    x, y = rng.normal(size=shape), rng.normal(size=(shape[0], 2))
    weights = jt.meta.ridge_weights(jnp.asarray(x), jnp.asarray(y), 0.3)
    np.testing.assert_allclose((x.T @ x + 0.3 * np.eye(shape[1])) @ weights, x.T @ y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 512), (25, 1600), (50, 16)])
def test_the_ridge_bears_identical_huge_examples(shape):
    x = np.tile(np.linspace(0.5e4, 1.5e4, shape[1], dtype=np.float32), (shape[0], 1))
    y = jnp.asarray(np.eye(5, dtype=np.float32)[np.arange(shape[0]) % 5])

    def predict(x):
        prediction = x @ jt.meta.ridge_weights(x, y, 1e-8)
        return jnp.sum(prediction**2), prediction

    (_, prediction), gradient = jax.jit(jax.value_and_grad(predict, has_aux=True))(x)
    assert np.isfinite(gradient).all()
    # The labels' mean, for all the same; how near is a matter of the precision, as the system is singular.
    np.testing.assert_allclose(prediction, np.full(prediction.shape, 0.2), atol=0.05)


def test_a_query_of_an_absent_class_is_wrong_and_its_loss_finite(rng):
    batch = tasks.vectors(rng, shots=(2, 3), dtype=np.float32)
    batch["query"]["label"][:] = 2
    objective = jt.meta.prototypical(tasks.linear_encoder(), ways=3, view="input")
    params, state = objective.init(KEY, batch)
    got = tasks.scores(objective, params, state, batch)
    assert got["accuracy"] == 0
    assert 1e4 < got["loss"] < 1e6


def test_distances_at_the_edges(rng):
    far = 1e4 + jnp.asarray(rng.normal(size=(3, 4)).astype(np.float32))
    exact = np.sum((np.asarray(far, np.float64)[:, None] - np.asarray(far, np.float64)[None]) ** 2, -1)
    np.testing.assert_allclose(jt.meta.squared_euclidean(far, far), exact, rtol=1e-6)
    half = jt.meta.squared_euclidean(jnp.asarray(np.full((1, 4), 300, np.float16)), jnp.zeros((2, 4), jnp.float16))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, np.full((1, 2), 360000))
    lines = np.array([[3, 4]]) * np.array([[1e-10], [1e-4], [1e4], [1e30]])
    points = np.array([[1, 0], [-3, -4], [0, 0]])
    got = jt.meta.cosine_distance(jnp.asarray(lines, jnp.float32), jnp.asarray(points, jnp.float32))
    np.testing.assert_allclose(got, np.tile([0.4, 2, 1], (4, 1)), atol=1e-6)  # the angle knows no scale

    @jax.jit
    @jax.grad
    def gradient(x):
        return jnp.sum(jt.meta.cosine_distance(x[None], jnp.array([[1.0, 2.0]])))

    np.testing.assert_array_equal(gradient(np.zeros(2, np.float32)), np.zeros(2))
    np.testing.assert_allclose(gradient(np.array([2, 0], np.float32)), [0, -(2 / 5**0.5) / 2], atol=1e-6)


def test_distances_keep_leading_axes(rng):
    query, points = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 5, 4))
    for distance in map(jax.jit, (jt.meta.squared_euclidean, jt.meta.cosine_distance)):
        one = [distance(q, p) for q, p in zip(query, points, strict=True)]
        np.testing.assert_allclose(distance(query, points), np.stack(one), rtol=1e-5)


def test_score_error_is_the_mean_square(rng):
    logits, labels = rng.normal(size=(4, 3)).astype(np.float16), np.array([0, 2, 1, 3])
    got = jt.meta.score_error(jnp.asarray(logits), jnp.asarray(labels))
    sigmoid = 1 / (1 + np.exp(-logits[:3].astype(np.float64)))
    expected = [np.mean((sigmoid[row] - np.eye(3)[labels[row]]) ** 2) for row in range(3)]
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got[:3], expected, rtol=1e-5)
    assert np.isnan(got[3])  # no such class
    huge = jnp.array([[1e30, -1e30]])
    assert np.isfinite(jax.grad(lambda x: jnp.sum(jt.meta.score_error(x, jnp.array([1]))))(huge)).all()


def test_batch_norm_sees_the_whole_batch_in_training_and_running_statistics_in_evaluation(rng):
    batch = tasks.images(rng, tasks=2)
    model = jt.models.linen(tasks.Net())
    objective = jt.meta.prototypical(model, ways=WAYS)
    params, state = objective.init(KEY, batch)
    run = jax.jit(lambda train: objective(params, state, batch, jt.Context(train=train))[1], static_argnums=0)
    new = run(True)
    everything = np.concatenate([batch[part]["image"].reshape(-1, 4, 4, 1) for part in ("support", "query")])
    _, expected = model.apply({"params": params["model"], **state["model"]}, everything, train=True, key=None)
    chex.assert_trees_all_close(new["model"], expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(run(False), state)
    assert jax.tree.structure(new) == jax.tree.structure(state)


def test_they_add_up_with_ordinary_terms_and_run_frozen_models(rng):
    batch = tasks.vectors(rng, dtype=np.float32)
    model = tasks.linear_encoder()
    weights = model.init(KEY, batch["support"]["input"][0])
    frozen = jt.meta.r2d2(jt.frozen(model.named("teacher"), weights), ways=WAYS, view="input").named("teacher")
    metric = jt.meta.prototypical(model, ways=WAYS, view="input")
    objective = (metric + 0.5 * frozen).on("episodes") + 0.1 * jt.l2(only="model")
    state = jt.init(objective, optax.sgd(0.1), KEY, {"episodes": batch})
    assert set(state.params) == {"model", "r2d2"}
    before = jax.tree.map(np.array, state.params)
    state, metrics = jt.train_step(objective, optax.sgd(0.1))(state, {"episodes": batch})
    names = {"prototypical", "accuracy", "teacher", "teacher/accuracy"}
    assert set(metrics) == {"loss", "l2"} | {f"episodes/{name}" for name in names}
    assert all(
        np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (before["model"], state.params["model"])), strict=True)
    )
    assert before["r2d2"]["log_lambda"] != state.params["r2d2"]["log_lambda"]


@pytest.mark.parametrize("name", LEARNERS)
def test_misuse_is_one_clear_error(name, rng):
    batch = tasks.vectors(rng, dtype=np.float32)

    def begin(batch=batch, ways=WAYS, **kwargs):
        objective = LEARNERS[name](tasks.linear_encoder(), ways, **{"view": "input"} | kwargs)
        jt.init(objective, optax.sgd(0.1), KEY, batch)

    def changed(part, **entries):
        return {**batch, part: {**batch[part], **entries}}

    begin()
    with pytest.raises(jt.InputError, match=f"{name}, support: labels must be in \\[0, 2\\); got 2"):
        begin(ways=2)
    with pytest.raises(jt.InputError, match=f"{name}, query: labels .* got -1"):
        begin(changed("query", label=np.full((2, 5), -1, np.int32)))
    begin(changed("query", label=np.full((2, 5), -1, np.int32), mask=np.zeros((2, 5), np.float32)))
    with pytest.raises(jt.InputError, match="'support'"):
        begin(batch["query"])
    with pytest.raises(jt.InputError, match="'query'"):
        begin({"support": batch["support"]})
    with pytest.raises(jt.InputError, match="'support/image'"):
        begin(view="image")
    with pytest.raises(jt.InputError, match=r"no output 'logits'; it has \['features', 'maps'\]"):
        begin(output="logits")
    with pytest.raises(jt.InputError, match="same tasks; got 2 and 1"):
        begin({**batch, "query": jax.tree.map(lambda x: x[:1], batch["query"])})
    with pytest.raises(jt.InputError, match=r"labels and mask \[tasks, examples\]"):
        begin(changed("query", label=batch["query"]["label"][:, :2]))
    with pytest.raises(jt.InputError, match="must be integers; got float32"):
        begin(changed("support", label=batch["support"]["label"].astype(np.float32)))
    with pytest.raises(jt.InputError, match="ways must be at least 1; got 0"):
        begin(ways=0)


def test_arguments_out_of_range_are_refused():
    model = tasks.linear_encoder()
    with pytest.raises(jt.InputError, match="temperature must be above 0; got 0"):
        jt.meta.prototypical(model, ways=2, temperature=0)
    with pytest.raises(jt.InputError, match="temperature must be above 0; got -1"):
        jt.meta.matching(model, ways=2, temperature=-1)
    with pytest.raises(jt.InputError, match=r"strength .* must be above 0; got 0"):
        jt.meta.r2d2(model, ways=2, strength=0)
    with pytest.raises(jt.InputError, match="two different models are named 'model'"):
        jt.meta.relation(model, tasks.comparison().named("model"), ways=2)


def test_a_relation_module_gives_one_score(rng):
    batch = tasks.vectors(rng, dtype=np.float32)
    wide = jt.models.mlp(2, hidden=(), name="relation")
    objective = jt.meta.relation(tasks.linear_encoder(), wide, ways=WAYS, output="features", view="input")
    with pytest.raises(jt.InputError, match=r"logits \[pairs, 1\]; got \(30, 2\)"):
        jt.init(objective, optax.sgd(0.1), KEY, batch)


def test_relation_net_has_the_layers_of_the_paper():
    model = jt.models.relation_net()
    params = jax.eval_shape(model.init, KEY, jnp.zeros((2, 7, 7, 128)))["params"]
    shapes = {path: leaf.shape for path, leaf in jt.tree.leaves_by_path(params).items()}
    assert shapes["stage1_conv/kernel"] == (3, 3, 128, 64)
    assert shapes["stage2_conv/kernel"] == (3, 3, 64, 64)
    assert shapes["hidden/kernel"] == (64, 8)
    assert shapes["head/kernel"] == (8, 1)
    for path in shapes:
        assert sum(jt.tree.matches(path, stage) for stage in model.stages) == 1


@pytest.mark.parametrize("name", ["prototypical", "matching", "simpleshot", "matching by distance"])
def test_four_hundred_ways_need_no_array_of_pairs_times_features(name):
    kwargs = {"ways": 400, "view": "input"}
    make = {
        "prototypical": lambda model: jt.meta.prototypical(model, **kwargs),
        "matching": lambda model: jt.meta.matching(model, **kwargs),
        "matching by distance": lambda model: jt.meta.matching(model, distance=jt.meta.squared_euclidean, **kwargs),
        "simpleshot": lambda model: jt.meta.simpleshot(model, **kwargs),
    }
    scaled = jt.Model(
        lambda key, x: {"params": {"w": jnp.ones(1600)}},
        lambda variables, x, *, train, key: ({"features": x * variables["params"]["w"][None]}, {}),
    )
    objective = make[name](scaled)
    part = {
        "input": jax.ShapeDtypeStruct((1, 400, 1600), np.float32),
        "label": jax.ShapeDtypeStruct((1, 400), np.int32),
    }

    def gradient(params, batch):
        return jax.value_and_grad(lambda p: objective(p, {"model": {}}, batch, jt.Context(key=None))[0])(params)

    program = jax.jit(gradient).lower({"model": {"w": np.ones(1600, np.float32)}}, {"support": part, "query": part})
    assert program.compile().memory_analysis().temp_size_in_bytes <= 50 * 2**20


def test_many_distances_are_as_exact_as_few(rng):
    query, points = (1e3 + rng.normal(size=(rows, 700)).astype(np.float32) for rows in (60, 50))
    points[0] = query[0]
    weight = rng.normal(size=(60, 50)).astype(np.float32)
    distances, pull = jax.jit(lambda q, p: jax.vjp(jt.meta.squared_euclidean, q, p))(query, points)
    difference = np.float64(query)[:, None] - np.float64(points)[None]
    np.testing.assert_allclose(distances, np.sum(difference**2, -1), rtol=1e-6)
    assert distances[0, 0] == 0
    for got, axis in zip(pull(weight), (1, 0), strict=True):
        expected = (1 - 2 * (1 - axis)) * np.sum(2 * weight[..., None] * difference, axis)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)
