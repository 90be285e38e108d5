"""Passes over all data now and then, whose result lives in the state: exact where a run goes on, on every device."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.objective import view_of

N, B, D, C = 24, 8, 5, 3
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(N, D)).astype(np.float32)
IMAGES[:, :C] += 2 * np.eye(C, dtype=np.float32)[np.arange(N) % C]
MODEL = jt.models.mlp(C, hidden=(6,))
EVERY = 5


def batch(i):
    rows = np.random.default_rng([4, i]).permutation(N)[:B].astype(np.int32)
    return {"image": IMAGES[rows], "index": rows}


BATCHES = [batch(i) for i in range(12)]


def shot():
    """The cross-entropy against pseudo-labels of all examples (Liang et al. 2020)."""
    forward = jt.Forward.of(MODEL)

    def setup(key, batch):
        return {}, {"pseudo": {"label": jnp.zeros(N, jnp.int32), "centroid": jnp.zeros((C, 6))}}

    def loss(outputs, params, state, batch, ctx):
        label = state["pseudo"]["label"][view_of(batch, ("index",))]
        value = ctx.mean(jt.losses.cross_entropy(outputs[forward]["logits"], label))
        return value.value, state, {"shot": value}

    return jt.Objective("shot", (forward,), loss, setup=setup)


@jax.jit
def run(params, x):
    return MODEL.apply({"params": params}, x, train=False, key=None)[0]


def labels(params):
    """The nearest centroid of the features, each the mean weighted by what the network predicts."""
    found = jax.device_get(run(jax.device_get(params), IMAGES))
    features, share = (np.float64(found["features"]), np.float64(jax.nn.softmax(found["logits"])))
    centroids = share.T @ features / share.sum(0)[:, None]
    distance = ((features[:, None] - centroids[None]) ** 2).sum(-1)
    return distance.argmin(1), centroids


class Pseudo:
    """The function of a refresh, which notes the steps that it was asked at."""

    def __init__(self, offset=0):
        self.seen, self.offset = [], offset

    def __call__(self, state):
        self.seen.append(int(state.step))
        label, centroid = labels(state.params["model"])
        return {"pseudo": {"label": np.int32((label + self.offset) % C), "centroid": np.float32(centroid)}}


class Stopped(Exception):
    pass


def fit(out=None, *, stop=None, fn=None, every=EVERY, **how):
    def log(record):
        if stop is not None and record["step"] >= stop:
            raise Stopped

    how = {"save_every": 2, "log_every": 1, "steps": 12, "progress": False, "log": log, **how}
    return jt.fit(shot(), optax.sgd(0.3), BATCHES, out=out, refresh=jt.Refresh(every, fn or Pseudo()), **how)


def same_bits(a, b):
    for x, y in zip(*map(jax.tree.leaves, ((a.params, a.state), (b.params, b.state))), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def whole():
    fn = Pseudo()
    return fit(fn=fn).state, fn.seen


@pytest.mark.slow
def test_it_is_a_written_out_loop(whole):
    state, seen = whole
    assert seen == [0, 5, 10]
    own = jt.init(shot(), optax.sgd(0.3), jax.random.key(0), BATCHES[0]).params["model"]

    @jax.jit
    def gradient(params, x, label):
        return jax.grad(lambda p: jnp.mean(-jax.nn.log_softmax(run(p, x)["logits"])[jnp.arange(B), label]))(params)

    for number, one in enumerate(BATCHES):
        if number in seen:
            label, _ = labels(own)
        grads = gradient(own, one["image"], label[one["index"]])
        own = jax.tree.map(lambda w, g: w - 0.3 * g, own, grads)
    for a, b in zip(*map(jax.tree.leaves, (state.params["model"], own)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(state.state["pseudo"]["label"], label)
    assert len(np.unique(label)) == C


@pytest.mark.parametrize("stop", [4, 10, 11])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(whole, stop, tmp_path):
    """Also where it was saved right before a refresh, which it then makes again."""
    with pytest.raises(Stopped):
        fit(tmp_path / "run", stop=stop)
    fn = Pseudo()
    again = fit(tmp_path / "run", fn=fn)
    assert fn.seen == [step for step in (0, 5, 10) if step >= (10 if stop >= 10 else 5)]
    same_bits(again.state, whole[0])


def test_it_comes_before_the_first_turn_of_a_step(whole):
    fn = Pseudo()
    objective, optimizer = jt.alternate(jt.Turn("shot", shot(), optax.sgd(0.3)))
    fitted = jt.fit(objective, optimizer, BATCHES, steps=12, progress=False, refresh=jt.Refresh(EVERY, fn))
    assert fn.seen == whole[1]
    for a, b in zip(*map(jax.tree.leaves, (fitted.state.params, whole[0].params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", [pytest.param("jit", marks=pytest.mark.slow), "pmap"])
def test_it_is_the_same_on_a_mesh(whole, mode, mesh_of):
    state = fit(mesh=mesh_of(4), mode=mode).state
    for a, b in zip(*map(jax.tree.leaves, (state[2:4], whole[0][2:4])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_steps_that_run_in_one_call_end_at_a_refresh():
    def sample(key, data):
        rows = jax.random.randint(key, (B,), 0, N)
        return {"image": data["image"][rows], "index": rows}

    def fitted(**how):
        fn = Pseudo()
        how = {"steps": 12, "sample": sample, "progress": False, "log_every": 6, **how}
        data = {"image": IMAGES}
        return jt.fit(shot(), optax.sgd(0.3), data, refresh=jt.Refresh(4, fn), **how).state, fn.seen

    (together, seen), (single, _) = fitted(), fitted(steps_per_call=1)
    assert seen == [0, 4, 8]
    for a, b in zip(*map(jax.tree.leaves, (together[2:4], single[2:4])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    with pytest.raises(jt.InputError, match="every 4 steps doesn't fall between calls of 3 steps"):
        fitted(steps_per_call=3)


def test_it_is_part_of_what_a_run_is(tmp_path):
    out = tmp_path / "run"
    fit(out, steps=4)
    assert json.loads((out / "identity.json").read_text())["parts"]["refresh"] == {"every": 5, "function": "Pseudo"}
    with pytest.raises(jt.InputError, match=r"another configuration \(refresh"):
        fit(out, every=6)
    with pytest.raises(jt.InputError, match=r"another configuration \(refresh"):
        fit(out, fn=lambda state: {})
    told = Pseudo()
    told.fingerprint = lambda: "labels of usps"
    with pytest.raises(jt.InputError, match=r"another configuration \(refresh"):
        fit(out, fn=told)
    with pytest.raises(jt.InputError, match="refresh"):
        jt.fit(shot(), optax.sgd(0.3), BATCHES, steps=8, out=out, progress=False)


@pytest.mark.parametrize(
    ("made", "told"),
    [
        ({"psuedo": {}}, "unknown entry of the state that a refresh makes 'psuedo' .did you mean 'pseudo'"),
        ({"pseudo": {"label": np.zeros(N, np.int32)}}, r"must keep structure and shapes .*- centroid \(3, 6\)"),
        (
            {"pseudo": {"label": np.zeros(N - 1, np.int32), "centroid": np.zeros((C, 6), np.float32)}},
            r"label: expected \(24,\), got \(23,\)",
        ),
        (
            {"pseudo": {"label": np.zeros(N, np.float32), "centroid": np.zeros((C, 6), np.float32)}},
            "pseudo/label is int32 in the state; got float32",
        ),
        ({"pseudo": {"label": [0] * N, "centroid": np.zeros((C, 6))}}, "label/0 is a int"),
        ([1], "a dict of entries of the state; got a list"),
    ],
)
def test_what_does_not_fit_the_state_is_refused_by_path(made, told):
    with pytest.raises(jt.InputError, match=told):
        fit(fn=lambda state: made)


def test_misuse_is_told():
    with pytest.raises(jt.InputError, match="positive whole number of steps; got 0"):
        jt.Refresh(0, Pseudo())
    with pytest.raises(jt.InputError, match=r"a function of \(state\)"):
        jt.Refresh(3, {"pseudo": 1})
    with pytest.raises(jt.InputError, match=r"refresh is a jt.Refresh\(every, fn\); got a function"):
        jt.fit(shot(), optax.sgd(0.3), BATCHES, steps=2, refresh=lambda state: {})
