"""Models with a frozen part: what they read reaches every forward, and neither the state nor the program holds it."""

import gc

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxtransfer as jt
from jaxtransfer.micro_batches import micro_batched
from jaxtransfer.objective import fresh
from jaxtransfer.runs import checkpoints
from tests.deltas import low_rank, merged

KEY, B, D, H = jax.random.key(4), 16, 7, 13


def network():
    """A perceptron with running statistics; no other array of the tests has the shape of its kernel."""

    def init(key, x):
        keys = jax.random.split(key)
        params = {"body": {"kernel": 0.3 * jax.random.normal(keys[0], (D, H))}, "head": jnp.eye(H)[:, :3]}
        return {"params": params, "stats": {"mean": jnp.zeros(H)}}

    def apply(variables, x, *, train, key, axis=None):
        z, mean = x @ variables["params"]["body"]["kernel"], variables["stats"]["mean"]
        if train:
            now = z.mean(0) if axis is None else jax.lax.pmean(z.mean(0), axis)
            mean, z = 0.9 * mean + 0.1 * now, z - now[None]
        else:
            z = z - mean[None]
        z = jnp.tanh(z)
        return {"features": z, "logits": z @ variables["params"]["head"]}, {"stats": {"mean": mean}}

    return jt.Model(init, apply, "net", ("body", "head"))


def a_batch(seed=0, rows=B):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, D)).astype(np.float32)
    return {"image": x, "label": rng.integers(0, 3, rows).astype(np.int32)}


def base_of(model):
    return model.init(KEY, jnp.zeros((2, D)))


def with_delta(model, variables):
    """The model with a delta that has left zero, and the variables of the base with the delta merged."""
    net = low_rank(model, variables, rank=2, only="kernel")
    own = net.init(jax.random.key(1), jnp.zeros((2, D)))
    own["params"] = jax.tree.map(lambda w: w + 0.1, own["params"])
    return net, own, {**own, "params": merged(variables["params"], own["params"])}


def test_a_vision_transformer_with_a_delta_keeps_its_base_out_of_program_and_state():
    model = jt.models.vit(192, 12, 3, 10, patch=4)
    image = np.zeros((2, 32, 32, 3), np.float32)
    shapes = jax.eval_shape(model.init, KEY, image)
    variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    net = low_rank(model, variables, rank=8, only="attention/(query|value)/kernel")
    objective, optimizer = jt.classification(net), optax.adam(1e-3)
    batch = {"image": image, "label": np.zeros(2, np.int32)}
    state = jt.init(objective, optimizer, KEY, batch)
    text = jt.train_step(objective, optimizer).lower(state, batch).as_text()
    assert len(text) < 1e6
    assert jt.tree.count(state.params) == 12 * 2 * 8 * (192 + 192)
    assert jt.tree.count((state.params, state.state, state.opt_state)) < 4 * 73_728 < jt.tree.count(variables) / 18


@pytest.mark.slow
def test_the_base_stays_readable_and_out_of_checkpoints_and_is_the_same_on_every_device(tmp_path, mesh_of):
    model = network()
    variables = base_of(model)
    net, objective, optimizer = low_rank(model, variables, rank=2, only="kernel"), None, optax.adam(0.05)
    objective, before = jt.classification(net), jax.tree.map(np.array, variables)
    found = {}
    for name, how in {"jit": {}, "mesh": {"mesh": mesh_of(4)}, "pmap": {"mesh": mesh_of(4), "mode": "pmap"}}.items():
        out = tmp_path / "run" if name == "mesh" else None
        fitted = jt.fit(objective, optimizer, [a_batch(n) for n in range(4)], steps=4, out=out, progress=False, **how)
        found[name] = jax.tree.map(np.asarray, (fitted.state.params, fitted.state.state))
    assert set(found["jit"][0]["net"]) == {"body.kernel"}
    assert set(found["jit"][1]["net"]) == {"stats"}
    assert np.abs(found["jit"][0]["net"]["body.kernel"]["b"]).max() > 0.05
    for name in ("mesh", "pmap"):
        for a, b in zip(*map(jax.tree.leaves, (found["jit"], found[name])), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (before, variables)), strict=True):
        np.testing.assert_array_equal(a, b)  # donated, it could not be read
    saved = checkpoints.read(tmp_path / "run" / "checkpoints").leaves
    assert not [path for path, leaf in saved.items() if np.shape(leaf) == (D, H)]


def kernels_in_memory():
    """The places of all arrays of the shape that only the base's kernel has."""
    gc.collect()
    kernels = [a for a in jax.live_arrays() if a.shape == (D, H)]
    return {shard.data.unsafe_buffer_pointer() for a in kernels for shard in a.addressable_shards}


