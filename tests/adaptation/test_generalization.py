"""Methods over several source domains: formulas on a small model, what the state keeps, devices, refusals."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from tests import gradients
from tests.contract import assert_same_on_any_devices, batches, normalised

KEY = jax.random.key(3)
NAMES = ("source", "target")  # as the contract's batches have them; both are sources here
A = jt.adaptation


def linear(tap=True):
    """Features that are the image, and a linear head: what a loss reads is then known in NumPy."""

    def init(key, inputs):
        return {"params": {"head": {"kernel": 0.3 * jax.random.normal(key, (4, 3)), "bias": jnp.array([0.1, 0, -0.2])}}}

    def apply(variables, inputs, *, train, key):
        features, head = inputs, variables["params"]["head"]
        return {"features": features, "logits": features @ head["kernel"] + head["bias"][None]}, {}

    return jt.Model(init, apply, stages=("body", "head"))


def domain(rng, rows, mask=False):
    part = {"image": rng.normal(size=(rows, 4)).astype(np.float32), "label": rng.integers(0, 3, rows).astype(np.int32)}
    return {**part, "mask": (np.arange(rows) % 3 > 0).astype(np.float32)} if mask else part


def batch_of(rng, sizes=(6, 9), mask=False, names=NAMES):
    return {name: domain(rng, rows, mask) for name, rows in zip(names, sizes, strict=True)}


def run(objective, batch, *, params=None, state=None, train=True, step=0):
    """Value, gradient, state and metrics of one call, compiled."""
    fresh = objective.init(KEY, batch)
    params, state = fresh[0] if params is None else params, fresh[1] if state is None else state

    def loss(params, state, batch):
        ctx = jt.Context(step, KEY if train else None, train=train)
        value, state, metrics = objective(params, state, batch, ctx)
        return value, (state, {name: mean.value for name, mean in metrics.items()})

    (value, (state, metrics)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, state, batch)
    return float(value), gradient, state, metrics


def logits_of(params, part):
    head = jax.tree.map(np.asarray, params["model"]["head"])
    return np.asarray(part["image"] @ head["kernel"] + head["bias"], np.float64)


def mean_cross_entropy(params, part):
    logits = logits_of(params, part)
    values = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(logits)), part["label"]]
    return np.average(values, weights=part.get("mask", np.ones(len(values))))


@pytest.mark.parametrize("mask", [pytest.param(False, marks=pytest.mark.slow), True])
def test_penalties_are_the_means_over_domains(rng, mask):
    model, batch = linear(), batch_of(rng, mask=mask)
    params = jt.classification(model).init(KEY, batch["source"])[0]
    irm, fishr, stacked = [], [], []
    for part in batch.values():
        z, weights = logits_of(params, part), part.get("mask", np.ones(len(part["label"])))
        error = np.exp(z) / np.exp(z).sum(1, keepdims=True) - np.eye(3)[part["label"]]
        slopes = (error * z).sum(1)
        irm.append(np.prod([np.average(slopes[h::2], weights=weights[h::2]) for h in (0, 1)]))
        rows = np.concatenate([part["image"][:, :, None] * error[:, None], error[:, None]], 1)
        centred = rows - np.average(rows, axis=0, weights=weights)
        stacked.append(np.average(centred**2, axis=0, weights=weights))
    for own in stacked:
        fishr.append(np.mean((own - np.mean(stacked, axis=0)) ** 2))
    value, _, _, metrics = run(A.irm(model, domains=NAMES), batch, params=params)
    assert value == pytest.approx(np.mean(irm), rel=1e-5)
    assert float(metrics["irm"]) == pytest.approx(value)
    value, _, _, metrics = run(A.fishr(model, domains=NAMES), batch, params=params)
    assert value == pytest.approx(np.mean(fishr), rel=1e-4)
    assert float(metrics["fishr"]) == pytest.approx(value)


@pytest.mark.parametrize("mask", [pytest.param(False, marks=pytest.mark.slow), True])
def test_coral_is_the_mean_over_pairs(rng, mask):
    """In float64, of three domains of unequal sizes; masked rows are not there."""
    model, names = linear(), ("a", "b", "c")
    batch = batch_of(rng, (6, 9, 7), mask, names)
    rows = [np.asarray(part["image"], np.float64)[part.get("mask", np.ones(99))[: len(part["image"])] > 0]
            for part in batch.values()]  # fmt: skip
    pairs = [(0, 1), (0, 2), (1, 2)]
    gaps = [np.mean((np.cov(rows[a].T) - np.cov(rows[b].T)) ** 2) for a, b in pairs]
    means = [np.mean((rows[a].mean(0) - rows[b].mean(0)) ** 2) for a, b in pairs]
    value, _, _, metrics = run(A.coral_of_sources(model, domains=names), batch)
    assert value == pytest.approx(np.mean(gaps) + np.mean(means), rel=1e-5)
    assert float(metrics["coral_of_sources"]) == pytest.approx(value)
    value, *_ = run(A.coral_of_sources(model, domains=names, released=False), batch)
    assert value == pytest.approx(np.mean(gaps) / 4, rel=1e-5)


@pytest.mark.slow
def test_fishr_keeps_averages_and_its_gradient_does_not_depend_on_the_decay(rng):
    model, batch = linear(), batch_of(rng)
    slopes = []
    for decay in (0.0, 0.9):
        term = A.fishr(model, domains=NAMES, decay=decay)
        _, gradient, state, _ = run(term, batch)
        slopes.append(gradient)
        (name,) = term.per_update
        assert jax.tree.map(jnp.shape, state[name]) == {"kernel": (2, 4, 3), "bias": (2, 3)}
        now = jt.losses.gradient_variance(
            batch["source"]["image"],
            jnp.asarray(logits_of(term.init(KEY, batch)[0], batch["source"]), jnp.float32),
            batch["source"]["label"],
        )
        np.testing.assert_allclose(state[name]["bias"][0], (1 - decay) * now["bias"], rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *slopes)
    value, _, again, _ = run(term, batch, state=state)
    np.testing.assert_allclose(again[name]["bias"], 1.9 * state[name]["bias"], rtol=1e-5)
    shown, _, kept, _ = run(term, batch, state=state, train=False)
    assert shown == pytest.approx(value)
    np.testing.assert_array_equal(kept[name]["bias"], state[name]["bias"])


def test_vrex_is_the_variance_of_any_losses(rng):
    model, batch = linear(), batch_of(rng, (4, 6, 8), names=("a", "b", "c"))
    erm = [jt.classification(model).on(name) + 0.5 * jt.l2().named(f"l2 {name}") for name in batch]
    objective = sum(erm) / 3 + 10 * A.vrex(erm)
    params = objective.init(KEY, batch)[0]
    value, gradient, _, metrics = run(objective, batch)
    losses = [mean_cross_entropy(params, part) for part in batch.values()]
    assert float(metrics["vrex"]) == pytest.approx(np.var(losses), rel=1e-4)
    size = sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(params))
    assert value == pytest.approx(np.mean(losses) + 0.25 * size + 10 * np.var(losses), rel=1e-5)

    def by_hand(params):
        own = [run_loss(term, params, batch) for term in erm]
        return jnp.mean(jnp.stack(own)) + 10 * jnp.var(jnp.stack(own))

    expected = jax.jit(jax.grad(by_hand))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, expected)


def run_loss(term, params, batch):
    return term(params, {"model": {}}, batch, jt.Context())[0]


def test_group_dro_leans_to_the_worst_and_stays_in_evaluation(rng):
    model, batch = linear(), batch_of(rng, (4, 6, 8), names=("a", "b", "c"))
    objective = A.group_dro([jt.classification(model).on(name) for name in batch], rate=0.7)
    params, state = objective.init(KEY, batch)
    np.testing.assert_allclose(state["group_dro"]["weights"], np.ones(3) / 3)
    losses = np.array([mean_cross_entropy(params, part) for part in batch.values()])
    weights = np.ones(3) / 3
    for _ in range(2):
        weights = weights * np.exp(0.7 * losses)
        weights /= weights.sum()
        value, gradient, state, metrics = run(objective, batch, params=params, state=state)
        np.testing.assert_allclose(state["group_dro"]["weights"], weights, rtol=1e-5)
        assert value == pytest.approx(weights @ losses, rel=1e-5)
    assert float(metrics["group_dro/b/classification"]) == pytest.approx(weights[1], rel=1e-5)
    assert "c/accuracy" in metrics
    terms = [jt.classification(model).on(name) for name in batch]
    own = jax.jit(lambda p: [jax.grad(functools.partial(run_loss, term))(p, batch) for term in terms])(params)
    expected = jax.tree.map(lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves, strict=True)), *own)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, expected)
    shown, _, kept, _ = run(objective, batch, params=params, state=state, train=False)
    np.testing.assert_array_equal(kept["group_dro"]["weights"], state["group_dro"]["weights"])
    assert shown == pytest.approx(weights @ losses, rel=1e-5)


def test_group_weights_move_once_per_update(rng):
    """Under accumulation, q is that of the last batch of an update."""
    model, data = linear(), [batch_of(rng) for _ in range(4)]
    objective = A.group_dro([jt.classification(model).on(name) for name in NAMES], rate=0.5)
    optimizer = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    state, step = jt.init(objective, optimizer, KEY, data[0]), jt.train_step(objective, optimizer)
    seen = [np.array(state.state["group_dro"]["weights"])]
    for batch in data:
        state, _ = step(state, batch)
        seen.append(np.array(state.state["group_dro"]["weights"]))
    moved = [bool(np.any(a != b)) for a, b in itertools.pairwise(seen)]
    assert moved == [False, True, False, True]


def order_of(count):
    return np.asarray(jax.random.permutation(jt.Context(0, KEY).shared_key("mldg"), count))


@pytest.mark.parametrize("first_order", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_mldg_is_the_formula(rng, first_order):
    """F + β G(θ − α ∇F), with the drawn split, by jax.grad of a loss written here."""
    model, names = linear(), ("a", "b", "c")
    batch = batch_of(rng, (6, 6, 6), names=names)
    how = {"domains": names, "inner": optax.sgd(0.5), "beta": 0.7, "first_order": first_order, "test_domains": 2}
    objective = A.mldg(jt.classification(model), **how)
    params, _ = objective.init(KEY, batch)
    order = order_of(3)

    def cross_entropy(params, part):
        return run_loss(jt.classification(model), params, part)

    def formula(params):
        train, test = ([batch[names[i]] for i in chosen] for chosen in (order[2:], order[:2]))

        def mean(params, parts):
            return sum(cross_entropy(params, part) for part in parts) / len(parts)

        slope = jax.grad(mean)(params, train)
        slope = jax.lax.stop_gradient(slope) if first_order else slope
        fast = jax.tree.map(lambda p, g: p - 0.5 * g, params, slope)
        return mean(params, train) + 0.7 * mean(fast, test)

    value, gradient, _, metrics = run(objective, batch, params=params)
    expected, slope = jax.jit(jax.value_and_grad(formula))(params)
    assert value == pytest.approx(float(expected), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, slope)
    assert set(metrics) >= {"mldg", "mldg/meta_test", "classification", "accuracy"}


def test_mldg_draws_another_split_each_step_and_moves_statistics(rng):
    traces = []
    model, data = normalised(traces), [batches(rng, 1, 8)[0] for _ in range(3)]
    batch = dict(zip("abc", data, strict=True))
    objective = A.mldg(jt.classification(model), domains=("a", "b", "c"), inner=optax.sgd(0.1))
    optimizer = optax.sgd(0.0)
    state, step = jt.init(objective, optimizer, KEY, batch), jt.train_step(objective, optimizer)
    seen = []
    for _ in range(6):
        state, metrics = step(state, batch)
        seen.append(round(float(metrics["mldg/meta_test"]), 5))
    assert len(set(seen)) > 1
    assert np.any(np.asarray(state.state["model"]["batch_stats"]["mean"]) != 0)


def test_dense_average_is_the_plain_mean(rng):
    model = linear()
    average = A.dense_average(model, start=2, end=4)
    objective = jt.classification(model) + jt.averaged(average)
    optimizer, data = optax.sgd(0.5), [domain(rng, 6) for _ in range(7)]
    state, step = jt.init(objective, optimizer, KEY, data[0]), jt.train_step(objective, optimizer)
    after, kept = [], []
    for part in data:
        state, _ = step(state, part)
        after.append(np.array(state.params["model"]["head"]["kernel"]))
        kept.append(np.array(state.state["model_dense"]["params"]["head"]["kernel"]))
    np.testing.assert_array_equal(kept[1], after[0])  # one update behind, and the model itself before the start
    np.testing.assert_allclose(kept[3], (after[1] + after[2]) / 2, rtol=1e-5)
    for later in (4, 5, 6):
        np.testing.assert_allclose(kept[later], (after[1] + after[2] + after[3]) / 3, rtol=1e-5)


def swad_by_the_paper(losses, converge, tolerance, ratio):
    """Algorithm 1, loss by loss."""
    start = threshold = None
    for i in range(len(losses)):
        if start is None:
            if i + 1 >= converge and losses[i - converge + 1] == min(losses[i - converge + 1 : i + 1]):
                start = i - converge + 1
                threshold = ratio * sum(losses[start : i + 1]) / converge
        elif i + 1 >= tolerance and threshold < min(losses[i - tolerance + 1 : i + 1]):
            return start, i - tolerance
    return (len(losses) - 1 if start is None else start), len(losses) - 1


def test_swad_interval(rng):
    losses = [3.0, 2.0, 1.0, 1.1, 1.2, 1.3, 1.5, 1.6, 1.7, 0.2]
    assert A.swad_interval(losses, converge=3, tolerance=2, ratio=1.2) == (2, 5)
    assert A.swad_interval(losses) == (2, 9)
    assert A.swad_interval([3.0, 2.0, 1.0]) == (2, 2)
    assert A.swad_interval([1.0]) == (0, 0)
    for _ in range(200):
        values = list(np.cumsum(rng.normal(size=rng.integers(1, 25))) ** 2 + 0.1)
        how = {"converge": int(rng.integers(1, 5)), "tolerance": int(rng.integers(1, 7)), "ratio": rng.uniform(1, 2)}
        assert A.swad_interval(values, **how) == swad_by_the_paper(values, *how.values())


def test_everything_shares_one_run(rng):
    """A sum of the domains' losses and of penalties runs the model once, on all domains together."""
    traces = []
    model, batch = normalised(traces), dict(zip(NAMES, (batches(rng, 1, 16)[0], batches(rng, 1, 8)[0]), strict=True))
    erm = [jt.classification(model).on(name) for name in NAMES]
    penalties = A.irm(model, domains=NAMES) + A.fishr(model, domains=NAMES) + A.vrex(erm)
    objective = jt.together(sum(erm) / 2 + jt.schedules.switch(0.0, 1.0, at=5) * penalties)
    assert len(objective.forwards) == 1
    weighed = jt.together(A.group_dro(erm) + A.irm(model, domains=NAMES))
    assert len(weighed.forwards) == 1
    params, state = weighed.init(KEY, batch)
    traces.clear()
    jax.eval_shape(lambda p, s: weighed(p, s, batch, jt.Context())[0], params, state)
    assert len(traces) == 1


