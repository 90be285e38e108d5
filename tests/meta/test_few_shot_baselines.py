"""The baselines of few-shot learning against scikit-learn and NumPy loops."""

import chex
import jax
import numpy as np
import optax
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid

import jaxtransfer as jt
from tests.meta import few_shot_tasks as tasks
from tests.meta.few_shot_tasks import WAYS

KEY = jax.random.key(0)
SGD = {"optimizer": optax.sgd(0.1, momentum=0.9), "steps": 5}
LEARNERS = {
    "linear_head": lambda model, ways, **kw: jt.meta.linear_head(model, ways=ways, **SGD | kw),
    "simpleshot": lambda model, ways, **kw: jt.meta.simpleshot(model, ways=ways, **kw),
    "baseline_plus_plus": lambda model, ways, **kw: jt.meta.baseline_plus_plus(model, ways=ways, **SGD | kw),
}


def start(objective, batch):
    params, state = objective.init(KEY, batch)
    return params, state, np.asarray(params["model"]["w"], np.float64)


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def descend(gradient_of, params, rate, momentum, steps):
    """Gradient descent with momentum, by a loop."""
    params, trace = [p.copy() for p in params], [0.0] * len(params)
    for _ in range(steps):
        for i, gradient in enumerate(gradient_of(*params)):
            trace[i] = gradient + momentum * trace[i]
        params = [p - rate * t for p, t in zip(params, trace, strict=True)]
    return params


@pytest.mark.parametrize(("rate", "momentum", "steps"), [(0.1, 0.9, 5), (0.3, 0.0, 1), (0.1, 0.0, 0)])
def test_the_linear_head_is_the_loop_written_out(rate, momentum, steps, rng, x64):
    batch = tasks.vectors(rng)
    optimizer = optax.sgd(rate, momentum=momentum)
    objective = jt.meta.linear_head(tasks.linear_encoder(), ways=WAYS, optimizer=optimizer, steps=steps, view="input")
    params, state, w = start(objective, batch)

    def logits(support, labels, query):
        def gradient(kernel, bias):
            error = (softmax(support @ kernel + bias) - np.eye(WAYS)[labels]) / len(labels)
            return support.T @ error, error.sum(0)

        kernel, bias = descend(gradient, [np.zeros((4, WAYS)), np.zeros(WAYS)], rate, momentum, steps)
        return query @ kernel + bias

    loss, accuracy = tasks.mean_loss(logits, w, batch)
    got = tasks.scores(objective, params, state, batch)
    assert got == pytest.approx({"loss": loss, "linear_head": loss, "accuracy": accuracy}, rel=1e-8)


@pytest.mark.slow
def test_the_linear_head_converges_to_logistic_regression(rng, x64):
    batch = tasks.vectors(rng)
    decay = optax.add_decayed_weights(0.1, mask={"kernel": True, "bias": False})
    optimizer = optax.chain(decay, optax.sgd(0.2, momentum=0.9))
    objective = jt.meta.linear_head(tasks.linear_encoder(), ways=WAYS, optimizer=optimizer, steps=1500, view="input")
    params, state, w = start(objective, batch)

    def logits(support, labels, query):
        fitted = LogisticRegression(C=1 / (0.1 * len(labels)), tol=1e-10, max_iter=10_000).fit(support, labels)
        return fitted.decision_function(query[None])[0]

    loss, accuracy = tasks.mean_loss(logits, w, batch)
    got = tasks.scores(objective, params, state, batch)
    assert got == pytest.approx({"loss": loss, "linear_head": loss, "accuracy": accuracy}, rel=1e-5)


@pytest.mark.parametrize(("scale", "steps"), [(10.0, 4), (2.0, 4), (10.0, 0)])
def test_baseline_plus_plus_is_the_loop_written_out(scale, steps, rng, x64):
    batch = tasks.vectors(rng)
    objective = jt.meta.baseline_plus_plus(
        tasks.linear_encoder(),
        ways=WAYS,
        optimizer=optax.sgd(0.05, momentum=0.9),
        steps=steps,
        scale=scale,
        view="input",
    )
    params, state, w = start(objective, batch)

    def logits(support, labels, query):
        z = unit(support)

        def gradient(weight):
            error = (softmax(scale * z @ unit(weight).T) - np.eye(WAYS)[labels]) / len(labels)
            upstream, direction = scale * error.T @ z, unit(weight)
            across = upstream - np.sum(upstream * direction, axis=1, keepdims=True) * direction
            return (across / np.linalg.norm(weight, axis=1, keepdims=True),)

        first = np.stack([z[labels == way].mean(0) for way in range(WAYS)])
        (weight,) = descend(gradient, [first], 0.05, 0.9, steps)
        return scale * unit(weight) @ unit(query)

    loss, accuracy = tasks.mean_loss(logits, w, batch)
    got = tasks.scores(objective, params, state, batch)
    assert got == pytest.approx({"loss": loss, "baseline_plus_plus": loss, "accuracy": accuracy}, rel=1e-8)


