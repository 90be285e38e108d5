"""Adversaries that take turns: what each turn lowers, against NumPy, and whom it moves; what PADA keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.context import named_key
from tests.adaptation.two_domains import (
    B,
    C,
    M,
    domain_loss,
    mean,
    net,
    on_both,
    perceptron,
    seen,
    slope,
    softmax,
    two_domains,
    within,
)
from tests.contract import KEY, batches, normalised

A = jt.adaptation
SGD = optax.sgd(0.1)


def errors(scores, labels, weights):
    return mean(-np.log(softmax(scores)[np.arange(len(labels)), labels]), weights)


def mcd(params, batch, apart, fitting, trade_off=0.7, balance=0.2):
    (f, z, m), (g, y, n) = (seen(params, batch, name) for name in ("source", "target"))
    z2, y2 = on_both(params["net_mcd"], (f, g), (m, n))
    total = apart * trade_off * mean(np.abs(softmax(y) - softmax(y2)).mean(1), n)
    for source, target in ((z, y), (z2, y2)) if fitting else ():
        shares = np.average(softmax(target), axis=0, weights=n)
        total += errors(source, batch["source"]["label"], m) - balance * np.mean(np.log(shares + 1e-6))
    return total


def adda(params, batch, deceive):
    f, _, m = seen(params, batch, "source")
    g, _, n = seen({"net": {**params["net"], **params["twin"]}}, batch, "target")
    if not deceive:
        return domain_loss(params["d"], (f, g), (m, n))
    return mean(np.log1p(np.exp(-on_both(params["d"], (f, g), (m, n))[1][:, 0])), n)


def wdgrl(params, batch, critic, penalty=2.0, trade_off=0.3):
    """The draw is an input; the slopes of the critic are those of one hidden layer with ReLU."""
    (f, z, m), (g, _, n) = (seen(params, batch, name) for name in ("source", "target"))
    own = params["net_wdgrl"]
    distance = mean(perceptron(own, f)[:, 0], m) - mean(perceptron(own, g)[:, 0], n)
    if not critic:
        return errors(z, batch["source"]["label"], m) + trade_off * distance
    draw = np.asarray(jax.random.uniform(named_key(jax.random.key(0), "net_wdgrl"), (B, 1), jnp.float32))
    partner = np.arange(B) % M
    points = np.concatenate([f, g, g[partner] + draw * (f - g[partner])])
    counts = np.concatenate([m, n, m * n[partner]])
    open_ = points @ own["hidden1"]["kernel"] + own["hidden1"]["bias"] > 0
    slopes = (open_ * own["head"]["kernel"][:, 0]) @ own["hidden1"]["kernel"].T
    return penalty * mean((np.linalg.norm(slopes, axis=1) - 1) ** 2, counts) - distance


def made(method):
    model = net()
    if method == "mcd":
        return A.mcd(model, SGD, trade_off=0.7, balance=0.2)
    if method == "adda":
        discriminator = A.discriminator(hidden=(6,), name="d")
        return A.adda(model, model.twin("twin", own="body"), SGD, discriminator=discriminator)
    return A.wdgrl(model, SGD, penalty=2.0, trade_off=0.3)


TURNS = {
    ("mcd", "fit"): lambda p, b: mcd(p, b, 0, True),
    ("mcd", "apart"): lambda p, b: mcd(p, b, -1, True),
    ("mcd", "near"): lambda p, b: mcd(p, b, 1, False),
    ("adda", "tell"): lambda p, b: adda(p, b, False),
    ("adda", "deceive"): lambda p, b: adda(p, b, True),
    ("wdgrl", "critic"): lambda p, b: wdgrl(p, b, True),
    ("wdgrl", "fit"): lambda p, b: wdgrl(p, b, False),
}
MOVED = {  # by path; all that is not listed stays
    ("mcd", "fit"): ["net/", "net_mcd/"],
    ("mcd", "apart"): ["net/head/", "net_mcd/"],
    ("mcd", "near"): ["net/body"],
    ("adda", "tell"): ["d/"],
    ("adda", "deceive"): ["twin/body"],
    ("wdgrl", "critic"): ["net_wdgrl/"],
    ("wdgrl", "fit"): ["net/"],
}
UNMOVED_BY_RIGHT = {"net_wdgrl/head/bias", "d/hidden1/bias"}  # the difference of two means; before batch norm


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mcd", pytest.param("adda", marks=pytest.mark.slow), "wdgrl"])
def test_turns_against_what_is_written_out(method, rng):
    """Values, and slopes of what a turn moves, on domains of unequal size with rows left out."""
    objective, optimizer = made(method)
    batch = two_domains(rng, masked=True)
    turns = {turn.name: turn for turn in optimizer.turns}
    with jax.enable_x64(True):
        params, state = objective.init(KEY, batch)
        params = jax.tree.map(lambda p: np.asarray(p, np.float64) + 0.3 * rng.normal(size=p.shape), params)

        @jax.jit
        def run(params, batch):
            def loss(params, turn):
                return turn.objective(params, state, batch, jt.Context(np.int32(3)))[0]

            return {name: jax.value_and_grad(loss)(params, turn) for name, turn in turns.items()}

        found = run(params, batch)
    for name, (value, gradient) in found.items():
        reference = TURNS[method, name]
        assert float(value) == pytest.approx(reference(params, batch), rel=1e-9), name
        direction = within(params, rng, *MOVED[method, name])
        expected = slope(lambda p: reference(p, batch), params, direction)  # noqa: B023
        gradient, direction = (jt.tree.leaves_by_path(one) for one in (gradient, direction))
        got = sum(float(np.sum(np.asarray(leaf) * direction[path])) for path, leaf in gradient.items())
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-8), name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mcd", "adda", "wdgrl"])
def test_whom_a_turn_moves(method, rng):
    _, optimizer = made(method)
    batch = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, two_domains(rng))
    for turn in optimizer.turns:
        pair = jt.alternate(turn)
        state = jt.init(*pair, KEY, batch)
        before = {path: np.array(leaf) for path, leaf in jt.tree.leaves_by_path(state.params).items()}
        state, _ = jt.train_step(*pair)(state, batch)
        after = jt.tree.leaves_by_path(state.params)
        moved = {path for path, leaf in before.items() if np.any(leaf != np.asarray(after[path]))}
        expected = {p for p in before if p.startswith(tuple(MOVED[method, turn.name]))} - UNMOVED_BY_RIGHT
        assert moved - UNMOVED_BY_RIGHT == expected, turn.name


def test_adda_leaves_the_model_as_it_was_statistics_and_all(rng):
    """The twin begins as a copy; its batch norm moves, that of the model doesn't."""
    data = {name: batches(rng, 1, rows)[0] for name, rows in (("source", 8), ("target", 4))}
    model = normalised([])
    variables = model.init(KEY, data["source"]["image"])
    twin = model.twin("adapted", own="body")
    pair = A.adda(model, twin, SGD, discriminator=A.discriminator(hidden=(4,)))
    params, stats = variables["params"], {"batch_stats": variables["batch_stats"]}
    start = {"params": {"model": params, "adapted": twin.own(params)}, "state": {"model": stats, "adapted": stats}}
    state = jt.init(*pair, KEY, data, **start)
    state, _ = jt.train_step(*pair)(state, data)
    for got, want in ((state.params["model"], params), (state.state["model"], stats)):
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(one, other)
    assert np.any(np.asarray(state.params["adapted"]["body"]["kernel"]) != np.asarray(params["body"]["kernel"]))
    assert np.any(np.asarray(state.state["adapted"]["batch_stats"]["mean"]) != 0)


