"""Adversarial methods: the same on any devices, and against losses and slopes that are written out in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from tests import gradients
from tests.adaptation.two_domains import (
    B,
    C,
    F,
    M,
    domain_loss,
    mean,
    net,
    on_both,
    seen,
    slope,
    softmax,
    two_domains,
    within,
)
from tests.contract import KEY, assert_same_on_any_devices, batches, normalised

A = jt.adaptation


def beside(term):
    """The source's labels, and a term; one run of the model."""
    return lambda model: jt.together(jt.classification(model).on("source") + term(model))


def small(name="d"):
    return A.discriminator(hidden=(6,), name=name)


def adapted(model):
    return A.adda(model, model.twin("adapted", own="body"), optax.sgd(0.05, momentum=0.9), discriminator=small())


def open_set(model):
    """With one class more than there are labels."""

    def apply(variables, inputs, **how):
        outputs, state = model.apply(variables, inputs, **how)
        return {**outputs, "logits": jnp.concatenate([outputs["logits"], outputs["features"][:, :1]], 1)}, state

    wide = dataclasses.replace(model, apply=apply)
    return jt.classification(wide).on("source") + A.osbp(wide, coefficient=0.5, threshold=0.3)


OBJECTIVES = {
    "dann": beside(lambda model: A.dann(model, discriminator=small(), coefficient=0.7)),
    "cdan": beside(lambda model: A.cdan(model, discriminator=small(), coefficient=lambda step: 0.3 + 0.1 * step)),
    "cdan, random map": beside(lambda model: A.cdan(model, discriminator=small(), exact_up_to=0, random_dim=5)),
    "mcd": lambda model: A.mcd(model, optax.sgd(0.05, momentum=0.9), repeat=2),
    "mdd": beside(lambda model: A.mdd(model, margin=2.0, coefficient=0.3)),
    "bsp": beside(lambda model: A.bsp(model, k=2, strength=0.01)),
    "adda": adapted,
    "wdgrl": lambda model: A.wdgrl(model, optax.sgd(0.05), critic_optimizer=optax.sgd(0.1), repeat=2, penalty=2.0),
    "pada": lambda model: jt.together(A.pada(model, discriminator=small(), coefficient=0.5, decay=0.5)),
    "osbp": open_set,
}
FAST = {"dann"}
NOT_REVERSED = {"bsp", "mcd"}  # and what is not differentiated is none of the parameters either


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in OBJECTIVES])
def test_the_same_on_any_devices(name, mesh_of):
    assert_same_on_any_devices(OBJECTIVES[name], mesh_of)


@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_compiled_gradient_is_right(name):
    """In float64 and float32: against differences where nothing is reversed, else operation by operation."""
    rng, model = np.random.default_rng(1), normalised([])
    batch = {"source": batches(rng, 1, 16)[0], "target": batches(rng, 1, 8)[0]}
    made = OBJECTIVES[name](model)
    params, state = (made[0] if isinstance(made, tuple) else made).init(KEY, batch)
    how = {"differences": True} if name in NOT_REVERSED else {"differences": False, "unfused": True}
    for objective in [turn.objective for turn in made[1].turns] if isinstance(made, tuple) else [made]:
        loss = gradients.loss_of(objective, state, batch, KEY)
        gradients.assert_right(loss, jax.tree.map(np.array, params), **how)


def dann(params, batch, fixed):
    (f, _, m), (g, _, n) = (seen(params, batch, name) for name in ("source", "target"))
    return domain_loss(params["d"], (f, g), (m, n))


def cdan(params, batch, fixed, matrices=None, entropy=True):
    """The probabilities that features are multiplied by, and weighted by, are those of `fixed` parameters."""
    pair, masks, weights = [], [], []
    for name in ("source", "target"):
        f, _, mask = seen(params, batch, name)
        p = softmax(seen(fixed, batch, name)[1])
        if matrices is None:
            pair.append(np.einsum("bc,bf->bcf", p, f).reshape(len(f), -1))
        else:
            dim = matrices["features"].shape[1]
            pair.append((f @ matrices["features"]) * (p @ matrices["classes"]) / np.sqrt(dim))
        masks.append(mask)
        weights.append(1 + np.exp(np.sum(p * np.log(p + 1e-5), axis=1)))
    level = (mean(weights[0], masks[0]) + mean(weights[1], masks[1])) / 2
    return domain_loss(params["d"], pair, masks, [w / level for w in weights] if entropy else (1.0, 1.0))