ROWS = {
    "coral": lambda model: jt.together(plain(model) + 10 * A.coral_of_sources(model, domains=NAMES)),
    "irm": lambda model: jt.together(plain(model) + A.irm(model, domains=NAMES)),
    "fishr": lambda model: jt.together(plain(model) + 10 * A.fishr(model, domains=NAMES)),
    "vrex": lambda model: jt.together(plain(model) + A.vrex(each(model))),
    "group_dro": lambda model: (
        jt.together(A.group_dro(each(model), rate=0.5)) + jt.averaged(A.dense_average(model, start=1))
    ),
    "mldg": lambda model: A.mldg(jt.classification(model), domains=NAMES, inner=optax.sgd(0.3)),
    "mldg of first order": lambda model: A.mldg(
        jt.classification(model), domains=NAMES, inner=optax.sgd(0.3), first_order=True, steps=2
    ),
}
FAST = {"group_dro"}


def each(model):
    return [jt.classification(model).on(name) for name in NAMES]


def plain(model):
    return sum(each(model)) / 2


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in ROWS])
def test_contract(name, mesh_of):
    assert_same_on_any_devices(ROWS[name], mesh_of, rows=(8, 8) if "mldg" in name else (16, 8))


@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.parametrize("name", [name for name in ROWS if name != "mldg of first order"])
def test_the_compiled_gradient_is_right(name):
    """Against differences in float64, and in float32; group weights are not differentiated: operation by operation."""
    rng = np.random.default_rng(1)
    model = normalised([])
    batch = {"source": batches(rng, 1, 8)[0], "target": batches(rng, 1, 8)[0]}
    objective = ROWS[name](model)
    params, state = objective.init(KEY, batch)
    loss = gradients.loss_of(objective, state, batch, KEY)
    how = {"differences": False, "unfused": True} if name == "group_dro" else {"differences": True}
    gradients.assert_right(loss, jax.tree.map(np.array, params), "body", **how)


