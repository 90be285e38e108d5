"""Terms that run a small model of their own, know the shapes of outputs, and draw once for all devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.objective import fresh

KEY = jax.random.key(6)
B = 8


def network(seen=None):
    def init(key, x):
        return {"params": {"w": jax.random.normal(key, (5, 3))}}

    def apply(variables, x, *, train, key):
        z = jnp.tanh(x @ variables["params"]["w"])
        return {"features": z, "half": z.astype(jnp.bfloat16)[:, :2]}, {}

    return jt.Model(init, apply, "net")


def critic_model():
    """Counts its runs in training, drops inputs, and keeps what it drew."""

    def init(key, x):
        return {
            "params": {"v": jnp.full(x.shape[1], 0.5)},
            "stats": {"runs": jnp.zeros(()), "mask": jnp.zeros(x.shape)},
        }

    def apply(variables, x, *, train, key):
        stats = variables["stats"]
        if train:
            kept = jax.random.bernoulli(key, 0.5, x.shape).astype(x.dtype)
            stats, x = {"runs": stats["runs"] + 1, "mask": kept}, x * kept
        return {"score": x @ variables["params"]["v"]}, {"stats": stats}

    return jt.Model(init, apply, "critic")


def criticised(model, critic, views=("image",)):
    forwards = [jt.Forward.of(model, view) for view in views]

    def setup(key, batch):
        shape = jt.shapes_of(forwards[0], batch)["features"]
        params, state = fresh(critic, key, shape)
        return {critic.name: params}, {critic.name: state}

    def loss(outputs, params, state, batch, ctx):
        total = jnp.zeros(())
        for view, forward in zip(views, forwards, strict=True):
            out, state = ctx.run(critic, params, state, outputs[forward]["features"], view=view)
            total = total + ctx.mean(out["score"], batch.get("mask")).value
        return total, state, {"critic": jt.Mean(total, jnp.ones(()))}

    return jt.Objective("critic", tuple(forwards), loss, setup=setup, models=(critic,))


def a_batch():
    x = np.random.default_rng(0).normal(size=(B, 5)).astype(np.float32)
    return {"image": x, "other": x[::-1].copy()}


def test_shapes_are_told_without_running():
    model, batch = network(), a_batch()
    expected = {"features": ((B, 3), jnp.float32), "half": ((B, 2), jnp.bfloat16)}
    variables = model.init(KEY, batch["image"])
    for one in (model, jt.frozen(model, variables), jt.ema(model)):
        found = jt.shapes_of(jt.Forward.of(one), batch)
        assert {name: (leaf.shape, leaf.dtype) for name, leaf in found.items()} == expected
    with pytest.raises(jt.InputError, match=r"batch\['third'\]"):
        jt.shapes_of(jt.Forward.of(model, "third"), batch)


@pytest.mark.slow
def test_a_model_of_a_terms_own_trains_and_keeps_its_state():
    model, batch = network(), a_batch()
    objective = criticised(model, critic_model(), ("image", "other"))
    state = jt.init(objective, optax.sgd(0.1), KEY, batch)
    start = jax.tree.map(np.array, (state.params, state.state))
    out = {view: np.tanh(batch[view] @ start[0]["net"]["w"]) for view in ("image", "other")}
    scores = jt.evaluate(objective, state, [batch])
    assert scores["critic"] == pytest.approx(0.5 * (out["image"].sum() + out["other"].sum()) / B, rel=1e-5)
    assert float(state.state["critic"]["stats"]["runs"]) == 0
    masks = []
    ctx = jt.Context(jnp.int32(0), KEY)
    for view in ("image", "other"):
        _, after = ctx.run(objective.models[1], state.params, state.state, jnp.asarray(out[view]), view=view)
        masks.append(np.asarray(after["critic"]["stats"]["mask"]))
    assert np.any(masks[0] != masks[1])  # runs on several views draw differently
    state, _ = jt.train_step(objective, optax.sgd(0.1))(state, batch)
    assert float(state.state["critic"]["stats"]["runs"]) == 2
    np.testing.assert_array_equal(state.state["critic"]["stats"]["mask"], masks[1])
    gradient = sum((out[view] * mask).sum(0) for view, mask in zip(out, masks, strict=True)) / B
    np.testing.assert_allclose(state.params["critic"]["v"], 0.5 - 0.1 * gradient, rtol=1e-5)
    with pytest.raises(jt.InputError, match=r"runs model 'critic', but there are weights of \['net'\]"):
        ctx.run(objective.models[1], {"net": {}}, {}, jnp.ones((2, 3)))


def test_a_model_of_a_terms_own_is_frozen_as_others_are():
    objective, batch = criticised(network(), critic_model()), a_batch()
    optimizer = jt.optim.only(optax.sgd(0.1), "net")
    state = jt.init(objective, optimizer, KEY, batch)
    state, _ = jt.train_step(objective, optimizer)(state, batch)
    assert float(state.state["critic"]["stats"]["runs"]) == 0  # in inference mode, so it drops nothing either
    np.testing.assert_array_equal(state.params["critic"]["v"], np.full(3, 0.5))


@pytest.mark.slow
def test_a_draw_for_the_whole_batch_is_the_same_on_all_devices():
    def projected(key_of):
        forward = jt.Forward.of(network())

        def loss(outputs, params, state, batch, ctx):
            direction = jax.random.normal(key_of(ctx), (3,))
            value = ctx.mean(jnp.square(outputs[forward]["features"] @ direction))
            return value.value, state, {"projected": value}

        return jt.Objective("projected", (forward,), loss)

    def after(objective, **place):
        state = jt.init(objective, optax.sgd(0.1), KEY, a_batch())
        state, metrics = jt.train_step(objective, optax.sgd(0.1), **place)(state, a_batch())
        return [float(metrics["loss"]), np.asarray(state.params["net"]["w"])]

    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    shared = projected(lambda ctx: ctx.shared_key("direction"))
    one, spread = after(shared), after(shared, mesh=mesh, mode="pmap")
    assert spread[0] == pytest.approx(one[0], rel=1e-5)
    np.testing.assert_allclose(spread[1], one[1], rtol=1e-5, atol=1e-6)
    apart = after(projected(lambda ctx: ctx.draw_key("direction")), mesh=mesh, mode="pmap")
    assert apart[0] != pytest.approx(one[0], rel=1e-3)  # what the other key is for: rows


def test_shared_keys_are_by_name_step_and_run():
    at = lambda name, step=0, key=KEY: jax.random.key_data(jt.Context(step, key).shared_key(name)).tolist()  # noqa: E731
    assert at("a") == at("a")
    assert len({str(key) for key in (at("a"), at("b"), at("a", 1), at("a", key=jax.random.key(7)))}) == 4
    assert jt.Context().shared_key("a") is None
