"""Bi-Tuning over several updates against lists of keys in NumPy: the queues, the slow network, masks, devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt

KEY = jax.random.key(4)
CLASSES = 3
K = 3


def network(name="net"):
    """A linear encoder with its classifier and its projection."""

    def init(key, x):
        one, two, three = jax.random.split(key, 3)
        head = {"kernel": jax.random.normal(two, (4, CLASSES)), "bias": jnp.arange(CLASSES) / 2}
        return {
            "params": {
                "body": {"kernel": jax.random.normal(one, (5, 4))},
                "head": head,
                "projector": {"kernel": jax.random.normal(three, (4, 2))},
            }
        }

    def apply(variables, x, *, train, key):
        params = variables["params"]
        features = x @ params["body"]["kernel"]
        logits = features @ params["head"]["kernel"] + params["head"]["bias"][None]
        return {"features": features, "logits": logits, "projection": features @ params["projector"]["kernel"]}, {}

    return jt.Model(init, apply, name=name, stages=("body", "projector|head"))


def a_batch(number, masked=True):
    """Eight rows: class 2 comes late, of class 0 the second has more than a queue holds."""
    rng = np.random.default_rng(number)
    label = np.array([[0, 1, 0, 1, 1, 0, 1, 0], [0, 0, 0, 1, 0, 0, 2, 0], [2, 0, 1, 2, 2, 1, 0, 2]])[number % 3]
    x = rng.normal(size=(2, 8, 5)).astype(np.float32)
    batch = {"image": x[0], "image2": x[1], "label": label.astype(np.int32)}
    if masked:
        batch["mask"] = np.array([1, 1, 0, 1, 1, 1, 1, 0.5], np.float32)
        batch["image"][2] = batch["image2"][2] = 50
    return batch


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def outputs(params, x):
    """The lengths-1 projection and feature with a 1, in double precision."""
    features = x.astype(np.float64) @ params["body"]["kernel"]
    return unit(features @ params["projector"]["kernel"]), unit(np.append(features, np.ones((len(x), 1)), axis=1))


class Reference:
    """The released method with lists as queues, that begin empty and that a batch enters after both losses."""

    def __init__(self, temperature, decay):
        self.temperature, self.decay, self.slow = temperature, decay, None
        self.queues = [[] for _ in range(CLASSES)]

    def step(self, params, batch):
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        d = self.decay
        slow = params if self.slow is None else jax.tree.map(lambda a, b: d * a + (1 - d) * b, self.slow, params)
        self.slow = slow
        (z, h), (z_slow, h_slow) = outputs(params, batch["image"]), outputs(slow, batch["image2"])
        w = unit(np.append(params["head"]["kernel"], params["head"]["bias"][None], axis=0).T)
        mask, rows = batch.get("mask", np.ones(8)), []
        for i, label in enumerate(batch["label"]):
            if mask[i]:
                keys = [(y == label, *one) for y, queue in enumerate(self.queues) for one in queue]
                ccl = self.contrast(
                    [z[i] @ z_slow[i], *(z[i] @ zk for _, zk, _ in keys)], [True, *(k[0] for k in keys)]
                )
                cce = self.contrast(
                    [w[label] @ h[i], *(w[label] @ hk for _, _, hk in keys)], [True, *(k[0] for k in keys)]
                )
                rows.append((mask[i], cce, ccl))
        for i, label in enumerate(batch["label"]):
            if mask[i]:
                self.queues[label] = [*self.queues[label], (z_slow[i], h_slow[i])][-K:]
        weights, cce, ccl = np.array(rows).T
        return weights @ cce / weights.sum(), weights @ ccl / weights.sum()

    def contrast(self, scores, right):
        scores = np.array(scores) / self.temperature
        return np.mean(np.log(np.exp(scores).sum()) - scores[np.array(right)])


def objective_of(model, **options):
    return jt.bi_tuning(model, **{"queue": K, "decay": 0.7, "temperature": 0.2, "head": "head", **options})


@pytest.mark.slow
def test_updates_are_the_released_ones_on_any_devices():
    """One device, a mesh of 4 and pmap of 4; the queues hold what the lists hold."""
    model, optimizer = network(), optax.sgd(0.05)
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    objective = jt.classification(model) + objective_of(model, strength=0.6)
    places: list[dict[str, Any]] = [{}, {"mesh": mesh}, {"mesh": mesh, "mode": "pmap"}]
    for place in places:
        state, reference = jt.init(objective, optimizer, KEY, a_batch(0)), Reference(0.2, 0.7)
        step = jt.train_step(objective, optimizer, **place)
        for number in range(5):
            batch = a_batch(number, masked=True)
            cce, ccl = reference.step(jax.tree.map(np.array, state.params["net"]), batch)
            state, metrics = step(state, batch)
            assert float(metrics["cce"]) == pytest.approx(cce, rel=1e-4, abs=1e-6)
            assert float(metrics["ccl"]) == pytest.approx(ccl, rel=1e-4, abs=1e-6)
            assert float(metrics["bi_tuning"]) == pytest.approx(0.6 * (cce + ccl), rel=1e-4, abs=1e-6)
        queue = jax.tree.map(np.asarray, state.state["net_class_queue"])
        for label, kept in enumerate(reference.queues):
            own = slice(label * K, (label + 1) * K)
            assert queue["label"][own].tolist() == [label] * K
            for kind, keys in zip("zh", zip(*kept, strict=True), strict=True):
                found = np.roll(queue[kind][own], -queue["place"][label], axis=0)  # the oldest first
                np.testing.assert_allclose(found, keys, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_what_learns():
    """Encoder and projection do; the classifier's weights don't, and no key does."""
    model, batch = network(), a_batch(1)
    objective = objective_of(model)
    params, state = objective.init(KEY, batch)
    _, state, _ = objective(params, state, batch, jt.Context(0, KEY))

    def loss(params, state):
        return objective(params, state, batch, jt.Context(0, KEY))[0]

    by_params, by_state = jax.grad(loss, argnums=(0, 1), allow_int=True)(params, state)
    slopes = jt.tree.leaves_by_path(by_params["net"])
    assert all(np.all(np.isfinite(leaf)) for leaf in slopes.values())
    assert {path for path, leaf in slopes.items() if np.any(leaf)} == {"body/kernel", "projector/kernel"}
    assert not np.any(by_state["net_ema"]["params"]["body"]["kernel"])
    _, same, _ = objective(params, state, batch, jt.Context(0, None, train=False))
    assert all(map(np.array_equal, jax.tree.leaves(same), jax.tree.leaves(state)))  # evaluation enqueues nothing


@pytest.mark.slow
def test_the_queue_moves_once_per_update():
    model, optimizer = network(), optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    objective = objective_of(model)
    state, step = jt.init(objective, optimizer, KEY, a_batch(0)), jt.train_step(objective, optimizer)
    state, _ = step(state, a_batch(0))
    assert np.all(np.asarray(state.state["net_class_queue"]["label"]) == -1)
    state, _ = step(state, a_batch(2))
    assert np.asarray(state.state["net_class_queue"]["place"]).tolist() == [
        2,
        1,
        1,
    ]  # of the last batch alone: 2, 1 and 4


@pytest.mark.slow
def test_labels_of_no_class_give_nan():
    model, batch = network(), a_batch(1, masked=False)
    objective = objective_of(model)
    params, state = objective.init(KEY, batch)
    for wrong in (-1, CLASSES):
        batch["label"] = np.where(np.arange(8) == 3, wrong, batch["label"]).astype(np.int32)
        assert np.isnan(objective(params, state, batch, jt.Context(0, KEY))[0])


def test_refusals():
    model, batch = network(), a_batch(0, masked=False)
    cases = [
        ({"queue": 0}, "queue must be at least 1"),
        ({"temperature": 0.0}, "temperature"),
        ({"strength": -1.0}, "strength"),
        ({"decay": 1.5}, "decay"),
        ({"views": ("image",)}, "two views"),
    ]
    for options, message in cases:
        with pytest.raises(jt.InputError, match=message):
            objective_of(model, **options)
    one_hot = np.eye(CLASSES, dtype=np.float32)[batch["label"]]
    at_init = [
        ({"head": "haed"}, {}, r"unknown head of model 'net' 'haed' \(did you mean 'head'"),
        ({"head": "projector"}, {"label": batch["label"] + 1}, r"labels must be in \[0, 2\)"),
        ({"features": "projection"}, {}, "reads 4 dimensions, and output 'projection' has 2"),
        ({"tap": "prediction"}, {}, "prediction"),
        ({}, {"label": batch["label"] + 2}, r"labels must be in \[0, 3\)"),
        ({}, {"label": one_hot}, r"must be integers \[batch\]"),
    ]
    for options, changed, message in at_init:
        with pytest.raises(jt.InputError, match=message):
            jt.init(objective_of(model, **options), optax.sgd(0.1), KEY, {**batch, **changed})