@pytest.mark.slow
def test_it_resumes_to_the_same_bits(rng, tmp_path):
    model, data = linear(), [batch_of(rng) for _ in range(6)]
    erm = [jt.classification(model).on(name) for name in NAMES]
    average = A.dense_average(model, start=2)
    objective = jt.together(A.group_dro(erm, rate=0.5) + A.fishr(model, domains=NAMES)) + jt.averaged(average)
    fit = functools.partial(jt.fit, objective, optax.sgd(0.1), data, progress=False, save_every=1)
    whole = fit(steps=6, out=tmp_path / "whole")
    fit(steps=3, out=tmp_path / "cut")
    again = fit(steps=6, out=tmp_path / "cut")
    jax.tree.map(np.testing.assert_array_equal, *((f.state.params, f.state.state) for f in (whole, again)))


def test_refusals(rng):
    model, batch = linear(), batch_of(rng)
    erm = [jt.classification(model).on(name) for name in NAMES]
    mldg = functools.partial(A.mldg, jt.classification(model), inner=optax.sgd(0.1))
    for make, message in (
        (lambda: A.irm(model, domains=("a",)), "two source domains or more"),
        (lambda: A.irm(model, domains="ab"), "two source domains or more"),
        (lambda: A.fishr(model, domains=("a", "a")), "counts once"),
        (lambda: A.fishr(model, domains=NAMES, decay=1.0), "below 1"),
        (lambda: A.fishr(model, domains=NAMES, decay=1.5), "decay must be"),
        (lambda: A.coral_of_sources(model, domains=("a",)), "two source domains or more"),
        (lambda: A.vrex(erm[:1]), "a list of objectives"),
        (lambda: A.group_dro(sum(erm)), "a list of objectives"),
        (lambda: A.group_dro(erm, rate=-1), "rate must be"),
        (lambda: mldg(domains=NAMES, test_domains=2), "test_domains must be"),
        (lambda: mldg(domains=NAMES, beta=-1), "finite beta"),
        (lambda: mldg(domains=NAMES, steps=0), "steps >= 1"),
        (lambda: A.mldg(jt.mean_teacher(model), domains=NAMES, inner=optax.sgd(0.1)), "moves once per update"),
        (lambda: A.dense_average(model, start=0), "start=0"),
        (lambda: A.dense_average(model, start=5, end=4), "end=4"),
        (lambda: A.swad_interval([]), "at least one"),
        (lambda: A.swad_interval([1.0, float("nan")]), "finite"),
        (lambda: A.swad_interval([1.0], ratio=0), "positive ratio"),
        (lambda: jt.schedules.switch(0.0, 1.0, at=0.5), "whole number"),
    ):
        with pytest.raises(jt.InputError, match=message):
            make()
    wrong = {**batch, "target": {**batch["target"], "label": batch["target"]["label"] + 7}}
    bare = {"source": batch["source"], "target": batch["target"]["image"]}
    for term, given, message in (
        (A.irm(model, domains=("source", "sketch")), batch, "sketch"),
        (A.irm(model, domains=NAMES), wrong, "labels must be in"),
        (A.irm(model, domains=NAMES, output="scores"), batch, "scores"),
        (A.fishr(model, domains=NAMES, tap="hidden"), batch, "hidden"),
        (mldg(domains=NAMES), batch, "one number of rows"),
        (mldg(domains=NAMES), bare, "batch of its own"),
    ):
        with pytest.raises(jt.InputError, match=message):
            jt.init(term, optax.sgd(0.1), KEY, given)


def test_names_keep_terms_apart(rng):
    model, batch = linear(), batch_of(rng)
    erm = [jt.classification(model).on(name) for name in NAMES]
    with pytest.raises(jt.InputError, match="keep"):
        (A.group_dro(erm) + A.group_dro(erm)).init(KEY, batch)
    term = A.group_dro(erm, name="dro")
    _, _, state, metrics = run(term, batch)
    assert "dro" in state
    assert {"dro", "dro/source/classification"} <= set(metrics)
    assert dataclasses.replace(term).learns is not None
