"""The model of a base and a delta: in training, with running state, on any devices, averaged and meta-learned."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.deltas.weight import weights_of
from jaxtransfer.runs import checkpoints
from tests.contract import assert_same_on_any_devices, batches, normalised

KEY = jax.random.key(5)
D = jt.deltas


def base_of(model, image=None):
    return model.init(jax.random.key(1), jnp.zeros((2, 4, 4, 1)) if image is None else image)


def moved(params, by=0.2, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + by * rng.normal(size=leaf.shape).astype(np.float32), params)


NETWORKS = {
    "attention": (lambda: jt.models.vit(8, 1, 2, 3, patch=2), (4, 4, 1), "attention|fc1|head|stem_conv"),
    "convolutions": (lambda: jt.models.small_cnn(3, width=4), (8, 8, 1), None),
    "depthwise": (lambda: depthwise(), (6, 6, 2), None),
}


def depthwise():
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3), feature_group_count=2, name="grouped")(x)
            x = nn.Conv(4, (3, 3), feature_group_count=4, name="deep")(x)
            return nn.Dense(3, name="head")(nn.relu(x).mean((1, 2)))

    return jt.models.linen(Net(), stages=("grouped", "deep", "head"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "convolutions" else ()) for name in NETWORKS]
)
def test_merged_weights_give_what_it_runs(name):
    make, shape, only = NETWORKS[name]
    model, rng = make(), np.random.default_rng(3)
    x = rng.normal(size=(4, *shape)).astype(np.float32)
    variables = jax.jit(model.init)(KEY, x)
    part = D.chain(first=D.dora(2).on(only), second=D.lora(1).on(only), third=D.dora(1).on("head"))
    net = D.delta(model, variables, part)
    own = net.init(KEY, x)

    @jax.jit
    def outputs(own, frozen):
        begun = net.apply({**own, "frozen": frozen}, x, train=False, key=None)[0]["logits"]
        return begun, model.apply(variables, x, train=False, key=None)[0]["logits"]

    frozen = {name: handle.tree for name, handle in net.frozen.items()}
    np.testing.assert_allclose(*outputs(own, frozen), rtol=1e-5, atol=1e-6)
    own = {**own, "params": moved(own["params"])}
    run, before = outputs(own, frozen)
    whole = D.merged(net, own)
    merged = jax.jit(lambda v: model.apply(v, x, train=False, key=None)[0]["logits"])(whole)
    assert np.abs(run - before).max() > 0.01
    np.testing.assert_allclose(run, merged, rtol=1e-6, atol=1e-6 * np.abs(run).max())
    assert jax.tree.structure(whole["params"]) == jax.tree.structure(variables["params"])
    back = D.unmerge(net, own, whole)
    for a, b in zip(*map(jax.tree.leaves, (back["params"], variables["params"])), strict=True):
        np.testing.assert_array_equal(a, b)
    further = {**whole, "params": jax.tree.map(lambda w: w + 1, whole["params"])}
    for a, b in zip(*map(jax.tree.leaves, (D.unmerge(net, own, further)["params"], variables["params"])), strict=True):
        np.testing.assert_allclose(a, b + 1, rtol=1e-5, atol=1e-5)
    assert D.base_of(net) is variables["params"]


def rows(model, variables, part, **options):
    """How far the statistics of a batch norm move in a training step of a delta."""
    net = D.delta(model, variables, part, **options)
    own = net.init(KEY, jnp.zeros((2, 4, 4, 1)))
    x = batches(np.random.default_rng(0), 1)[0]["image"]
    _, state = jax.jit(lambda own: net.apply(own, x, train=True, key=None))(net.complete(own))
    return {path: float(np.abs(leaf - jt.tree.leaves_by_path(variables)[path]).max()) for path, leaf in _leaves(state)}


def _leaves(state):
    return jt.tree.leaves_by_path(state).items()


@pytest.mark.slow
def test_what_is_frozen_runs_in_inference_mode():
    model = jt.models.small_cnn(4, width=4)
    variables = jax.jit(model.init)(KEY, jnp.zeros((2, 4, 4, 1)))
    stays = rows(model, variables, D.lora(1).on("head"))
    assert stays
    assert max(stays.values()) == 0
    norms = sorted({path.rsplit("/", 2)[1] for path in stays})
    some = rows(model, variables, D.full().on(norms[0]))
    assert all((value > 0) == (path.rsplit("/", 2)[1] == norms[0]) for path, value in some.items())
    assert min(rows(model, variables, D.lora(1).on("head"), adapt_statistics=True).values()) > 0


def test_a_delta_that_an_optimiser_freezes_is_still_too():
    model = jt.models.small_cnn(4, width=4)
    variables = jax.jit(model.init)(KEY, jnp.zeros((2, 4, 4, 1)))
    norm = next(path.rsplit("/", 1)[0] for path in jt.tree.leaves_by_path(variables["params"]) if "norm" in path)
    part = D.chain(norms=D.full().on(norm), head=D.full().on("head"))
    net, batch = D.delta(model, variables, part), batches(np.random.default_rng(0), 1)[0]
    objective = jt.classification(net)
    for frozen, moves in (("head", True), ("norms", False)):
        optimizer = jt.optim.freeze(optax.sgd(0.1), frozen)
        state = jt.init(objective, optimizer, KEY, batch)
        flags = jt.optim.held_still(state.opt_state, state.params)["model"]
        own = net.complete({"params": state.params["model"], **state.state["model"]})
        _, new = jax.jit(lambda own, flags=flags: net.apply(own, batch["image"], train=True, key=None, still=flags))(
            own
        )
        changed = any(
            np.abs(a - b).max() > 0 for a, b in zip(*map(jax.tree.leaves, (new, state.state["model"])), strict=True)
        )
        assert changed == moves


@pytest.mark.slow
def test_it_trains_alike_on_any_devices_and_its_base_stays_out_of_the_state(mesh_of):
    def make(model):
        variables = base_of(model)
        part = D.chain(low=D.dora(2, dropout=0.3).on("body/kernel"), head=D.full().on("head"))
        net = D.delta(model, variables, part, adapt_statistics=True)
        assert net.shares_key
        return jt.classification(net).on("source") + jt.classification(net).on("target")

    ended = assert_same_on_any_devices(make, mesh_of)
    trained = {path for path in ended if path.startswith("0/")}
    assert trained == {
        f"0/model/{path}"
        for path in (
            *(f"low/body/kernel/{name}" for name in "abm"),
            "head/head/kernel",
            "head/head/bias",
        )
    }


def test_a_run_holds_the_delta_alone_and_goes_on_to_the_same_bits(tmp_path):
    model, data = normalised([]), batches(np.random.default_rng(0), 6)
    variables = base_of(model)
    before = jax.tree.map(np.array, variables)
    net = D.delta(model, variables, D.lora(2), adapt_statistics=True)
    objective, optimizer = jt.classification(net), optax.adam(0.05)

    def run(out, steps):
        return jt.fit(objective, optimizer, data, steps=steps, out=tmp_path / out, progress=False)

    whole = run("whole", 6)
    run("parts", 3)
    parts = run("parts", 6)
    for a, b in zip(*map(jax.tree.leaves, (whole.state.params, parts.state.params)), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(*map(jax.tree.leaves, (before, variables)), strict=True):
        np.testing.assert_array_equal(a, b)  # donated, it could not be read
    saved = checkpoints.read(tmp_path / "whole" / "checkpoints").leaves
    assert not [path for path, leaf in saved.items() if np.shape(leaf) == (16, 8)]
    text = jt.train_step(objective, optimizer).lower(whole.state, data[0]).as_text()
    assert 'dense<"0x' not in text


def test_the_meta_gradient_through_a_zero_start_is_right(x64):
    """b is zero, so the first inner step moves b alone, and the second derivative is all that a has."""
    rng = np.random.default_rng(0)

    def init(key, x):
        return {"params": {"kernel": 0.5 * jax.random.normal(key, (3, 4)), "head": jnp.eye(4)[:, :2]}}

    def apply(variables, x, *, train, key):
        hidden = jnp.tanh(x @ variables["params"]["kernel"])
        return {"logits": hidden @ variables["params"]["head"]}, {}

    model = jt.Model(init, apply)
    variables = jax.tree.map(lambda w: w.astype(jnp.float64), model.init(KEY, jnp.zeros((1, 3))))
    net = D.delta(model, variables, D.lora(2, alpha=4.0), only="kernel")
    image, label = rng.normal(size=(2, 8, 3)), rng.integers(0, 2, (2, 8))
    support, query = [{"image": image[:, s], "label": label[:, s]} for s in (slice(0, 4), slice(4, 8))]
    episode = {"support": support, "query": query}
    objective = jt.maml(jt.classification(net), inner=optax.sgd(0.4), steps=2, adapt="kernel")
    params, state = objective.init(KEY, episode)
    assert params["model"]["kernel"]["a"].dtype == jnp.float64
    assert not np.any(params["model"]["kernel"]["b"])

    @jax.jit
    def value(params):
        return objective(params, state, episode, jt.Context(key=KEY))[0]

    gradient = jax.jit(jax.grad(value))(params)
    assert np.abs(gradient["model"]["kernel"]["a"]).max() > 1e-4
    for seed in range(3):
        line = jax.tree.map(lambda w, seed=seed: np.random.default_rng(seed).normal(size=w.shape), params)
        ends = [value(jax.tree.map(lambda w, d, sign=sign: w + sign * 1e-5 * d, params, line)) for sign in (1, -1)]
        slope = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (gradient, line)), strict=True))
        assert float(slope) == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-6, abs=1e-9)


@pytest.mark.slow
def test_averages_teachers_and_penalties_take_it():
    model, data = normalised([]), batches(np.random.default_rng(0), 4)
    variables = base_of(model)
    net = D.delta(model, variables, D.lora(2), adapt_statistics=True)
    teacher = jt.frozen(net.named("teacher"), net.init(KEY, data[0]["image"]))
    anchor = {"model": jax.tree.map(jnp.zeros_like, net.init(KEY, data[0]["image"])["params"])}
    objective = (
        jt.classification(net)
        + jt.distillation(net, jt.ema(net), loss=jt.losses.hint)
        + jt.distillation(net, teacher).named("taught")
        + 0.01 * jt.l2_sp(anchor)
    )
    fitted = jt.fit(objective, optax.sgd(0.1), data, steps=4, progress=False)
    assert set(fitted.state.state["model_ema"]["params"]) == {"body", "head"}
    whole = D.merged(net, fitted.state)
    got = model.apply(whole, data[0]["image"], train=False, key=None)[0]["logits"]
    own = {"params": fitted.state.params["model"], **fitted.state.state["model"]}
    np.testing.assert_allclose(
        got, net.apply(net.complete(own), data[0]["image"], train=False, key=None)[0]["logits"], rtol=1e-5, atol=1e-6
    )


def test_misuse_is_told():
    model = normalised([])
    variables, image = base_of(model), jnp.zeros((2, 4, 4, 1))
    net = D.delta(model, variables, D.lora(1))
    other = {**variables, "params": jax.tree.map(lambda w: w + 1, variables["params"])}
    meant = D.digest(variables)
    assert D.digest(jax.tree.map(np.asarray, variables)) == meant != D.digest(other)
    assert D.digest({**variables, "batch_stats": {}}) == meant
    D.delta(model, variables, D.lora(1), digest=meant)
    narrow = {**variables, "params": {**variables["params"], "body": {"kernel": jnp.ones((9, 8))}}}
    cases = {
        "this delta belongs to the base [0-9a-f]{32}, got the base": lambda: D.delta(
            model, other, D.lora(1), digest=meant
        ),
        r"the base is not one of model 'model' .*params/body/scale": lambda: D.delta(model, narrow, D.lora(1)).init(
            KEY, image
        ),
        "only: the pattern 'haed' selects no parameter": lambda: D.delta(model, variables, D.lora(1), only="haed"),
        "rank 5 is above that of 'head/kernel'": lambda: D.delta(model, variables, D.lora(5)),
        "is a delta already: stack them by jt.deltas.chain": lambda: D.delta(net, variables, D.lora(1)),
        "'twin'|is a twin": lambda: D.delta(model.twin("twin"), variables, D.lora(1)),
        "expected the variables of model 'model'": lambda: D.delta(model, variables["params"], D.lora(1)),
        "model 'model' is no delta": lambda: D.merged(model, variables),
        "the delta 'model': the parameters are not those of this delta": lambda: D.merged(net, variables),
        "the weights are not those of model": lambda: D.unmerge(net, net.init(KEY, image), narrow),
    }
    for message, wrong in cases.items():
        with pytest.raises(jt.InputError, match=message):
            wrong()


@pytest.mark.slow
def test_a_vision_transformer_trains_what_lora_has():
    model = jt.models.vit_ti(100, patch=4)
    shapes = jax.eval_shape(model.init, KEY, np.zeros((1, 32, 32, 3), np.float32))
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    net = D.delta(model, variables, D.lora(8), only="attention/(query|value)/kernel")
    own = jax.eval_shape(lambda key: net.part.fresh(key, weights_of(variables["params"])), KEY)
    assert sum(leaf.size for leaf in jax.tree.leaves(own)) == 73_728
    assert len(net.stages) == 12
