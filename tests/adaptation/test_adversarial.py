"""Adversarial methods: the same on any devices, and against losses and slopes that are written out in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from tests.contract import KEY, assert_same_on_any_devices

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
    "cdan": beside(lambda model: A.cdan(model, discriminator=small(), coefficient=lambda step: 0.1 * step)),
    "cdan, random map": beside(lambda model: A.cdan(model, discriminator=small(), exact_up_to=0, random_dim=5)),
    "mcd": lambda model: A.mcd(model, optax.sgd(0.05, momentum=0.9), repeat=2),
    "mdd": beside(lambda model: A.mdd(model, margin=2.0, coefficient=0.3)),
    "bsp": beside(lambda model: A.bsp(model, k=2, strength=0.01)),
    "adda": adapted,
    "wdgrl": lambda model: A.wdgrl(model, optax.sgd(0.05), critic_optimizer=optax.sgd(0.1), repeat=2, penalty=2.0),
    "pada": lambda model: jt.together(A.pada(model, discriminator=small(), coefficient=0.5, decay=0.5)),
    "osbp": open_set,
}
FAST = {"dann", "mcd"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in OBJECTIVES])
def test_the_same_on_any_devices(name, mesh_of):
    assert_same_on_any_devices(OBJECTIVES[name], mesh_of)


# A network without batch norm, features tanh(x W) and logits f V + b, and the same in NumPy.

B, M, D, F, C = 5, 4, 3, 4, 3
MASKS = {"source": np.float32([1, 1, 0, 1, 1]), "target": np.float32([1, 1, 1, 0])}


def net():
    def init(key, x):
        keys = jax.random.split(key)
        body, head = jax.random.normal(keys[0], (D, F)), jax.random.normal(keys[1], (F, C))
        return {"params": {"body": body, "head": {"kernel": head, "bias": jnp.zeros(C)}}}

    def apply(variables, x, *, train, key):
        params = variables["params"]
        features = jnp.tanh(x @ params["body"])
        return {"features": features, "logits": features @ params["head"]["kernel"] + params["head"]["bias"][None]}, {}

    return jt.Model(init, apply, "net", ("body", "head"))


def two_domains(rng, masked=False):
    def part(rows, name, shift):
        found = {"image": rng.normal(size=(rows, D)) + shift, "label": rng.integers(0, C, rows)}
        if masked:
            found["image"][MASKS[name] == 0] = 1e3
            found["mask"] = MASKS[name]
        return found

    return {"source": part(B, "source", 0.0), "target": part(M, "target", 0.5)}


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def seen(params, batch, name):
    """Features, logits and weights of a domain's rows."""
    features = np.tanh(batch[name]["image"] @ params["net"]["body"])
    weights = batch[name].get("mask", np.ones(len(features)))
    return features, features @ params["net"]["head"]["kernel"] + params["net"]["head"]["bias"], weights


def mean(values, weights):
    return np.sum(np.where(weights > 0, values, 0)) / np.sum(weights)


def perceptron(params, x):
    """Batch norm over the rows, as they are given."""
    for number in range(1, 10):
        if f"hidden{number}" not in params:
            break
        x = x @ params[f"hidden{number}"]["kernel"] + params[f"hidden{number}"]["bias"]
        if f"norm{number}" in params:
            x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
            x = x * params[f"norm{number}"]["scale"] + params[f"norm{number}"]["bias"]
        x = np.maximum(x, 0)
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def on_both(params, pair, masks):
    """Rows that a mask leaves out are zeros for an adversary."""
    rows = np.concatenate([np.where(mask[:, None] > 0, x, 0) for x, mask in zip(pair, masks, strict=True)])
    scores = perceptron(params, rows)
    return scores[: len(pair[0])], scores[len(pair[0]) :]


def domain_loss(params, pair, masks, weights=(1.0, 1.0)):
    source, target = (scores[:, 0] for scores in on_both(params, pair, masks))
    near = mean(weights[0] * np.log1p(np.exp(-source)), masks[0])
    return 0.5 * near + 0.5 * mean(weights[1] * np.log1p(np.exp(target)), masks[1])


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


def slope(function, params, direction, h=1e-6):
    ahead, behind = (jax.tree.map(lambda p, d, step=step: p + step * d, params, direction) for step in (h, -h))
    return (function(ahead) - function(behind)) / (2 * h)


def within(tree, rng, *names):
    """A random direction in some of the parameters, by path."""
    flat = jt.tree.leaves_by_path(tree)
    drawn = [rng.normal(size=leaf.shape) * any(path.startswith(name) for name in names) for path, leaf in flat.items()]
    return jax.tree.unflatten(jax.tree.structure(tree), drawn)


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
SLOW = {"cdan, plain"}


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
