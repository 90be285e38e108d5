"""Twins: models that share parameters but for some, with statistics of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt

KEY, B, D, H = jax.random.key(5), 8, 5, 6
EPSILON = 1e-3


def network():
    """A layer, batch norm, a head."""

    def init(key, x):
        keys = jax.random.split(key)
        params = {
            "body": 0.5 * jax.random.normal(keys[0], (D, H)),
            "norm": {"scale": jnp.ones(H), "bias": jnp.zeros(H)},
            "head": 0.5 * jax.random.normal(keys[1], (H, 3)),
        }
        return {"params": params, "stats": {"mean": jnp.zeros(H), "square": jnp.ones(H)}}

    def apply(variables, x, *, train, key, axis=None, still=None):
        params, stats = variables["params"], variables["stats"]
        held = still is not None and all(flag is True for flag in jax.tree.leaves(still["norm"]))
        x, now = x @ params["body"], stats
        if train and not held:
            now = {"mean": x.mean(0), "square": (x**2).mean(0)}
            now = now if axis is None else jax.lax.pmean(now, axis)
            stats = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, stats, now)
        variance = now["square"] - now["mean"] ** 2 + EPSILON
        x = (x - now["mean"][None]) * (params["norm"]["scale"] * jax.lax.rsqrt(variance))[None]
        features = jnp.tanh(x + params["norm"]["bias"][None])
        return {"features": features, "logits": features @ params["head"]}, {"stats": stats}

    return jt.Model(init, apply, "net", ("body", "norm", "head"))


def two_domains(seed=0):
    rng = np.random.default_rng(seed)

    def one(shift):
        x = rng.normal(size=(B, D)) * (1 + shift) + shift
        return {"image": x.astype(np.float32), "label": rng.integers(0, 3, B).astype(np.int32)}

    return {"source": one(0), "target": one(2)}


def domain_specific(model, weight=0.5):
    twin = model.twin("twin", own="norm")
    objective = jt.classification(model).on("source") + weight * jt.classification(twin).on("target")
    return twin, objective + 0.01 * jt.l2()


def written_out(params, stats, own, own_stats, batches, *, rate, weight=0.5, decay=0.01):
    """The same in NumPy, float64: a batch norm for each domain, everything else shared, gradients by hand."""
    p = {"body": params["body"], "head": params["head"], "norm": dict(params["norm"]), "own": dict(own["norm"])}
    p, stats, own_stats = jax.tree.map(lambda w: np.array(w, np.float64), (p, stats, own_stats))
    for batch in batches:
        grads = jax.tree.map(lambda w: decay * w, p)
        for domain, norm, running, factor in (
            ("source", "norm", stats, 1.0),
            ("target", "own", own_stats, weight),
        ):
            x, y = np.float64(batch[domain]["image"]), np.eye(3)[batch[domain]["label"]]
            z = x @ p["body"]
            mean, square = z.mean(0), (z**2).mean(0)
            running["mean"] = 0.9 * running["mean"] + 0.1 * mean
            running["square"] = 0.9 * running["square"] + 0.1 * square
            deviation = np.sqrt(square - mean**2 + EPSILON)
            unit = (z - mean) / deviation
            features = np.tanh(unit * p[norm]["scale"] + p[norm]["bias"])
            logits = features @ p["head"]
            q = np.exp(logits - logits.max(1, keepdims=True))
            q = q / q.sum(1, keepdims=True)
            down = factor * (q - y) / B
            grads["head"] += features.T @ down
            down = (down @ p["head"].T) * (1 - features**2)
            grads[norm]["scale"] += (down * unit).sum(0)
            grads[norm]["bias"] += down.sum(0)
            down = down * p[norm]["scale"]
            down = (down - down.mean(0) - unit * (down * unit).mean(0)) / deviation
            grads["body"] += x.T @ down
        p = jax.tree.map(lambda w, g: w - rate * g, p, grads)
    return p, stats, own_stats


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of domain-specific batch norm, and its start."""
    model = network()
    twin, objective = domain_specific(model)
    batches = [two_domains(n) for n in range(6)]
    start = jax.tree.map(np.array, jt.init(objective, optax.sgd(0.3), jax.random.key(0), batches[0])[2:4])
    out = tmp_path_factory.mktemp("twins") / "run"
    fitted = jt.fit(objective, optax.sgd(0.3), batches, steps=6, out=out, progress=False)
    return model, twin, objective, batches, start, fitted.state, out


def test_domain_specific_batch_norm_is_the_written_out_loop(trained):
    _, _, _, batches, (params, stats), state, _ = trained
    assert jt.tree.leaves_by_path(params).keys() == {
        "net/body", "net/head", "net/norm/scale", "net/norm/bias", "twin/norm/scale", "twin/norm/bias"
    }  # fmt: skip
    expected = written_out(
        params["net"], stats["net"]["stats"], params["twin"], stats["twin"]["stats"], batches, rate=0.3
    )
    got = {**state.params["net"], "own": state.params["twin"]["norm"]}
    got = got, state.state["net"]["stats"], state.state["twin"]["stats"]
    for (path, a), b in zip(jt.tree.leaves_by_path(got).items(), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5, err_msg=path)
    assert np.abs(np.asarray(got[0]["own"]["bias"]) - got[0]["norm"]["bias"]).max() > 1e-2