def mdd(params, batch, fixed, margin):
    (f, z, m), (g, y, n) = (seen(params, batch, name) for name in ("source", "target"))
    near, far = (softmax(scores) for scores in on_both(params["net_mdd"], (f, g), (m, n)))
    near = near[np.arange(B), z.argmax(1)]
    far = far[np.arange(M), y.argmax(1)]
    return margin * mean(-np.log(near), m) - mean(np.log(np.minimum(1 - far + 1e-6, 1)), n)


def bsp(params, batch, fixed, k, strength):
    total = 0.0
    for name in ("source", "target"):
        f, _, mask = seen(params, batch, name)
        total += np.sum(np.sort(np.linalg.eigvalsh(f[mask > 0].T @ f[mask > 0]))[::-1][:k])
    return strength * total


def osbp(params, batch, fixed, threshold):
    _, y, n = seen(params, batch, "target")
    p = softmax(y)[:, -1]
    return mean(-threshold * np.log(p + 1e-6) - (1 - threshold) * np.log(1 - p + 1e-6), n)


TERMS = {
    "dann": (lambda m: A.dann(m, discriminator=small(), coefficient=0.7), dann, 0.7, ["net/"]),
    "cdan": (lambda m: A.cdan(m, discriminator=small(), coefficient=lambda t: 0.2 * t), cdan, 0.6, ["net/body"]),
    "cdan, plain": (
        lambda m: A.cdan(m, discriminator=small(), coefficient=0.6, entropy=False),
        functools.partial(cdan, entropy=False),
        0.6,
        ["net/body"],
    ),
    "mdd": (lambda m: A.mdd(m, margin=1.5, coefficient=0.4), functools.partial(mdd, margin=1.5), 0.4, ["net/body"]),
    "bsp": (lambda m: A.bsp(m, k=2, strength=0.1), functools.partial(bsp, k=2, strength=0.1), -1.0, ["net/body"]),
    "osbp": (
        lambda m: A.osbp(m, coefficient=0.4, threshold=0.3),
        functools.partial(osbp, threshold=0.3),
        0.4,
        ["net/body"],
    ),
}
SLOW = {"cdan, plain", "bsp", "osbp"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in TERMS])
def test_against_what_is_written_out(name, rng):
    """Values, and slopes: of the adversary those of the loss, of the features those times minus the coefficient."""
    make, reference, coefficient, reversed_ = TERMS[name]
    objective = make(net())
    for masked in (False, True):
        batch = two_domains(rng, masked)
        for part in batch.values():
            part["label"] = part["label"] % (C - 1)  # the last class is for the unknown
        with jax.enable_x64(True):
            params, state = objective.init(KEY, batch)
            params = jax.tree.map(lambda p: np.asarray(p, np.float64) + 0.3 * rng.normal(size=p.shape), params)

            @jax.jit
            def run(params, batch, state=state):
                def loss(params):
                    value, _, metrics = objective(params, state, batch, jt.Context(np.int32(3)))
                    return value, metrics[objective.name].value

                return jax.value_and_grad(loss, has_aux=True)(params)

            (value, told), gradient = run(params, batch)
        fixed = params
        assert float(value) == pytest.approx(reference(params, batch, fixed), rel=1e-9)
        assert float(told) == pytest.approx(float(value))
        for names, factor in ((reversed_, -coefficient), (None, 1.0)):
            own = names or [p for p in jt.tree.leaves_by_path(params) if not p.startswith(tuple(reversed_))]
            direction = within(params, rng, *own)
            expected = factor * slope(lambda p, batch=batch: reference(p, batch, fixed), params, direction)  # noqa: B023
            parts = zip(*map(jax.tree.leaves, (gradient, direction)), strict=True)
            got = sum(float(np.sum(np.asarray(g) * d)) for g, d in parts)
            assert got == pytest.approx(expected, rel=1e-5, abs=1e-8), (name, masked, names)


def test_cdan_by_a_random_map_that_the_state_keeps(rng):
    objective = A.cdan(net(), discriminator=small(), coefficient=0.6, exact_up_to=F * C - 1, random_dim=5)
    batch = two_domains(rng)
    with jax.enable_x64(True):
        params, state = objective.init(KEY, batch)
        run = jax.jit(lambda params, state, batch: objective(params, state, batch, jt.Context(np.int32(3)))[:2])
        value, new = run(params, state, batch)
    assert {name: leaf.shape for name, leaf in state["d_map"].items()} == {"features": (F, 5), "classes": (C, 5)}
    for name, leaf in state["d_map"].items():
        np.testing.assert_array_equal(new["d_map"][name], leaf)
    params, matrices = jax.tree.map(np.asarray, (params, state["d_map"]))
    assert float(value) == pytest.approx(cdan(params, batch, params, matrices), rel=1e-5)  # drawn in float32
    assert "d_map" not in A.cdan(net(), discriminator=small(), exact_up_to=F * C).init(KEY, batch)[1]


