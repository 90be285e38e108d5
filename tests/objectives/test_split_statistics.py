"""MoCo with statistics of parts of the batch: queries in order, keys across it, as where keys are shuffled."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt

KEY = jax.random.key(4)
B, D, Z, QUEUE = 16, 5, 3, 16


def network(name="net"):
    """A linear projection with batch norm and running statistics."""

    def init(key, x):
        return {
            "params": {"w": jax.random.normal(key, (D, Z))},
            "stats": {"mean": jnp.zeros(Z), "count": jnp.arange(2)},
        }

    def apply(variables, x, *, train, key, axis=None):
        y, mean = x @ variables["params"]["w"], variables["stats"]["mean"]
        square = jnp.ones(Z)
        if train:
            mean, square = y.mean(0), (y**2).mean(0)
            if axis is not None:
                mean, square = jax.lax.pmean((mean, square), axis)
        z = (y - mean[None]) / jnp.sqrt(square - mean**2 + 1e-3)[None] if train else y - mean[None]
        running = 0.9 * variables["stats"]["mean"] + 0.1 * mean if train else mean
        return {"projection": z}, {"stats": {"mean": running, "count": variables["stats"]["count"]}}

    return jt.Model(init, apply, name)


def a_batch(seed=0):
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(B, D)).astype(np.float32)
    return {"image": image, "image2": (image + rng.normal(size=image.shape)).astype(np.float32)}


def normalised(x, w, groups):
    """The outputs of each group of rows with its own statistics, at length 1, and the mean of their means."""
    y, z, means = np.float64(x) @ np.float64(w), np.zeros((B, Z)), []
    for rows in groups:
        means.append(y[rows].mean(0))
        z[rows] = (y[rows] - means[-1]) / np.sqrt(y[rows].var(0) + 1e-3)
    return z / np.linalg.norm(z, axis=1, keepdims=True), np.mean(means, 0)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_each_part_has_statistics_of_its_own(parts):
    objective, batch = jt.moco(network(), queue=QUEUE, temperature=0.3, split_statistics=parts), a_batch()
    params, state = objective.init(KEY, batch)
    loss, after, _ = objective(params, state, batch, jt.Context(key=KEY))
    w, old = params["net"]["w"], np.float64(state["net_queue"]["keys"])
    size = B // parts
    q, of_queries = normalised(batch["image"], w, [range(size * n, size * (n + 1)) for n in range(parts)])
    k, of_keys = normalised(batch["image2"], w, [range(n, B, parts) for n in range(parts)])
    own = np.sum(q * k, 1) / 0.3
    expected = np.mean(np.log(np.exp(own) + np.exp(q @ old.T / 0.3).sum(1)) - own)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(after["net_queue"]["keys"][:B], k, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after["net"]["stats"]["mean"], 0.1 * of_queries, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(after["net_ema"]["stats"]["mean"], 0.1 * of_keys, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(after["net"]["stats"]["count"], [0, 1])
    still = objective(params, after, batch, jt.Context(train=False))[0]  # inference has one set of running statistics
    alone = jt.moco(network(), queue=QUEUE, temperature=0.3)(params, after, batch, jt.Context(train=False))[0]
    assert float(still) == float(alone)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_it_is_the_same_on_one_device_on_several_and_under_pmap(parts):
    objective, seen = jt.moco(network(), queue=QUEUE, decay=0.5, split_statistics=parts), []
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    for how in ({}, {"mesh": mesh}, {"mesh": mesh, "mode": "pmap"}):
        state = jt.init(objective, optax.sgd(0.3), KEY, a_batch())
        step = jt.train_step(objective, optax.sgd(0.3), **how)
        for number in range(3):
            state, metrics = step(state, a_batch(number))
        seen.append({**jt.tree.leaves_by_path(state.params), **jt.tree.leaves_by_path(state.state), **metrics})
    for path, leaf in seen[0].items():
        for other in seen[1:]:
            np.testing.assert_allclose(other[path], leaf, rtol=1e-4, atol=1e-5, err_msg=path)


def test_a_query_and_its_key_share_few_examples():
    """Another example in the batch moves the queries of its neighbours, and the keys N places apart."""
    parts, size = 4, B // 4
    objective = jt.moco(network(), queue=QUEUE, split_statistics=parts)
    params, state = objective.init(KEY, a_batch())

    def outputs(batch):
        found, _ = objective.run(params, state, batch, jt.Context(key=KEY))
        return [np.asarray(found[forward]["projection"]) for forward in objective.forwards]

    batch = a_batch()
    first = outputs(batch)
    changed = {name: value.copy() for name, value in batch.items()}
    for value in changed.values():
        value[0] += 3
    moved = [np.flatnonzero(np.any(np.abs(a - b) > 1e-5, axis=1)) for a, b in zip(first, outputs(changed), strict=True)]
    np.testing.assert_array_equal(moved[0], np.arange(size))
    np.testing.assert_array_equal(moved[1], np.arange(0, B, parts))


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(jt.InputError, match="split_statistics must be at least 1"):
        jt.moco(network(), split_statistics=0)
    with pytest.raises(jt.InputError, match="16 rows don't divide into 3 parts"):
        jt.init(jt.moco(network(), queue=QUEUE, split_statistics=3), optax.sgd(0.1), KEY, a_batch())
    objective = jt.moco(network(), queue=QUEUE, split_statistics=2)
    state = jt.init(objective, optax.sgd(0.1), KEY, a_batch())
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    with pytest.raises(jt.InputError, match="a multiple of the 4 devices"):
        jt.train_step(objective, optax.sgd(0.1), mesh=mesh, mode="pmap")(state, a_batch())


def test_the_model_stays_shared_with_other_terms():
    net = network()
    moco = jt.moco(net, queue=QUEUE, split_statistics=2)
    objective = moco + jt.online_probe(net, 3, beside=moco, tap="projection")
    batch = {**a_batch(), "label": np.arange(B) % 3}
    state = jt.init(objective, optax.sgd(0.1), KEY, batch)
    assert set(state.params) == {"net", "net_probe"}
    assert len(objective.forwards) == 2
