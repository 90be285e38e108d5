"""The rules inside of `balance`: what they cost, what they report, and that devices make no difference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_balance import KEY, SHARED, a_batch, by_hand, gradient_of, tasks_of, two_headed, updated

import jaxtransfer as jt
from jaxtransfer import multitask
from jaxtransfer.context import named_key
from jaxtransfer.parts.mixing import FEW, PIECE, gram_of

ALL = {
    name: getattr(multitask, name)
    for name in multitask.__all__
    if name not in ("averages", "balance", "masked", "of_values", "remembers")
}
PLACED = ["cagrad", *sorted(ALL.keys() - {"cagrad", "equal", "mgda", "pcgrad", "uncertainty"})]  # those: elsewhere


def at_once(rule):
    """The rule, without waiting for what it has windows and warm-ups for."""
    settings = {"dwa": {"every": 1}, "stch": {"warmup": 1}}
    return functools.partial(rule, **settings.get(rule.__name__, {}))


@pytest.mark.parametrize(
    "name", [name if name == "cagrad" else pytest.param(name, marks=pytest.mark.slow) for name in PLACED]
)
def test_a_rule_trains_alike_on_any_devices(name, mesh_of):
    objective = jt.balance(tasks_of(two_headed()), at_once(ALL[name]), shared=SHARED, cosines=True)
    batches, ended = [a_batch(seed) for seed in range(3)], []
    for place in ({}, {"mesh": mesh_of(4)}, {"mesh": mesh_of(4), "mode": "pmap"}):
        _, params, state, metrics = updated(objective, batches, optax.sgd(0.1), **place)
        ended.append(jt.tree.leaves_by_path(jax.tree.map(np.array, (params, state.state, dict(metrics)))))
    cosine = ended[0]["2/balance/cosine/left/classification/right/classification"]
    assert -1 <= cosine <= 1
    assert cosine != 0
    for other in ended[1:]:
        for path, leaf in ended[0].items():
            np.testing.assert_allclose(other[path], leaf, rtol=1e-5, atol=1e-5, err_msg=path)


@pytest.mark.slow
def test_cosines_tell_who_fights():
    batch = a_batch()
    for rule in (multitask.mgda, multitask.geometric):
        objective = jt.balance(tasks_of(two_headed()), rule, shared=SHARED, cosines=True, name="b")
        before, _, _, metrics = updated(objective, [batch])
        _, shared, _ = by_hand(before, batch)
        rows = shared.reshape(3, -1) / np.linalg.norm(shared.reshape(3, -1), axis=1, keepdims=True)
        names = ("left/classification", "right/classification", "l2")
        for one, other in ((0, 1), (0, 2), (1, 2)):
            got = float(metrics[f"b/cosine/{names[one]}/{names[other]}"])
            assert got == pytest.approx(rows[one] @ rows[other], abs=1e-5)
    assert not any("cosine" in metric for metric in updated(jt.balance(tasks_of(two_headed()), rule), [batch])[3])


def test_a_rule_of_values_weighs_what_is_shared():
    batch = a_batch()
    for shared in (SHARED, ".*"):
        objective = jt.balance(tasks_of(two_headed()), multitask.geometric, shared=shared) + jt.l2().named("more")
        params, (_, gradient) = gradient_of(objective, batch)
        values, by_task, heads = by_hand(params, batch)
        weights = np.prod(values) ** (1 / 3) / values / 3
        more = params["net"]
        np.testing.assert_allclose(gradient["net"]["body"], np.tensordot(weights, by_task, 1) + more["body"], atol=1e-5)
        for number, name in enumerate(("left", "right")):
            want = heads[name] * (weights[number] if shared == ".*" else 1)
            np.testing.assert_allclose(gradient["net"][name], want + more[name], atol=1e-5)
    with pytest.raises(jt.InputError, match="shared: the pattern 'bdoy'"):
        gradient_of(jt.balance(tasks_of(two_headed()), multitask.equal, shared="bdoy"), batch)


def test_graddrop_mixes_entries():
    batch, net = a_batch(), two_headed()
    objective = jt.balance(tasks_of(net), multitask.graddrop, shared=SHARED)
    params, state = objective.init(KEY, batch)
    ctx = jt.Context(key=KEY)
    gradient = jax.jit(jax.grad(lambda p: objective(p, state, batch, ctx)[0]))(params)
    _, shared, heads = by_hand(params, batch)
    shared_key = ctx.shared_key("balance")
    assert shared_key is not None
    drawn = named_key(shared_key, "net/body")
    mix, _ = multitask.graddrop(jnp.zeros((3, 3)), jnp.zeros(3), None, {})
    np.testing.assert_allclose(gradient["net"]["body"], mix(jnp.float32(shared), drawn), atol=1e-5)
    np.testing.assert_allclose(gradient["net"]["left"], heads["left"], atol=1e-5)


def flops(objective, batch):
    params, state = objective.init(KEY, batch)

    def gradient(params, batch):
        return jax.grad(lambda p: objective(p, state, batch, jt.Context(key=KEY))[0])(params)

    return jax.jit(gradient).lower(params, batch).compile().cost_analysis()["flops"]  # pyright: ignore[reportOptionalSubscript]


@pytest.mark.slow
@pytest.mark.optimised
def test_rules_of_values_cost_one_pass_backwards():
    net, batch = (
        two_headed(),
        {
            name: jax.tree.map(lambda x: np.tile(x, (64,) + (1,) * (x.ndim - 1)), part)
            for name, part in a_batch().items()
        },
    )
    plain = flops(tasks_of(net), batch)
    assert flops(jt.balance(tasks_of(net), multitask.equal, shared=SHARED), batch) <= 1.02 * plain
    assert (
        flops(jt.balance(tasks_of(net), multitask.famo), batch) <= 1.1 * plain
    )  # of so small a net weights are a part
    assert flops(jt.balance(tasks_of(net), multitask.mgda), batch) > 1.15 * plain


def test_low_precision_gradients_have_a_gram_matrix_of_full_precision():
    """Products of bfloat16 gradients are summed in float32: 1 + 1/256, squared, isn't rounded to 8 bits."""
    for tasks in (FEW, FEW + 1):  # pair by pair, and in more than one piece
        rows = np.random.default_rng(0).normal(size=(tasks, 2 * PIECE + 5))
        trees = [{"w": jnp.asarray(row, jnp.bfloat16)} for row in rows]
        gram = jax.jit(gram_of)(trees)
        assert gram.dtype == jnp.float32
        kept = np.stack([np.asarray(one["w"], float) for one in trees])
        np.testing.assert_allclose(gram, kept @ kept.T, rtol=1e-5, atol=0.1)