@pytest.mark.slow
@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_base_is_in_memory_once_beside_a_teacher_of_the_same_weights(devices, mesh_of):
    """Also where both are handed over as NumPy arrays, which each handle would bring to the device for itself."""
    model, mesh = network(), None if devices == 1 else mesh_of(devices)
    variables = jax.tree.map(np.array, base_of(model))  # copies: views would keep the arrays alive
    before = kernels_in_memory()
    net = low_rank(model, variables, rank=2, only="kernel")
    objective = jt.classification(net) + jt.distillation(net, jt.frozen(model.named("teacher"), variables))
    state = jt.init(objective, optax.sgd(0.1), KEY, a_batch())
    step = jt.train_step(objective, optax.sgd(0.1), mesh=mesh)
    for n in range(2):
        state, _ = step(state, a_batch(n))
    jt.evaluate(objective, state, [a_batch()], mesh=mesh)
    assert len(kernels_in_memory() - before) == devices


def heads(model):
    return jt.models.with_heads(model, projection=jt.models.head(4, batch_norm=False))


MADE_OF_IT = {
    "named": lambda model: model.named("other"),
    "inference": lambda model: model.inference(),
    "normalised": lambda model: jt.models.normalize(model, 0.3, 0.5),
    "in micro-batches": lambda model: micro_batched(model, 4),
    "with heads": heads,
    "all of them": lambda model: micro_batched(heads(jt.models.normalize(model.inference(), 0.3, 0.5)), 8).named("x"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE_OF_IT)
def test_models_made_of_it_pass_on_what_is_frozen(name):
    model, x = network(), jnp.asarray(a_batch()["image"])
    variables = base_of(model)
    net, own, plain = with_delta(model, variables)
    ours, theirs = MADE_OF_IT[name](net), MADE_OF_IT[name](model)
    made = ours.init(KEY, x)
    if "encoder" in made["params"]:
        rest = {part: w for part, w in made["params"].items() if part != "encoder"}
        own, plain = ({kind: {"encoder": v} for kind, v in one.items()} for one in (own, plain))
        own["params"] |= rest
        plain["params"] |= rest
    assert jax.tree.structure(made) == jax.tree.structure(own)
    for train in (True, False):
        got = ours.apply(ours.complete(own), x, train=train, key=KEY)
        expected = theirs.apply(plain, x, train=train, key=KEY)
        assert jax.tree.structure(got) == jax.tree.structure(expected)  # and so what is frozen is not in the state
        for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


MODULES = {
    "linen": lambda: jt.models.linen(nn.Dense(3)),
    "nnx": lambda: jt.models.nnx(lambda rngs: nnx.Linear(D, 3, rngs=rngs)),
    "equinox": lambda: jt.models.equinox(lambda key: eqx.nn.Linear(D, 3, key=key)),
}


@pytest.mark.slow
@pytest.mark.parametrize("library", MODULES)
def test_a_module_of_any_library_may_be_the_base(library):
    """It is given what is frozen along with its own, and reads none of it."""
    model, x = MODULES[library](), jnp.asarray(a_batch()["image"])
    variables = model.init(KEY, x)
    net = low_rank(model, variables, rank=2, only="kernel|weight")
    own = net.init(KEY, x)
    assert len(own["params"]) == 1
    for train in (True, False):
        got, state = net.apply(net.complete(own), x, train=train, key=KEY)
        np.testing.assert_array_equal(got["logits"], model.apply(variables, x, train=train, key=KEY)[0]["logits"])
        assert state == {}


def episodes(batch):
    halves = [jax.tree.map(lambda x, s=s: x[s].reshape(2, 4, *x.shape[1:]), batch) for s in (slice(0, 8), slice(8, 16))]
    return dict(zip(("support", "query"), halves, strict=True))


OBJECTIVES = {
    "ema": lambda net: jt.classification(net) + jt.distillation(net, jt.ema(net), loss=jt.losses.hint),
    "frozen": lambda net: jt.classification(net) + jt.distillation(net, jt.frozen(net.named("t"), _frozen(net))),
    "maml": lambda net: jt.maml(jt.classification(net), inner=optax.sgd(0.0), steps=2),
    "prototypical": lambda net: jt.meta.prototypical(net, ways=3),
    "balanced": lambda net: jt.balance(
        jt.classification(net) + jt.classification(net, label_smoothing=0.1).named("smooth"), jt.multitask.pcgrad
    ),
    "a term's own": lambda net: _own_term(net),
}


def _frozen(net):
    own = net.init(jax.random.key(1), jnp.zeros((2, D)))
    return net.complete(own)  # whoever completes what needn't be is not punished


def _own_term(net):
    def setup(key, batch):
        params, state = fresh(net, key, batch["image"])
        return {net.name: params}, {net.name: state}

    def loss(outputs, params, state, batch, ctx):
        outputs, state = ctx.run(net, params, state, batch["image"])
        value = ctx.mean(outputs["logits"][:, 0])
        return value.value, state, {"own": value}

    return jt.Objective("own", (), loss, setup=setup, models=(net,))


SLOW = pytest.param("balanced", marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize("name", [SLOW if name == "balanced" else name for name in OBJECTIVES])
def test_objectives_read_it_wherever_they_run_the_model(name):
    """The loss with the delta is that with merged weights, and the gradient reaches the delta alone."""
    model = network()
    net, own, plain = with_delta(model, base_of(model))
    make = OBJECTIVES[name]
    batch = episodes(a_batch()) if name in ("maml", "prototypical") else a_batch()
    ours, theirs = make(net), make(model)
    assert len(ours.frozen) >= 1
    params, state = ours.init(KEY, batch)
    params = {"net": own["params"]}
    also, there = theirs.init(KEY, batch)
    there, also = ({**there, "net": {"stats": own["stats"]}}, {"net": plain["params"]})
    state = {**state, "net": {"stats": own["stats"]}}
    if name == "ema":
        state["net_ema"] = {"params": own["params"], "stats": own["stats"]}
        there["net_ema"] = {"params": plain["params"], "stats": own["stats"]}

    def loss(params, frozen):
        read = dict(zip(ours.frozen, frozen, strict=True))
        return ours(params, state, batch, jt.Context(key=KEY, frozen=read))[:2]

    frozen = [handle.tree for handle in ours.frozen]
    (value, new), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, frozen)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    if name != "frozen":  # where the other's teacher is of other weights
        assert float(value) == pytest.approx(float(theirs(also, there, batch, jt.Context(key=KEY))[0]), rel=1e-5)
    assert float(jnp.abs(grads["net"]["body.kernel"]["a"]).max()) > (0 if name != "maml" else -1)


@pytest.mark.slow
def test_measures_complete_it_by_themselves():
    model, batches = network(), [a_batch(1), a_batch(2)]
    net, own, plain = with_delta(model, base_of(model))
    got = jt.representation.embed(net, own, batches)
    np.testing.assert_allclose(
        got.features, jt.representation.embed(model, plain, batches).features, rtol=1e-4, atol=1e-5
    )
    state = jt.TrainState.of({"net": own["params"]}, {"net": {"stats": own["stats"]}})
    whole = jt.TrainState.of({"net": plain["params"]}, {"net": {"stats": own["stats"]}})
    measured = [
        jt.representation.neighbours(one, batches, batches, k=3)(at) for one, at in ((net, state), (model, whole))
    ]
    assert measured[0] == measured[1]
    evaluated = [jt.evaluate(jt.classification(one), at, batches) for one, at in ((net, state), (model, whole))]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-5)
    episode = [episodes(a_batch(3))]
    few = [
        jt.evaluate_episodes(jt.meta.prototypical(one, ways=3), at, episode)
        for one, at in ((net, state), (model, whole))
    ]
    assert few[0]["prototypical"].mean == pytest.approx(few[1]["prototypical"].mean, rel=1e-5)
    fisher = jt.fisher_diagonal(jt.classification(net), state.params, state.state, batches)
    assert jax.tree.structure(fisher) == jax.tree.structure(state.params)
    assert float(fisher["net"]["body.kernel"]["b"].max()) > 0


