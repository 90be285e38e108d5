"""One contract over all objectives: jits, traces once, finite, the loss falls, the same under jit and pmap.

The gradient of the compiled step is held against float64, there against differences or, where part of the loss is not
differentiated (targets from a moving average, another branch, a memory), against the one computed eagerly, or, where
that would take a hundred programs, operation by operation in one.

A new objective is one row of OBJECTIVES: from a model with batch norm, its weights and a generator to an objective.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.objective import fresh
from tests import gradients
from tests.contract import batches, normalised

pytestmark = pytest.mark.optimised
KEY = jax.random.key(3)


def noisy(rng, tree):
    return jax.tree.map(lambda w: w + 0.3 * rng.normal(size=w.shape).astype(np.float32), tree)


def positive(rng, tree):
    return jax.tree.map(lambda w: 0.1 + rng.random(w.shape).astype(np.float32), tree)


def critic():
    """A small model of a term's own: a learned score of features, which counts the rows that it has seen."""

    def init(key, x):
        return {"params": {"w": 0.1 * jax.random.normal(key, x.shape[1:])}, "seen": {"rows": jnp.zeros(())}}

    def apply(variables, x, *, train, key, axis=None):
        rows = variables["seen"]["rows"] + jnp.asarray(len(x) * (1 if axis is None else jax.lax.axis_size(axis)))
        return {"score": x @ variables["params"]["w"]}, {"seen": {"rows": rows}}

    return jt.Model(init, apply, "critic")


def own_term(model, own):
    """Features are scored by a model of the term's own against a draw that all devices share."""
    forward = jt.Forward.of(model)

    def setup(key, batch):
        params, state = fresh(own, key, jt.shapes_of(forward, batch)["features"])
        return {own.name: params}, {own.name: state}

    def loss(outputs, params, state, batch, ctx):
        features = outputs[forward]["features"]
        scores, state = ctx.run(own, params, state, features)
        drawn = jax.random.normal(ctx.shared_key("direction"), features.shape[1:], jnp.float32)
        direction = drawn.astype(features.dtype)  # the same numbers in double precision
        value = ctx.mean(jnp.square(scores["score"] - 0.1 * features @ direction))
        return value.value, state, {"own": value}

    return jt.Objective("own", (forward,), loss, setup=setup, models=(own,))


def teacher(model):
    return jt.frozen(model.named("teacher"), model.init(jax.random.key(9), np.zeros((2, 4, 4, 1), np.float32)))


def with_delta(model):
    """A frozen base, a low-rank delta that begins away from zero, and a new head."""
    part = jt.deltas.chain(
        low=jt.deltas.lora(2, start=jt.deltas.pissa).on("body/kernel"), head=jt.deltas.full().on("head")
    )
    base = model.init(jax.random.key(9), np.zeros((2, 4, 4, 1), np.float32))
    return jt.deltas.delta(model, base, part, adapt_statistics=True)