@pytest.mark.parametrize(
    ("centred", "normalize"),
    [
        (False, False),
        (True, True),
        pytest.param(False, True, marks=pytest.mark.slow),
        pytest.param(True, False, marks=pytest.mark.slow),
    ],
)
def test_simpleshot_is_the_nearest_centroid(centred, normalize, rng, x64):
    batch = tasks.vectors(rng, queries=20)
    center = rng.normal(size=4) if centred else None
    objective = jt.meta.simpleshot(tasks.linear_encoder(), ways=WAYS, center=center, normalize=normalize, view="input")
    params, state, w = start(objective, batch)
    guesses = []

    def logits(support, labels, query):
        move = (lambda x: x - center) if centred else (lambda x: x)
        scale = unit if normalize else (lambda x: x)
        fitted = NearestCentroid().fit(scale(move(support)), labels)
        guesses.append(fitted.predict(scale(move(query))[None])[0])
        return [-np.sum((scale(move(query)) - c) ** 2) for c in fitted.centroids_]

    loss, accuracy = tasks.mean_loss(logits, w, batch)
    assert accuracy == np.mean(np.array(guesses) == batch["query"]["label"].ravel())
    got = tasks.scores(objective, params, state, batch)
    assert got == pytest.approx({"loss": loss, "simpleshot": loss, "accuracy": accuracy}, rel=1e-8)


def test_the_center_travels_as_an_argument(rng):
    batch = tasks.vectors(rng, dtype=np.float32)
    objective = jt.meta.simpleshot(tasks.linear_encoder(), ways=WAYS, center=np.ones(4, np.float32), view="input")
    assert len(objective.frozen) == 1
    state = jt.init(objective, optax.sgd(0.1), KEY, batch)
    before = np.array(state.params["model"]["w"])
    state, _ = jt.train_step(objective, optax.sgd(0.1))(state, batch)
    assert np.any(before != state.params["model"]["w"])  # simpleshot trains as a prototypical network
    wrong = jt.meta.simpleshot(tasks.linear_encoder(), ways=WAYS, center=np.ones(3), view="input")
    with pytest.raises(jt.InputError, match=r"center must be of shape \(4,\), a feature's; got \(3,\)"):
        jt.init(wrong, optax.sgd(0.1), KEY, batch)


def test_mean_features_counts_each_example_once(rng):
    model = jt.models.linen(tasks.Net())
    images = rng.normal(size=(10, 4, 4, 1)).astype(np.float32)
    variables = model.init(KEY, images)
    params, state = {"model": variables["params"]}, {"model": {"batch_stats": variables["batch_stats"]}}
    state = jax.tree.map(lambda x: x + 0.5, state)
    padded = np.concatenate([images[6:], np.full((2, 4, 4, 1), np.nan, np.float32)])
    batches = [{"image": images[:6], "mask": np.ones(6)}, {"image": padded, "mask": np.array([1.0] * 4 + [0] * 2)}]
    outputs, _ = model.apply({"params": params["model"], **state["model"]}, images, train=False, key=None)
    got = jt.meta.mean_features(model, params, state, batches)
    np.testing.assert_allclose(got, np.asarray(outputs["features"], np.float64).mean(0), rtol=1e-5)
    unmasked = [{"x": images[:5], "label": np.zeros(5, int)}, {"x": images[5:], "label": np.zeros(5, int)}]
    got = jt.meta.mean_features(model, params, state, unmasked, output="maps", view="x")
    np.testing.assert_allclose(got, np.asarray(outputs["maps"]).reshape(10, -1).mean(0), rtol=1e-5)
    assert got.shape == (64,)
    with pytest.raises(jt.InputError, match="at least one example"):
        jt.meta.mean_features(model, params, state, [])
    with pytest.raises(jt.InputError, match="no output 'maps4'"):
        jt.meta.mean_features(model, params, state, batches, output="maps4")


@pytest.mark.optimised
def test_cosine_classification_is_the_formula(rng, x64):
    batch = {"input": rng.normal(size=(6, 5)), "label": np.array([0, 1, 2, 3, 1, 0])}
    batch["mask"] = np.array([1.0, 1, 0, 1, 1, 1])
    objective = jt.meta.cosine_classification(tasks.linear_encoder(), classes=4, scale=3.0, view="input")
    params, state, w = start(objective, batch)
    weight = np.asarray(params["cosine_head"]["weight"], np.float64)
    assert weight.shape == (4, 4)
    losses, right = [], []
    for x, y, kept in zip(batch["input"], batch["label"], batch["mask"], strict=True):
        if kept:
            logits = 3.0 * unit(weight) @ unit(x @ w)
            losses.append(-np.log(softmax(logits)[y]))
            right.append(logits.argmax() == y)
    got = tasks.scores(objective, params, state, batch)
    loss = np.mean(losses)
    assert got == pytest.approx({"loss": loss, "cosine_classification": loss, "accuracy": np.mean(right)}, rel=1e-9)
    tasks.assert_the_gradient_is_that_of_differences(objective, batch)


