"""An example is never told from a copy of itself: in the batch, in the queue of MoCo, as its own neighbour in NNCLR."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt

N, B = 32, 8


def identity(key, x):
    return {"params": {"w": jnp.eye(N)}}


def embed(variables, x, *, train, key):
    z = x.astype(jnp.float32).reshape(len(x), -1)[:, :N] @ variables["params"]["w"]
    return {"projection": z, "prediction": z}, {}


NET = jt.Model(identity, embed, name="net")  # each image its own direction: nothing is left to learn


def pictures(count=N):
    """Image i is one at place i."""
    images = np.zeros((count, 4, 8, 1), np.uint8)
    images.reshape(count, -1)[np.arange(count), np.arange(count) % N] = 1
    return jt.data.Dataset.from_arrays(images, np.zeros(count, int))


def numbered(data):
    return data.with_columns({"index": np.arange(len(data))})


def both(key, batch, rows):
    return {**batch, "image2": batch["image"]}


def fitted(objective, data, size=B, steps=24, **options):
    options = {"key": 0, "transform": both, "log_every": 1, **options}
    return jt.fit(objective, optax.sgd(0.0), jt.data.pipeline(data, size, seed=0), steps=steps, **options)


def last(objective, data, name, **options):
    """The mean of the metric over the last two of six epochs, when the queue is full."""
    history = fitted(objective, data, **options).history
    return np.mean([record[f"train/{name}"] for record in history[-8:]])


@pytest.mark.slow
def test_a_key_of_the_querys_own_image_is_no_negative():
    objective = jt.moco(NET, queue=24, temperature=0.07)  # at most N − B, and epochs are shuffled
    assert last(objective, numbered(pictures()), "moco") < 1e-3


@pytest.mark.slow
def test_a_queue_of_unnumbered_examples_can_not_know_them():
    assert last(jt.moco(NET, queue=24, temperature=0.07), pictures(), "moco") > 0.2


@pytest.mark.slow
@pytest.mark.parametrize("make", [jt.moco, jt.nnclr])
def test_other_data_are_evaluated_without_numbers(make):
    """Examples of another split are none of the queue's, and needn't be numbered."""
    objective, x = make(NET, queue=24), np.eye(B, N, dtype=np.float32)
    batch = {"image": x, "image2": x, "index": np.arange(B)}
    state = jt.init(objective, optax.sgd(0.0), 0, batch)
    others = {**batch, "index": np.arange(B) + N}
    without = {name: entry for name, entry in batch.items() if name != "index"}
    assert jt.evaluate(objective, state, [without]) == jt.evaluate(objective, state, [others])


@pytest.mark.slow
def test_a_queue_of_several_epochs_serves_numbered_examples():
    assert last(jt.moco(NET, queue=128, temperature=0.07), numbered(pictures()), "moco") < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("mode", [pytest.param("jit", marks=pytest.mark.slow), "pmap"])
def test_the_numbers_go_with_the_keys_over_devices(mode):
    objective, mesh = jt.moco(NET, queue=24, temperature=0.07), jax.make_mesh((4,), ("data",))
    if mode == "pmap":
        batch = {**numbered(pictures()).read(np.arange(8)), "image2": numbered(pictures()).read(np.arange(8))["image"]}
        step = jt.train_step(objective, optax.sgd(0.0), mode="pmap")
        state = jt.init(objective, optax.sgd(0.0), jax.random.key(0), batch)
        for _ in range(2):
            state, metrics = step(state, batch)
        assert float(metrics["moco"]) < 1e-3  # the second time all of its own images are in the queue
        assert sorted(np.asarray(state.state["net_queue"]["index"])) == [-1] * 8 + sorted([*range(8), *range(8)])
        return
    assert last(objective, numbered(pictures()), "moco", mesh=mesh) < 1e-3


def test_nobody_is_their_own_neighbour():
    data = numbered(pictures())
    objective = jt.nnclr(NET, queue=24, temperature=0.5)
    batch = data.read(np.arange(B))
    batch["image2"] = batch["image"]
    params, state = objective.init(jax.random.key(0), batch)
    step = jax.jit(lambda state, batch: objective(params, state, batch, jt.Context(key=jax.random.key(0)))[:2])
    _, state = step(state, batch)
    support = np.float64(state["net_queue"]["keys"])
    np.testing.assert_allclose(support[:B], np.eye(N)[:B])  # its own images
    loss, _ = step(state, batch)
    nearest = support[B:][np.argmax(support[B:, :B], axis=0)]
    scores = nearest @ np.eye(N)[:B].T / 0.5
    expected = np.log(np.exp(scores).sum(1)) - np.diag(scores)
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)


def test_ids_leave_out_pairs_of_one_example(rng):
    a, p, n = (rng.normal(size=(size, 7)).astype(np.float32) for size in (5, 5, 9))
    mine, theirs = np.array([3, 1, 4, 1, 5]), np.array([1, 1, 2, 3, -1, 5, 5, 0, 7])
    got = jt.losses.info_nce(a, p, temperature=0.7, negatives=n, ids=(mine, theirs))
    for i in range(5):
        own = np.exp(a[i] @ p[i] / 0.7)
        others = sum(np.exp(a[i] @ n[j] / 0.7) for j in range(9) if mine[i] != theirs[j])
        np.testing.assert_allclose(got[i], -np.log(own / (own + others)), rtol=1e-5)
    same = jt.losses.info_nce(a, p, temperature=0.7, negatives=n, ids=(np.zeros(5, int), np.zeros(9, int)))
    np.testing.assert_array_equal(same, 0)
    for wrong in ({}, {"negatives": n[:8]}, {"negatives": np.stack([n] * 5)}):
        with pytest.raises(jt.InputError, match="ids are the numbers of the anchors and of the negatives"):
            jt.losses.info_nce(a, p, temperature=0.7, ids=(mine, theirs), **wrong)


@pytest.mark.parametrize(
    "make",
    [
        lambda net: jt.simclr(net),
        lambda net: jt.info_nce(net),
        lambda net: jt.info_nce(net, learn_temperature=True),
        lambda net: jt.siglip(net),
        lambda net: jt.decoupled(net),
        lambda net: 0.5 * jt.simclr(net).named("views") + jt.l2(),
    ],
)
def test_a_batch_of_more_than_the_data_is_refused(make):
    with pytest.raises(jt.InputError, match=r"a batch of 40 of 32 examples holds some of them twice.*at most 32"):
        fitted(make(NET), pictures(), size=40, steps=1)


def test_what_is_not_told_apart_may_come_twice():
    fitted(jt.byol(NET), pictures(6), size=B, steps=1)


@pytest.mark.slow
@pytest.mark.parametrize("make", [jt.moco, jt.nnclr])
def test_a_queue_of_more_than_the_data_is_refused(make):
    with pytest.raises(
        jt.InputError, match=r"a queue of 25 and a batch of 8 are more than the 32 examples.*a queue of at most 24"
    ):
        fitted(make(NET, queue=25), pictures(), steps=1)
    fitted(make(NET, queue=24), pictures(), steps=1)