OBJECTIVES = {
    "classification": lambda model, w, rng: jt.classification(model),
    "delta of a frozen base": lambda model, w, rng: jt.classification(with_delta(model)),
    "label smoothing": lambda model, w, rng: jt.classification(model, label_smoothing=0.1),
    "weighted": lambda model, w, rng: jt.classification(model, weight=[1, 2, 3, 0.5], label_smoothing=0.1),
    "multilabel": lambda model, w, rng: jt.multilabel_classification(model, label="labels", pos_weight=[1, 2, 0.5, 3]),
    "a model and a draw of its own": lambda model, w, rng: jt.classification(model) + 0.1 * own_term(model, critic()),
    "l2": lambda model, w, rng: jt.classification(model) + 0.1 * jt.l2(),
    "l2 only": lambda model, w, rng: jt.classification(model) + jt.l2(strength=0.1, only="head"),
    "l2_sp": lambda model, w, rng: jt.classification(model) + 0.1 * jt.l2_sp(noisy(rng, w), exclude="head"),
    "fisher_l2_sp": lambda model, w, rng: (
        jt.classification(model) + jt.fisher_l2_sp(noisy(rng, w), positive(rng, w), strength=0.1)
    ),
    "bss": lambda model, w, rng: jt.classification(model) + jt.bss(model, k=2, strength=0.02),
    "delta": lambda model, w, rng: (
        jt.classification(model)
        + jt.delta(model, teacher(model), taps="features", strength=0.1, weights={"features": rng.random(8)})
    ),
    "co-tuning": lambda model, w, rng: (
        jt.classification(model) + jt.co_tuning(model, 0.1 + 0.6 * np.eye(4), output="logits", strength=0.5)
    ),
    "bi-tuning": lambda model, w, rng: (
        jt.classification(model)
        + jt.bi_tuning(model, queue=3, temperature=0.5, decay=0.9, strength=0.3, head="head", tap="features")
    ),
    "scheduled": lambda model, w, rng: (
        jt.classification(model) + optax.cosine_decay_schedule(0.1, 10) * jt.l2_sp(noisy(rng, w))
    ),
    "frozen model": lambda model, w, rng: (
        jt.classification(model)
        + jt.classification(
            jt.frozen(model.named("teacher"), model.init(KEY, np.zeros((2, 4, 4, 1), np.float32)))
        ).named("teacher")
    ),
    "inference": lambda model, w, rng: jt.classification(model.inference()),
    "distillation": lambda model, w, rng: jt.classification(model) + jt.distillation(model, teacher(model)),
    "distillation of a whole batch": lambda model, w, rng: (
        jt.classification(model)
        + jt.distillation(model, teacher(model), loss=jt.losses.rkd_distance, taps="features")
        + jt.distillation(model, teacher(model), loss=jt.losses.dist).named("dist")
    ),
    "distillation through adapters": lambda model, w, rng: jt.distillation(
        model,
        [teacher(model)] * 2,
        loss=jt.losses.hint,
        taps={"logits": "features"},
        learn_weights=True,
        adapter=jt.models.adapters.regressor(),
    ),
    "crd": lambda model, w, rng: jt.crd(model, teacher(model), examples=16, dim=4, negatives=8),
    "mean teacher": lambda model, w, rng: jt.classification(model) + jt.mean_teacher(model, decay=0.5),
    "info_nce": lambda model, w, rng: jt.info_nce(model, tap="features", learn_temperature=True),
    "two towers": lambda model, w, rng: jt.info_nce(model, model.named("psi"), tap="logits", temperature=0.2),
    "siglip": lambda model, w, rng: jt.siglip(model, model.named("psi"), tap="features"),
    "simclr": lambda model, w, rng: jt.simclr(model, tap="features"),
    "decoupled": lambda model, w, rng: jt.decoupled(model, tap="features", sigma=0.5),
    "supcon": lambda model, w, rng: jt.supcon(model, tap="features"),
    "barlow twins": lambda model, w, rng: jt.barlow_twins(model, tap="features"),
    "vicreg": lambda model, w, rng: jt.vicreg(model, tap="features"),
    "byol": lambda model, w, rng: jt.byol(model, prediction="features", projection="features", decay=0.9),
    "simsiam": lambda model, w, rng: jt.simsiam(model, prediction="features", projection="features"),
    "online probe": lambda model, w, rng: (
        jt.vicreg(model, tap="features") + jt.online_probe(model, 4, beside=jt.vicreg(model, tap="features"))
    ),
    "moco": lambda model, w, rng: jt.moco(model, tap="features", queue=40, decay=0.9),
    "moco v3": lambda model, w, rng: jt.moco_v3(model, prediction="features", projection="features", decay=0.9),
    "nnclr": lambda model, w, rng: jt.nnclr(model, prediction="features", projection="features", queue=40),
    "swav": lambda model, w, rng: jt.swav(model, tap="features", prototypes=5),
    "dino": lambda model, w, rng: jt.dino(model, tap="logits", decay=0.9),
    "mutual learning": lambda model, w, rng: jt.mutual_learning([model, model.named("peer")]),
    "co-teaching": lambda model, w, rng: jt.co_teaching([model, model.named("peer")], forget_rate=0.3, ramp=2),
}


ALIKE = {"label smoothing", "l2 only", "scheduled", "siglip", "simclr", "decoupled", "supcon", "barlow twins"}
ALIKE |= {"weighted", "simsiam", "nnclr", "swav", "crd", "online probe", "mean teacher", "mutual learning"}
ALIKE |= {"co-teaching", "delta", "co-tuning", "bi-tuning", "multilabel", "info_nce", "moco v3"}
ALIKE |= {"two towers", "vicreg", "l2", "frozen model", "inference", "distillation of a whole batch"}
ALIKE |= {"a model and a draw of its own"}