def test_cosine_classification_at_degenerate_rows(rng):
    image = rng.normal(size=(4, 3)).astype(np.float32)
    image[0], image[1], image[2] = 0, np.nan, 1e4 * image[2]
    batch = {"image": image, "label": np.arange(4), "mask": np.array([1.0, 0, 1, 1])}
    objective = jt.meta.cosine_classification(tasks.given_features(), classes=4)
    params, state = objective.init(KEY, batch)

    @jax.jit
    def run(params, image, mask):
        def loss(params, image):
            return objective(params, state, {**batch, "image": image, "mask": mask}, jt.Context())[0]

        return jax.value_and_grad(loss, (0, 1))(params, image)

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run(params, image, batch["mask"])))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(run(params, image, np.zeros(4))))


@pytest.mark.slow
def test_baseline_plus_plus_from_base_training_to_evaluation(rng):
    """Base training on base classes, then both baselines on episodes of the same encoder."""
    model = jt.models.linen(tasks.Net())
    base = {"image": rng.normal(size=(12, 4, 4, 1)).astype(np.float32), "label": np.arange(12, dtype=np.int32) % 4}
    objective, optimizer = jt.meta.cosine_classification(model, classes=4, name="base"), optax.adam(0.01)
    state = jt.init(objective, optimizer, KEY, base)
    step = jt.train_step(objective, optimizer)
    seen = []
    for _ in range(10):
        state, metrics = step(state, base)
        seen.append(float(metrics["loss"]))
    assert seen[-1] < seen[0]
    assert state.params["base"]["weight"].shape == (4, 4)
    center = jt.meta.mean_features(model, state.params, state.state, [base])
    episodes = tasks.images(rng)
    del episodes["query"]["mask"]
    for few in (
        jt.meta.baseline_plus_plus(model, ways=WAYS, **SGD),
        jt.meta.simpleshot(model, ways=WAYS, center=center),
    ):
        result = jt.evaluate_episodes(few, state, [episodes])
        assert set(result) == {few.name, "accuracy"}
        assert result["accuracy"].episodes == 8
        assert result["accuracy"].mean > 0.5


@pytest.mark.slow
def test_heads_leave_encoder_and_statistics_alone(rng):
    batch = tasks.images(rng)
    model = jt.models.linen(tasks.Net())
    objective = LEARNERS["linear_head"](model, WAYS) + LEARNERS["baseline_plus_plus"](model, WAYS).named("other")
    params, state = objective.init(KEY, batch)

    @jax.jit
    def run(params):
        def loss(params):
            value, new, _ = objective(params, state, batch, jt.Context())
            return value, new

        return jax.value_and_grad(loss, has_aux=True)(params)

    (trained, new), gradient = run(params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    chex.assert_trees_all_equal(new, state)
    assert tasks.scores(objective, params, state, batch)["loss"] == pytest.approx(float(trained), rel=1e-6)


@pytest.mark.optimised
def test_simpleshots_gradient_equals_finite_differences(rng, x64):
    objective = jt.meta.simpleshot(tasks.linear_encoder(), ways=WAYS, center=rng.normal(size=4), view="input")
    tasks.assert_the_gradient_is_that_of_differences(objective, tasks.vectors(rng))


def test_misuse_is_one_clear_error(rng):
    batch = tasks.vectors(rng, dtype=np.float32)
    model = tasks.linear_encoder()
    for name, make in LEARNERS.items():
        with pytest.raises(jt.InputError, match=f"{name}, support: labels must be in \\[0, 2\\)"):
            jt.init(make(model, 2, view="input"), optax.sgd(0.1), KEY, batch)
        with pytest.raises(jt.InputError, match="no output 'logits'"):
            jt.init(make(model, WAYS, view="input", output="logits"), optax.sgd(0.1), KEY, batch)
    with pytest.raises(jt.InputError, match="steps must be at least 0; got -1"):
        LEARNERS["linear_head"](model, WAYS, steps=-1)
    with pytest.raises(jt.InputError, match="steps must be at least 0; got -1"):
        LEARNERS["baseline_plus_plus"](model, WAYS, steps=-1)
    with pytest.raises(jt.InputError, match="scale of the cosines must be above 0; got 0"):
        LEARNERS["baseline_plus_plus"](model, WAYS, scale=0)
    with pytest.raises(jt.InputError, match="scale of the cosines must be above 0; got 0"):
        jt.meta.cosine_classification(model, classes=4, scale=0)
    with pytest.raises(jt.InputError, match="classes must be at least 1; got 0"):
        jt.meta.cosine_classification(model, classes=0)
    base = {"input": np.zeros((2, 5), np.float32), "label": np.array([0, 4])}
    with pytest.raises(jt.InputError, match=r"labels must be in \[0, 4\); got 4"):
        jt.init(jt.meta.cosine_classification(model, classes=4, view="input"), optax.sgd(0.1), KEY, base)
    objective = jt.meta.cosine_classification(model, classes=5, view="input", output="maps4")
    with pytest.raises(jt.InputError, match="no output 'maps4'"):
        jt.init(objective, optax.sgd(0.1), KEY, base)