@pytest.mark.parametrize("mode", [pytest.param("jit", marks=pytest.mark.slow), "pmap"])
def test_it_is_the_same_on_several_devices(trained, mode, mesh_of):
    _, _, objective, batches, _, expected, _ = trained
    state = jt.init(objective, optax.sgd(0.3), jax.random.key(0), batches[0])
    step = jt.train_step(objective, optax.sgd(0.3), mesh=mesh_of(4), mode=mode)
    for batch in batches:
        state, _ = step(state, batch)
    for a, b in zip(*map(jax.tree.leaves, (state[2:4], expected[2:4])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_twin_is_evaluated_frozen_embedded_and_restored(trained):
    """As a model of its own whose weights are the shared ones with its own in their places."""
    model, twin, objective, batches, _, state, out = trained
    whole = {**state.params["net"], "norm": state.params["twin"]["norm"]}
    plain = jt.TrainState.of({"net": whole}, {"net": state.state["twin"]})
    target = [batch["target"] for batch in batches[:2]]
    expected = jt.evaluate(jt.classification(model), plain, target)
    assert jt.evaluate(jt.classification(twin), state, target) == pytest.approx(expected, rel=1e-5)
    still = jt.classification(jt.frozen(twin, state))
    assert jt.evaluate(still, state, target) == pytest.approx(expected, rel=1e-5)
    features = [
        jt.representation.embed(one, of.variables.tree, target).features
        for one, of in ((twin, jt.frozen(twin, state)), (model, jt.frozen(model, plain)))
    ]
    np.testing.assert_array_equal(*features)
    assert not np.allclose(
        features[0], jt.representation.embed(model, jt.frozen(model, state).variables.tree, target)[0]
    )
    again = jt.fit(objective, optax.sgd(0.3), batches, steps=6, out=out, progress=False)
    for a, b in zip(*map(jax.tree.leaves, (again.state[2:4], state[2:4])), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_shared_freezes_for_both_and_what_is_its_own_for_it_alone():
    objective, batch = domain_specific(network())[1], two_domains()
    optimizer = jt.optim.freeze(optax.sgd(0.3), ("net", "twin/norm/scale"))
    state = jt.init(objective, optimizer, KEY, batch)
    before = jt.tree.leaves_by_path(jax.tree.map(np.array, state[2:4]))
    state, _ = jt.train_step(objective, optimizer)(state, batch)
    moved = {path: bool(np.any(a != before[path])) for path, a in jt.tree.leaves_by_path(state[2:4]).items()}
    assert {path for path, did in moved.items() if did} == {
        "0/twin/norm/bias", "1/twin/stats/mean", "1/twin/stats/square"
    }  # fmt: skip


@pytest.mark.slow
def test_an_average_of_a_twin_follows_the_weights_that_it_runs_on():
    model = network()
    twin = model.twin("twin", own="norm")
    average = jt.ema(twin, 0.5)
    objective = jt.classification(twin) + 0 * jt.distillation(twin, average)  # the shared ones have no other term
    batch = two_domains()["target"]
    state, step = jt.init(objective, optax.sgd(0.3), KEY, batch), jt.train_step(objective, optax.sgd(0.3))
    assert set(state.params) == {"net", "twin"}
    slow = jax.tree.map(np.array, twin.whole(state.params))
    for number in range(3):
        if number:
            slow = jax.tree.map(lambda a, b: (a + np.asarray(b)) / 2, slow, twin.whole(state.params))
        state, _ = step(state, batch)
    for a, b in zip(*map(jax.tree.leaves, (state.state["twin_ema"]["params"], slow)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_start_for_a_twin_is_cut_from_weights_by_own():
    """ADDA: the target encoder begins as the source's, and the head is shared."""
    model = network()
    encoder = model.twin("target", own=("body", "norm"))
    source = model.init(KEY, jnp.zeros((2, D)))
    params = {"net": source["params"], "target": encoder.own(source["params"])}
    stats = {name: {"stats": source["stats"]} for name in params}
    objective = jt.classification(encoder)
    state = jt.init(objective, optax.sgd(0.1), jax.random.key(9), two_domains()["target"], params=params, state=stats)
    for a, b in zip(*map(jax.tree.leaves, (encoder.whole(state.params), source["params"])), strict=True):
        np.testing.assert_array_equal(a, b)
    assert set(state.params["target"]) == {"body", "norm"}


def test_a_twin_of_statistics_alone_has_no_parameters_of_its_own():
    model = network()
    twin = model.twin("twin")
    objective = jt.classification(model).on("source") + jt.classification(twin).on("target")
    params, state = objective.init(KEY, two_domains())
    assert params["twin"] == {}
    whole = jt.shapes_of(jt.Forward.of(model.twin("other", own="head")), two_domains()["source"])
    assert whole["features"].shape == (B, H)  # a term sizes its own layers by a twin's outputs
    assert set(state) == {"net", "twin"}
    _, new, _ = objective(params, state, two_domains(), jt.Context(key=KEY))
    assert np.abs(np.asarray(new["twin"]["stats"]["mean"]) - new["net"]["stats"]["mean"]).max() > 1e-2


def test_misuse_is_told():
    model = network()
    with pytest.raises(jt.InputError, match=r"the twin 'twin': the pattern 'norms' selects no parameter"):
        jt.classification(model.twin("twin", own="norms")).init(KEY, two_domains()["source"])
    with pytest.raises(jt.InputError, match="another name"):
        model.twin("net")
    with pytest.raises(jt.InputError, match="is a twin of 'net' itself"):
        model.twin("twin").twin("third")
    with pytest.raises(jt.InputError, match=r"'twin' is a twin: make the heads first"):
        jt.models.with_heads(model.twin("twin"), projection=jt.models.head(3))
    with pytest.raises(jt.InputError, match="two different models are named 'net'"):
        jt.classification(network()) + jt.classification(model.twin("twin"))