@pytest.mark.slow
def test_batches_that_accumulate_to_an_update_read_it_too():
    model = network()
    objective = jt.classification(low_rank(model, base_of(model), rank=2, only="kernel"))
    slow = optax.MultiSteps(optax.sgd(0.3), 2).gradient_transformation()
    states = []
    for optimizer, count in ((optax.sgd(0.3), 1), (slow, 2)):
        state, step = jt.init(objective, optimizer, KEY, a_batch()), jt.train_step(objective, optimizer)
        for _ in range(count):
            state, _ = step(state, a_batch())
        states.append(state.params)
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_misuse_is_told():
    model, x = network(), jnp.zeros((2, D))
    net, own, _ = with_delta(model, base_of(model))
    with pytest.raises(jt.InputError, match=r"'net' has a frozen part: apply it to model.complete\(variables\)"):
        net.apply(own, x, train=False, key=None)
    with pytest.raises(jt.InputError, match="'base/w' is a"):
        jt.Model(net.init, net.apply, "net", frozen={"base": {"w": jnp.zeros(3)}})
    with pytest.raises(jt.InputError, match="of handles"):
        jt.Model(net.init, net.apply, "net", frozen=jt.Frozen({"w": jnp.zeros(3)}))
    taken = jt.Model(lambda key, x: {**model.init(key, x), "frozen": {"w": jnp.zeros(3)}}, model.apply, "net")
    with pytest.raises(jt.InputError, match="collection 'frozen', a name that is kept"):
        jt.classification(taken).init(KEY, a_batch())