def test_a_large_parameter_has_few_pieces(monkeypatch):
    monkeypatch.setattr("jaxtransfer.parts.mixing.MOST", 3)
    rows = np.random.default_rng(0).normal(size=(FEW + 1, 4 * PIECE + 5))  # in threes each piece is above PIECE
    gram = gram_of([{"w": jnp.asarray(row, jnp.float32)} for row in rows])
    np.testing.assert_allclose(gram, rows @ rows.T, rtol=1e-5, atol=0.01)


def test_training_in_bfloat16():
    rng = np.random.default_rng(1)
    encoder = jt.models.mlp(4, hidden=(16,), dtype=jnp.bfloat16)
    heads = {name: jt.models.head(4, batch_norm=False) for name in ("left", "right")}
    net = jt.models.with_heads(encoder, **heads)
    batch = {
        "image": np.float32(rng.normal(size=(8, 6))),
        "left": rng.integers(0, 4, 8),
        "right": rng.integers(0, 4, 8),
    }
    tasks = [jt.classification(net, output=name, label=name).named(name) for name in heads]
    seen = []

    def watched(gram, values, key, state):
        seen.append((gram.dtype, values.dtype))
        return multitask.cagrad(gram, values, key, state)

    objective = jt.balance(tasks, watched, shared="model/encoder")
    _, (_, gradient) = gradient_of(objective, batch)
    assert {jnp.dtype(jnp.float32)} == {one for pair in seen for one in pair}
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_uncertainty_learns_its_weights():
    """Σ_t e^(−s_t) L_t + s_t, value and gradient; at the least s_t = log L_t."""
    batch, net = a_batch(), two_headed()
    left, right = (jt.classification(net, output=name).on(name) for name in ("left", "right"))
    decay = 0.3 * jt.l2(only=SHARED)
    objective = multitask.uncertainty([2 * left + decay, right], name="own", start=0.5)
    params, state = objective.init(KEY, batch)
    np.testing.assert_array_equal(params["own"]["log_variance"], [0.5, 0.5])
    params["own"]["log_variance"] = jnp.asarray([0.3, -0.2])

    def loss(p):
        value, _, metrics = objective(p, state, batch, jt.Context(key=KEY))
        return value, metrics

    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    values, shared, heads = by_hand(params, batch)
    first, second = 2 * values[0] + values[2], values[1]
    weights = np.exp([-0.3, 0.2])
    assert float(value) == pytest.approx(weights @ [first, second] + 0.1, rel=1e-5)
    np.testing.assert_allclose(
        gradient["own"]["log_variance"], [1 - weights[0] * first, 1 - weights[1] * second], rtol=1e-4
    )
    body = weights[0] * (2 * shared[0] + shared[2]) + weights[1] * shared[1]
    np.testing.assert_allclose(gradient["net"]["body"], body, atol=1e-5)
    np.testing.assert_allclose(gradient["net"]["right"], weights[1] * heads["right"], atol=1e-5)
    told = [float(metrics[f"own/{task}"].value) for task in ("left/classification+l2", "right/classification")]
    np.testing.assert_allclose(told, weights, rtol=1e-6)
    assert float(metrics["left/classification"].value) == pytest.approx(values[0], rel=1e-5)
    with pytest.raises(jt.InputError, match="balanced already"):
        multitask.uncertainty(jt.balance(left + right, multitask.equal))
