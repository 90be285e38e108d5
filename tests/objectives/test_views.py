"""Self-supervised objectives: what they compute, what they remember, and the same numbers on any devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt

KEY = jax.random.key(2)
B, D = 8, 5


def network(name="model", sizes=(D,), **heads):
    encoder = jt.models.mlp(3, hidden=(9,), name=name)
    return jt.models.with_heads(encoder, projection=jt.models.head(7, *sizes), **heads)


def predicting():
    return network(prediction=("projection", jt.models.head(6, D)))


def a_batch(seed=0, rows=B):
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(rows, 3, 3, 1))
    views = {"image": image, "image2": image + 0.3 * rng.normal(size=image.shape)}
    return {k: v.astype(np.float32) for k, v in views.items()} | {"label": rng.integers(0, 3, rows).astype(np.int32)}


def run(objective, params, state, batch, ctx=None):
    """Loss, state and metrics by one program, not one an operation."""
    ctx = jt.Context(key=KEY) if ctx is None else ctx
    return jax.jit(lambda *given: objective(*given, ctx))(params, state, batch)


def outputs(model, variables, x):
    return jax.jit(lambda *given: model.apply(*given, train=True, key=None)[0])(variables, x)


def both(model, params, state, batch, tap="projection"):
    """The embeddings of both views, run together, float64."""
    x = np.stack([batch["image"], batch["image2"]], 1).reshape(-1, 3, 3, 1)
    variables = {"params": params[model.name], **state[model.name]}
    z = np.float64(outputs(model, variables, x)[tap]).reshape(len(batch["image"]), 2, -1)
    return z[:, 0], z[:, 1]


def unit(z):
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


def np_info_nce(a, p, temperature):
    scores = unit(a) @ unit(p).T / temperature
    return np.mean([np.log(np.exp(row).sum()) - row[i] for i, row in enumerate(scores)])


@pytest.mark.slow
def test_info_nce_of_one_tower():
    model, batch = network(), a_batch()
    objective = jt.info_nce(model, temperature=0.3, symmetric=False)
    params, state = objective.init(KEY, batch)
    loss = run(objective, params, state, batch)[0]
    np.testing.assert_allclose(loss, np_info_nce(*both(model, params, state, batch), 0.3), rtol=1e-5)


@pytest.mark.slow
def test_a_learned_temperature_returns_from_its_bound():
    model, batch = network(), a_batch()
    objective = jt.info_nce(model, temperature=0.01, learn_temperature=True)
    params, state = objective.init(KEY, batch)
    for beyond, name in ((0.0, "at the bound"), (3.0, "beyond it")):
        here = {**params, "model_temperature": {"log_scale": jnp.float32(np.log(100) + beyond)}}
        value, slopes = jax.value_and_grad(lambda p: objective(p, state, batch, jt.Context(key=KEY))[0])(here)
        exact = jt.info_nce(model, temperature=0.01)
        np.testing.assert_allclose(value, run(exact, params, state, batch)[0], rtol=1e-5, err_msg=name)
        assert slopes["model_temperature"]["log_scale"] > 0, name  # of random embeddings: a smaller scale is better
    with pytest.raises(jt.InputError, match=r"at least 0\.01 to be learned; got 0\.005"):
        jt.info_nce(model, temperature=0.005, learn_temperature=True)


@pytest.mark.slow
def test_a_mask_weighs_examples_alike_in_all():
    model, batch = predicting(), {**a_batch(rows=4), "mask": np.array([1, 1, 0.25, 0], np.float32)}
    for build in (jt.simclr, jt.siglip, jt.byol, jt.simsiam, jt.swav, jt.dino):
        objective = build(model)
        params, state = objective.init(KEY, batch)
        _, _, metrics = run(objective, params, state, batch)
        assert float(metrics[objective.name].count) == 2.25, objective.name
    for build in (jt.moco, jt.nnclr):
        objective = build(model, queue=8)
        params, state = objective.init(KEY, batch)
        assert float(run(objective, params, state, batch)[2][objective.name].count) == 2.25


@pytest.mark.slow
def test_two_towers_and_a_learned_temperature():
    phi, psi, batch = network(), network("psi", sizes=(12, D)), a_batch()
    batch = {**batch, "text": batch.pop("image2")[:, :2]}
    objective = jt.info_nce(phi, psi, temperature=0.2, learn_temperature=True, views=("image", "text"))
    params, state = objective.init(KEY, batch)
    assert set(params) == {"model", "psi", "model_temperature"}
    loss, _, metrics = jax.jit(lambda p: objective(p, state, batch, jt.Context(key=KEY)))(params)
    z = [
        np.float64(outputs(m, {"params": params[n], **state[n]}, batch[v])["projection"])
        for m, n, v in ((phi, "model", "image"), (psi, "psi", "text"))
    ]
    np.testing.assert_allclose(loss, (np_info_nce(*z, 0.2) + np_info_nce(*z[::-1], 0.2)) / 2, rtol=1e-5)
    np.testing.assert_allclose(metrics["info_nce/temperature"].value, 0.2, rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda p: objective(p, state, batch, jt.Context(key=KEY))[0]))(params)
    change = 1e-4
    near = [(np_info_nce(*z, t) + np_info_nce(*z[::-1], t)) / 2 for t in (0.2 * np.exp(-change), 0.2 * np.exp(change))]
    np.testing.assert_allclose(
        gradient["model_temperature"]["log_scale"], (near[0] - near[1]) / (2 * change), rtol=1e-3
    )


@pytest.mark.slow
def test_micro_batches_give_the_same_gradient():
    model, batch = (
        jt.models.with_heads(jt.models.mlp(3, hidden=(9,)), projection=jt.models.head(7, D, batch_norm=False)),
        a_batch(),
    )
    values = []
    for size in (None, 4):
        objective = jt.info_nce(model, micro_batch=size)
        params, state = objective.init(KEY, batch)
        values.append(
            jax.jit(jax.value_and_grad(lambda p, o=objective, s=state: o(p, s, batch, jt.Context(key=KEY))[0]))(params)
        )
    for one, two in zip(*map(jax.tree.leaves, values), strict=True):
        np.testing.assert_allclose(two, one, atol=1e-5 * np.abs(one).max())


def test_supcon_sees_labels_and_views():
    model, batch = network(), a_batch()
    objective = jt.supcon(model, temperature=0.3)
    params, state = objective.init(KEY, batch)
    z = unit(np.stack(both(model, params, state, batch), 1).reshape(2 * B, -1))
    label = np.repeat(batch["label"], 2)
    total = 0.0
    for i in range(2 * B):
        others = [j for j in range(2 * B) if j != i]
        sums = np.log(sum(np.exp(z[i] @ z[j] / 0.3) for j in others))
        alike = [j for j in others if label[j] == label[i]]
        total += np.mean([sums - z[i] @ z[j] / 0.3 for j in alike]) * 0.3 / 0.07
    loss = run(objective, params, state, batch)[0]
    np.testing.assert_allclose(loss, total / (2 * B), rtol=1e-5)


def test_byol_predicts_the_slow_projection():
    model, batch = predicting(), a_batch()
    objective = jt.byol(model, decay=0.75)
    params, state = objective.init(KEY, batch)
    moved = {"model": jax.tree.map(lambda w: 1.3 * w + 0.1, params["model"])}
    ctx = jt.Context(step=jnp.asarray(3), key=KEY)
    loss, after, _ = run(objective, moved, state, batch, ctx)
    slow = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, params["model"], moved["model"])
    p1, p2 = both(model, moved, state, batch, "prediction")
    t1, t2 = both(model, {"model": slow}, state, batch)
    cosines = [np.sum(unit(p) * unit(t), -1) for p, t in ((p1, t2), (p2, t1))]
    np.testing.assert_allclose(loss, np.mean(2 - np.mean(cosines, 0) * 2), rtol=1e-4)
    for one, two in zip(*map(jax.tree.leaves, (after["model_ema"]["params"], slow)), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_simsiam_holds_its_targets():
    model, batch = predicting(), a_batch()
    objective = jt.simsiam(model)
    params, state = objective.init(KEY, batch)
    p1, p2 = both(model, params, state, batch, "prediction")
    t1, t2 = both(model, params, state, batch)
    loss, gradient = jax.jit(jax.value_and_grad(lambda p: run(objective, p, state, batch)[0]))(params)
    np.testing.assert_allclose(
        loss, -np.mean([np.sum(unit(p) * unit(t), -1) for p, t in ((p1, t2), (p2, t1))]), rtol=1e-5
    )
    fixed = {"t1": jnp.asarray(t1, jnp.float32), "t2": jnp.asarray(t2, jnp.float32)}

    def held(p):
        found, _ = objective.run(p, state, batch, jt.Context(key=KEY))
        (one, two) = found[objective.forwards[0]]
        cosine = jt.losses.negative_cosine
        return jnp.mean(cosine(one["prediction"], fixed["t2"]) + cosine(two["prediction"], fixed["t1"])) / 2

    for one, two in zip(*map(jax.tree.leaves, (gradient, jax.jit(jax.grad(held))(params))), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_moco_remembers_its_keys():
    model, queue = network(), 20
    objective = jt.moco(model, queue=queue, temperature=0.3, decay=0.5)
    params, state = objective.init(KEY, a_batch())
    keys = np.float64(state["model_queue"]["keys"])
    np.testing.assert_allclose(np.linalg.norm(keys, axis=1), 1, rtol=1e-5)
    for step in range(3):
        batch, before = a_batch(step), keys.copy()
        ctx = jt.Context(step=jnp.asarray(step), key=KEY)
        loss, after, _ = run(objective, params, state, batch, ctx)
        variables = {"params": params["model"], **state["model"]}
        slow = {"params": params["model"], **{k: v for k, v in state["model_ema"].items() if k != "params"}}
        q, k = (
            unit(np.float64(outputs(model, v, batch[view])["projection"]))
            for v, view in ((variables, "image"), (slow, "image2"))
        )
        expected = [
            np.log(np.exp(q[i] @ k[i] / 0.3) + np.exp(before @ q[i] / 0.3).sum()) - q[i] @ k[i] / 0.3 for i in range(B)
        ]
        np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-5)
        for i in range(B):
            keys[(step * B + i) % queue] = k[i]
        np.testing.assert_allclose(after["model_queue"]["keys"], keys, rtol=1e-4, atol=1e-6)
        state = after
    assert int(state["model_queue"]["place"]) == 3 * B % queue
    still = run(objective, params, state, batch, jt.Context(step=jnp.asarray(3), train=False))[1]
    assert np.array_equal(still["model_queue"]["keys"], state["model_queue"]["keys"])


@pytest.mark.slow
def test_nnclr_looks_up_neighbours():
    model, batch = predicting(), a_batch()
    objective = jt.nnclr(model, queue=30, temperature=0.2)
    params, state = objective.init(KEY, batch)
    support = np.float64(state["model_queue"]["keys"])
    (z1, z2), (p1, p2) = both(model, params, state, batch), both(model, params, state, batch, "prediction")
    ways = [np_info_nce(support[(unit(z) @ support.T).argmax(1)], p, 0.2) for z, p in ((z1, p2), (z2, p1))]
    loss, after, _ = run(objective, params, state, batch)
    np.testing.assert_allclose(loss, np.mean(ways), rtol=1e-5)
    np.testing.assert_allclose(after["model_queue"]["keys"][:B], unit(z1), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_swav_may_hold_its_prototypes_and_sees_small_crops():
    model, batch = network(), a_batch()
    batch |= dict.fromkeys(("crop", "crop2"), batch["image"][:, :2, :2])
    model = jt.models.with_heads(jt.models.small_cnn(3, width=4), projection=jt.models.head(D))
    objective = jt.swav(model, prototypes=6, freeze=2, crops=("crop", "crop2"))
    params, state = objective.init(KEY, batch)
    assert params["model_prototypes"]["vectors"].shape == (6, D)

    @jax.jit
    def gradient(step):
        ctx = jt.Context(step=step, key=KEY)
        return jax.value_and_grad(lambda p: objective(p, state, batch, ctx)[0])(params)

    (value, held), (same, free) = gradient(1), gradient(2)
    assert value == same
    assert not np.any(held["model_prototypes"]["vectors"])
    assert np.any(free["model_prototypes"]["vectors"])
    views = [
        np.asarray(o["projection"])
        for f in objective.forwards
        for o in objective.run(params, state, batch, jt.Context(key=KEY))[0][f]
    ]
    scores = [unit(z) @ unit(np.asarray(params["model_prototypes"]["vectors"])).T for z in views]
    np.testing.assert_allclose(value, np.mean(jt.losses.swav([jnp.asarray(s) for s in scores], codes=2)), rtol=1e-5)


def test_dino_moves_its_centre():
    model, batch = network(), a_batch()
    objective = jt.dino(model, decay=0.5, center_momentum=0.8, teacher_temperature=lambda step: 0.04 + 0.01 * step)
    params, state = objective.init(KEY, batch)
    ctx = jt.Context(step=jnp.asarray(0), key=KEY)
    loss, after, _ = run(objective, params, state, batch, ctx)
    t1, t2 = both(model, params, state, batch)
    np.testing.assert_allclose(
        after["model_center"]["value"], 0.2 * (t1.mean(0) + t2.mean(0)) / 2, rtol=1e-4, atol=1e-6
    )

    def cross(t, s):
        q = np.exp(t / 0.04 - (t / 0.04).max(-1, keepdims=True))
        log = s / 0.1 - np.log(np.exp(s / 0.1).sum(-1, keepdims=True))
        return -np.mean(np.sum(q / q.sum(-1, keepdims=True) * log, -1))

    np.testing.assert_allclose(loss, (cross(t1, t2) + cross(t2, t1)) / 2, rtol=1e-4)


PARITY = {
    "simclr": lambda model: jt.simclr(model),
    "moco": lambda model: jt.moco(model, queue=24),
    "clip": lambda model: jt.info_nce(model, network("psi"), learn_temperature=True),
    "supcon": lambda model: jt.supcon(model),
    "barlow twins": lambda model: jt.barlow_twins(model),
    "vicreg": lambda model: jt.vicreg(model),
}
QUICK = {("simclr", "jit", 8), ("clip", "pmap", 2)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mode", "devices"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in ((n, m, d) for n in PARITY for m in ("jit", "pmap") for d in (2, 4, 8))
    ],
)
def test_devices_give_the_same_gradient(name, mode, devices):
    batch, optimizer = a_batch(rows=16), optax.sgd(1.0)
    encoder = jt.models.mlp(3, hidden=(9,))
    objective = PARITY[name](jt.models.with_heads(encoder, projection=jt.models.head(7, D, last_bias=False)))
    moves = []
    for mesh in (None, jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])):
        state = jt.init(objective, optimizer, KEY, batch)
        start = jax.tree.map(np.array, state.params)
        step = jt.train_step(objective, optimizer, mesh=mesh, mode=mode if mesh else "jit")
        state, metrics = step(state, batch)
        moves.append(
            (float(metrics["loss"]), jax.tree.map(lambda a, b: a - np.asarray(b), start, state.params), state.state)
        )
    np.testing.assert_allclose(moves[1][0], moves[0][0], rtol=1e-5)
    for one, two in zip(*(jax.tree.leaves(move[1:]) for move in moves), strict=True):
        np.testing.assert_allclose(two, one, rtol=0, atol=1e-5 * np.abs(one).max())


def test_refusals():
    model, batch = network(), a_batch()
    with pytest.raises(jt.InputError, match="names of two views"):
        jt.simclr(model, views=("image",))
    with pytest.raises(jt.InputError, match=r"reads batch\['image2'\]"):
        jt.init(jt.simclr(model), optax.sgd(0.1), KEY, {"image": batch["image"]})
    with pytest.raises(jt.InputError, match="unknown output of model 'model' 'nope'"):
        jt.init(jt.simclr(model, tap="nope"), optax.sgd(0.1), KEY, batch)
    with pytest.raises(jt.InputError, match="queue holds 4 vectors, fewer than a batch of 8"):
        jt.init(jt.moco(model, queue=4), optax.sgd(0.1), KEY, batch)
    with pytest.raises(jt.InputError, match="temperature must be positive"):
        jt.info_nce(model, temperature=0.0)
    with pytest.raises(jt.InputError, match="expected two views or more"):
        jt.dino(model, views=("image",))
