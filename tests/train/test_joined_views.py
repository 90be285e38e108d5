"""Joined views: one run of a model on several entries of the batch, of as many rows each or not."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt

KEY = jax.random.key(3)
SIZES = {"two to one": (8, 4), "three": (12, 4, 8), "coprime": (3, 2), "alike": (4, 4), "one and none alike": (2, 2, 6)}


def forward_of(*sizes):
    return jt.Forward.of(MODEL, [f"{name}/x" for name, _ in zip("abc", sizes, strict=False)])


def normalised():
    """A perceptron with batch norm; its output tells the mean that it normalised by."""

    def init(key, x):
        return {"params": {"w": jax.random.normal(key, (x.shape[1], 3))}, "stats": {"mean": jnp.zeros(x.shape[1])}}

    def apply(variables, x, *, train, key, axis=None):
        mean = variables["stats"]["mean"]
        if train:
            mean = x.mean(0) if axis is None else jax.lax.pmean(x.mean(0), axis)
        z = jnp.tanh((x - mean[None]) @ variables["params"]["w"])
        return {"logits": z}, {"stats": {"mean": mean}}

    return jt.Model(init, apply)


MODEL = normalised()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_what_is_joined_splits_again(rng, sizes):
    forward = forward_of(*sizes)
    views = [{"x": rng.normal(size=(size, 2)), "n": np.arange(size) + 100 * which} for which, size in enumerate(sizes)]
    joined = forward.join(views)
    assert joined["x"].shape == (sum(sizes), 2)
    groups, order = int(np.gcd.reduce(sizes)), []
    for group in range(groups):  # by hand: of each group first the rows of the first view, and so on
        for which, size in enumerate(sizes):
            order += [100 * which + group * size // groups + row for row in range(size // groups)]
    assert joined["n"].tolist() == order
    for view, again in zip(views, forward.split(joined, views), strict=True):
        np.testing.assert_array_equal(again["n"], view["n"])
        np.testing.assert_array_equal(again["x"], np.float32(view["x"]))


def test_views_of_one_size_join_as_they_did(rng):
    """Views of one example stand together: the programs of runs that go on are the same ones."""
    forward, views = forward_of(4, 4), [rng.normal(size=(4, 2)), rng.normal(size=(4, 2))]

    def before(one, other):
        apart = jnp.stack([one, other], 1).reshape(-1, 2).reshape(-1, 2, 2)
        return apart[:, 0], apart[:, 1]

    program = jax.make_jaxpr(lambda *views: forward.split(forward.join(views), views))(*views)
    assert str(program) == str(jax.make_jaxpr(before)(*views))
    np.testing.assert_array_equal(forward.join(views)[1], np.float32(views[1][0]))


def test_no_row_changes_its_device(mesh_of):
    split = jax.sharding.NamedSharding(mesh_of(4), jax.sharding.PartitionSpec("data"))
    forward, views = forward_of(8, 4), [jax.ShapeDtypeStruct((size, 2), np.float32, sharding=split) for size in (8, 4)]

    def there_and_back(*views):
        joined = forward.join(views)
        return joined, forward.split(2 * joined, views)

    program = jax.jit(there_and_back, out_shardings=split).lower(*views).compile().as_text()
    moves = ("all-gather", "all-to-all", "collective-permute", "all-reduce")
    assert not [move for move in moves if move in program]
    backwards = jax.jit(lambda *views: jnp.concatenate(views), out_shardings=split)
    assert any(move in backwards.lower(*views).compile().as_text() for move in moves)  # the search can tell


def two_domains(forward):
    """The mean square of source outputs and the mean absolute value of target outputs."""

    def loss(outputs, params, state, batch, ctx):
        source, target = outputs[forward]
        one = ctx.mean(jnp.sum(jnp.square(source["logits"] - 0.3), axis=1), batch["a"]["mask"])
        other = ctx.mean(jnp.sum(jnp.abs(target["logits"] + 0.1), axis=1))
        return one.value + other.value, state, {"source": one, "target": other}

    return jt.Objective("", (forward,), loss)


@pytest.mark.slow
def test_unequal_views_are_one_run_wherever_they_run(rng, mesh_of):
    objective, optimizer = two_domains(forward_of(8, 4)), optax.sgd(0.1)
    batch = {
        "a": {"x": rng.normal(size=(8, 5)) + 2, "mask": rng.integers(0, 2, 8)},
        "b": {"x": rng.normal(size=(4, 5))},
    }
    batch = jax.tree.map(np.float32, batch)
    start = jt.init(objective, optimizer, KEY, batch)
    w, mean = np.float64(start.params["model"]["w"]), np.concatenate([batch["a"]["x"], batch["b"]["x"]]).mean(0)
    source, target = (np.tanh((batch[name]["x"] - mean) @ w) for name in "ab")
    want = {
        "source": np.average(((source - 0.3) ** 2).sum(1), weights=batch["a"]["mask"]),
        "target": np.abs(target + 0.1).sum(1).mean(),
    }
    found = []
    for place in ({}, {"mesh": mesh_of(4)}, {"mesh": mesh_of(4), "mode": "pmap"}):
        state, metrics = jt.train_step(objective, optimizer, **place)(jt.init(objective, optimizer, KEY, batch), batch)
        for name, value in want.items():
            assert float(metrics[name]) == pytest.approx(value, rel=1e-5)
        np.testing.assert_allclose(state.state["model"]["stats"]["mean"], mean, rtol=1e-5)
        found.append(np.asarray(state.params["model"]["w"]))
    assert np.abs(found[0] - w).max() > 1e-2
    for one, other in itertools.pairwise(found):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_views_that_no_batch_can_hold_are_refused(rng):
    forward = jt.Forward.of(MODEL, ["a/x", "b/x"])
    with pytest.raises(jt.InputError, match=r"\(5,\) a row of 'a/x' and float\d+ \(4,\) of 'b/x'"):
        forward.join([np.zeros((8, 5)), np.zeros((4, 4))])
    for rows in (8, 4):  # which a model that divides bytes by 255 would see as 0 to 255
        with pytest.raises(jt.InputError, match=r"uint8 \(5,\) a row of 'a/x' and float32 \(5,\) of 'b/x'"):
            forward.join([np.zeros((8, 5), np.uint8), np.zeros((rows, 5), np.float32)])
    with pytest.raises(jt.InputError, match="nothing of 'b/x/mask'"):
        forward.join([{"tokens": np.zeros((8, 5)), "mask": np.zeros((8, 5))}, {"tokens": np.zeros((4, 5))}])
    with pytest.raises(jt.InputError, match="reads batch\\['b/x'\\], but the batch has \\['y'\\]"):
        jt.init(two_domains(forward), optax.sgd(0.1), KEY, {"a": {"x": np.zeros((4, 5))}, "b": {"y": np.zeros((4, 5))}})