STOPPED = ("crd", "decoupled", "mean teacher", "simsiam", "online probe", "nnclr", "swav", "mutual learning")
STOPPED = dict.fromkeys(STOPPED, "eager") | dict.fromkeys(("byol", "moco", "moco v3", "dino", "bi-tuning"), "unfused")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in ALIKE else ()) for n in OBJECTIVES])
def test_contract(name, mesh_of):
    rng = np.random.default_rng(1)
    data, traces = batches(rng, 3), []
    model = normalised(traces)
    weights, _ = jt.classification(model).init(KEY, data[0])
    objective, optimizer = OBJECTIVES[name](model, weights, rng), optax.sgd(0.05, momentum=0.9)

    state = jt.init(objective, optimizer, KEY, data[0])
    step = jt.train_step(objective, optimizer)
    traces.clear()
    start, key = jax.tree.map(np.array, (state.params, state.state)), jax.random.clone(KEY)
    state, first = step(state, data[0])
    once, seen = len(traces), [float(first["loss"])]
    assert once >= 1
    loss = gradients.loss_of(objective, start[1], data[0], key)
    single = jax.tree.map(np.array, state.opt_state[0].trace)
    how = {"differences": True} if name not in STOPPED else {"differences": False, STOPPED[name]: True}
    gradients.assert_right(loss, start[0], "body", single=single, **how)
    traces.clear()
    metrics = first
    for batch in data[1:]:
        state, metrics = step(state, batch)
        seen.append(float(metrics["loss"]))
        assert all(np.isfinite(float(value)) and np.shape(value) == () for value in metrics.values())
    assert not traces, "it was traced again for a batch of the same shape"
    three = jax.tree.map(np.array, state.params)
    assert set(metrics) >= {"loss"}
    for number in range(30):
        state, metrics = step(state, data[number % 3])
    assert float(metrics["loss"]) < np.mean(seen)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.params))

    state = jt.init(objective, optimizer, KEY, data[0])
    spread, traced = jt.train_step(objective, optimizer, mesh=mesh_of(4), mode="pmap"), len(traces)
    for batch, loss in zip(data, seen, strict=True):
        state, metrics = spread(state, batch)
        assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-5)
    assert len(traces) == traced + once, "pmap traced again"
    for path, leaf in jt.tree.leaves_by_path(three).items():
        got = np.asarray(jt.tree.leaves_by_path(state.params)[path])
        np.testing.assert_allclose(got, leaf, rtol=1e-5, atol=1e-5 * max(np.abs(leaf).max(), 0.1), err_msg=path)


def on_two_domains(model, w, rng):
    """Two terms of one model, and one with a model of its own that draws once for all devices."""
    source, target = (jt.classification(model).on(name) for name in ("source", "target"))
    return source + 0.5 * target + 0.1 * own_term(model, critic()).on("target")


def along_a_draw(model):
    """How long features are along a direction that all devices share, another one in each step."""
    forward = jt.Forward.of(model)

    def loss(outputs, params, state, batch, ctx):
        features = outputs[forward]["features"]
        direction = jax.random.normal(ctx.shared_key("direction"), features.shape[1:])
        value = ctx.mean(jnp.square(features @ direction))
        return value.value, state, {"drawn": value}

    return jt.Objective("drawn", (forward,), loss)


def beside_target(name):
    """A row of the contract on source, and the same model on target."""

    def make(model, w, rng):
        row = OBJECTIVES[name](model, w, rng)
        (same,) = (one for one in row.models if one.name == "model")  # it may run in inference mode
        beside = jt.classification(same).named("beside") + 0.1 * along_a_draw(same)
        return jt.together(row.on("source") + 0.5 * beside.on("target"))

    return make


DOMAINS = {
    "together": lambda *given: jt.together(on_two_domains(*given)),
    "pcgrad": lambda *given: jt.balance(jt.together(on_two_domains(*given)), jt.multitask.pcgrad, shared="body"),
    "mgda": lambda *given: jt.balance(on_two_domains(*given), jt.multitask.mgda, shared="body"),
    **{f"{name} beside target": beside_target(name) for name in OBJECTIVES},
}
FAST = {"together"}  # rules of balance have tests of their own on devices


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in DOMAINS])
def test_unequal_domains_are_the_same_on_any_devices(name, mesh_of):
    """Batches of 16 and 8 rows: one device, a mesh of 4 and pmap of 4 end alike, in parameters and in state."""
    rng, traces = np.random.default_rng(2), []
    halves = zip(batches(rng, 2), batches(rng, 2, rows=8), strict=True)
    data, model = [{"source": source, "target": target} for source, target in halves], normalised(traces)
    weights, _ = jt.classification(model).init(KEY, data[0]["source"])
    objective, optimizer = DOMAINS[name](model, weights, rng), optax.sgd(0.05, momentum=0.9)
    ended = []
    for place in ({}, {"mesh": mesh_of(4)}, {"mesh": mesh_of(4), "mode": "pmap"}):
        state, step = jt.init(objective, optimizer, KEY, data[0]), jt.train_step(objective, optimizer, **place)
        for batch in data:
            state, metrics = step(state, batch)
            assert np.isfinite(float(metrics["loss"]))
        ended.append(jax.tree.map(np.array, (state.params, state.state)))
    assert jt.tree.leaves_by_path(ended[0])
    for other in ended[1:]:
        found = jt.tree.leaves_by_path(other)
        for path, leaf in jt.tree.leaves_by_path(ended[0]).items():
            atol = 1e-5 * max(np.abs(leaf).max(initial=0), 0.1)
            np.testing.assert_allclose(found[path], leaf, rtol=1e-5, atol=atol, err_msg=path)