def pada(params, share, batch, temperature, trade_off):
    (f, z, m), (g, y, n) = (seen(params, batch, name) for name in ("source", "target"))
    weight = share / share.max()
    labels = batch["source"]["label"]
    ours = weight[labels]
    near = -np.log(softmax(z)[np.arange(B), labels])
    error = np.sum(m * ours * near) / np.sum(m * ours)
    adversary = domain_loss(params["d"], (f, g), (m, n), (ours, mean(ours, m)))
    return error, adversary, np.average(softmax(y / temperature), axis=0, weights=n)


@pytest.mark.parametrize("decay", [0.9, pytest.param(1.0, marks=pytest.mark.slow)])
def test_pada(decay, rng):
    discriminator = A.discriminator(hidden=(6,), name="d")
    options = {"coefficient": 0.6, "temperature": 0.5, "decay": decay, "trade_off": 0.8}
    objective, batch = A.pada(net(), discriminator=discriminator, **options), two_domains(rng, masked=True)
    with jax.enable_x64(True):
        params, state = objective.init(KEY, batch)
        np.testing.assert_allclose(state["d_classes"]["share"], np.full(C, 1 / C), rtol=1e-6)
        params = jax.tree.map(lambda p: np.asarray(p, np.float64) + 0.3 * rng.normal(size=p.shape), params)
        state = {**state, "d_classes": {"share": rng.dirichlet(np.ones(C))}}

        @jax.jit
        def run(params, batch):
            def loss(params):
                value, new, metrics = objective(params, state, batch, jt.Context(np.int32(3)))
                return value, (new, {name: metric.value for name, metric in metrics.items()})

            return jax.value_and_grad(loss, has_aux=True)(params)

        (value, (new, metrics)), gradient = run(params, batch)
    share = state["d_classes"]["share"]
    error, adversary, seen_now = pada(params, share, batch, 0.5, 0.8)
    assert float(value) == pytest.approx(error + 0.8 * adversary, rel=1e-6)
    assert float(metrics["pada/classification"]) == pytest.approx(error, rel=1e-6)
    assert float(metrics["pada/classes"]) == pytest.approx(share.sum() / share.max(), rel=1e-6)
    np.testing.assert_allclose(new["d_classes"]["share"], decay * share + (1 - decay) * seen_now, rtol=1e-6)
    for names, factors in ((["net/"], (1.0, -0.8 * 0.6)), (["d/"], (0.0, 0.8))):
        direction = within(params, rng, *names)

        def total(p, factors=factors):
            one, other, _ = pada(p, share, batch, 0.5, 0.8)
            return factors[0] * one + factors[1] * other

        gradients, directions = (jax.tree.leaves(one) for one in (gradient, direction))
        got = sum(float(np.sum(np.asarray(g) * d)) for g, d in zip(gradients, directions, strict=True))
        assert got == pytest.approx(slope(total, params, direction), rel=1e-5, abs=1e-8), names


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pada", "mcd"])
def test_a_run_resumes_to_the_same_bits(method, tmp_path, rng):
    data = [{name: batches(rng, 1, rows)[0] for name, rows in (("source", 8), ("target", 4))} for _ in range(4)]
    model = normalised([])
    objective = jt.together(A.pada(model, discriminator=A.discriminator(hidden=(4,), name="d"), decay=0.5))
    pair = (objective, optax.adam(0.01)) if method == "pada" else A.mcd(model, optax.adam(0.01), repeat=2)

    def run(out, steps):
        return jt.fit(*pair, data, steps=steps, out=out, save_every=1, progress=False)

    run(tmp_path / "cut", 2)
    resumed, whole = run(tmp_path / "cut", 4), run(tmp_path / "whole", 4)
    for got, want in zip(jax.tree.leaves(resumed.state[2:]), jax.tree.leaves(whole.state[2:]), strict=True):
        np.testing.assert_array_equal(got, want)