def test_a_discriminator_in_evaluation_normalises_by_what_it_has_seen(rng):
    model = A.discriminator(hidden=(3,))
    variables = model.init(KEY, np.zeros((4, 2, 1)))
    assert all(np.abs(leaf).max() <= 2**-0.5 for leaf in jax.tree.leaves(variables["params"]["hidden1"]))
    x = np.float32(rng.normal(size=(4, 2, 1)))
    _, state = model.apply(variables, x, train=True, key=None)
    layer = jax.tree.map(np.asarray, variables["params"]["hidden1"])
    hidden = x.reshape(4, 2) @ layer["kernel"] + layer["bias"]
    mean, var = 0.1 * hidden.mean(0), 0.9 + 0.1 * hidden.var(0)
    features = np.maximum((hidden - mean) / np.sqrt(var + 1e-5), 0)
    outputs, kept = model.apply({**variables, **state}, x, train=False, key=None)
    np.testing.assert_allclose(outputs["features"], features, rtol=1e-5, atol=1e-6)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, kept, state))
    assert A.classifier(3, hidden=(2,)).init(KEY, x).keys() == {"params"}


def test_several_sources_are_several_terms(rng):
    batch = {**two_domains(rng), "b": two_domains(rng)["source"]}
    model = net()
    objective = A.dann(model) + A.dann(model, source="b").named("b")
    params, _ = jax.eval_shape(lambda key: objective.init(key, batch), KEY)
    assert params.keys() == {"net", "net_dann", "net_dann_b"}
    with pytest.raises(jt.InputError, match="two different models are named 'net_dann'"):
        A.dann(model) + A.dann(model)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda m: A.dann(m, source="target"), "source and target are two entries"),
        (lambda m: A.dann(m, coefficient=-1.0), "coefficient must be finite and not negative"),
        (lambda m: A.cdan(m, random_dim=0), "random_dim is 1 or more"),
        (lambda m: A.mdd(m, margin=np.inf), "margin must be finite"),
        (lambda m: A.bsp(m, k=0), "k must be at least 1"),
        (lambda m: A.mcd(m, optax.sgd(0.1), trade_off=-1), "trade_off must be finite"),
        (lambda m: A.adda(m, m.named("other"), optax.sgd(0.1)), "adda adapts a twin of model 'net'"),
        (lambda m: A.adda(m, m.twin("other"), optax.sgd(0.1)), "an encoder of its own"),
        (lambda m: A.wdgrl(m, optax.sgd(0.1), penalty=np.nan), "penalty must be finite"),
        (lambda m: A.pada(m, temperature=0.0), "temperature must be positive"),
        (lambda m: A.osbp(m, threshold=1.0), r"a probability in \(0, 1\)"),
        (lambda m: A.classifier(0), "one class or more"),
        (lambda m: A.discriminator(hidden=(0,)), "one unit or more"),
    ],
)
def test_numbers_that_can_be_none_are_refused(make, told):
    with pytest.raises(jt.InputError, match=told):
        make(net())


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda m: A.dann(m, target="other"), "reads batch\\['other'\\]"),
        (lambda m: A.dann(m, tap="pixels"), "no output of model 'net'|pixels"),
        (lambda m: A.dann(m, discriminator=A.classifier(2)), r"must give logits \[batch, 1\]"),
        (lambda m: A.mdd(m, classifier=A.classifier(C + 1)), "build it with as many classes"),
        (lambda m: A.bsp(m, k=M + 1), "k=5 singular values"),
        (lambda m: A.osbp(m), "the model's last class is for the unknown"),
        (lambda m: A.osbp(m, head="fc"), "fc"),
    ],
)
def test_what_does_not_fit_is_refused_at_init(make, told, rng):
    batch = two_domains(rng)
    batch["source"]["label"][0] = C - 1
    batch = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, batch)
    with pytest.raises(jt.InputError, match=told):
        jt.init(make(net()), optax.sgd(0.1), KEY, batch)
