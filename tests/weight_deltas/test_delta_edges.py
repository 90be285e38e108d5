"""Deltas where layers have like names, convolutions have Gram matrices, and a batch names no delta."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtransfer as jt

KEY = jax.random.key(4)
D = jt.deltas


class Block(nn.Module):
    """A norm, called as its parent's."""

    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(use_running_average=not train)(x)


class Net(nn.Module):
    """Two norms, of which one's path ends in the other's."""

    @nn.compact
    def __call__(self, x, train=False):
        return Block()(nn.BatchNorm(use_running_average=not train)(x), train)


OUTER, INNER = "BatchNorm_0", "Block_0/BatchNorm_0"
NORMS = {
    "inner": (lambda: D.norm_tuning().on("Block_0"), {INNER}),
    "outer": (lambda: D.norm_tuning().on("^BatchNorm_0"), {OUTER}),
    "inner, as full": (lambda: D.full().on("Block_0/.*/scale"), {INNER}),
    "outer, below a name like a layer": (lambda: D.chain(Block_0=D.norm_tuning().on("^BatchNorm_0")), {OUTER}),
    "inner, below names": (lambda: D.chain(a=D.chain(BatchNorm_0=D.ssf().on("Block_0"))), {INNER}),
    "both, one of them held": (
        lambda: D.weighted({"x": D.norm_tuning().on("Block_0"), "y": D.held(D.full(), PARAMS)}, learned=True),
        {INNER},
    ),
}
X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
MODEL = jt.models.linen(Net())
BASE = MODEL.init(KEY, X)
PARAMS = jax.tree.map(jnp.zeros_like, BASE["params"])


@pytest.mark.parametrize("name", NORMS)
def test_only_the_norm_that_a_delta_trains_follows_the_batches(name):
    make, expected = NORMS[name]
    net = D.delta(MODEL, BASE, make())
    _, state = net.apply(net.complete(net.init(KEY, X)), X, train=True, key=None)
    before = jt.tree.leaves_by_path(BASE["batch_stats"])
    moved = {
        path.rpartition("/")[0]
        for path, leaf in jt.tree.leaves_by_path(state["batch_stats"]).items()
        if np.abs(leaf - before[path]).max() > 0
    }
    assert moved == expected


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (2, 3)])
def test_eva_of_a_convolution_takes_the_directions_of_its_patches(rows, columns):
    """The delta's first factor, run as a convolution, gives the data's leading coordinates: no r others are larger."""
    model = jt.models.linen(nn.Conv(5, (rows, columns), padding="VALID", name=None))
    x = np.random.default_rng(1).normal(size=(8, 5, 5, 2)).astype(np.float32) * np.array([4, 0.1], np.float32)
    base = model.init(KEY, x)
    seen = jt.models.linear_inputs(model)
    grams = jt.fusion.gram_matrices(seen, base, [{"image": x}], {"kernel": "kernel"})
    net = D.delta(model, base, D.lora(2, start=D.eva(grams)))
    own = net.init(KEY, x)["params"]["kernel"]
    for direction in (0, 1):
        b = np.zeros((2, 5), np.float32)
        b[direction, 0] = 1
        one = {"params": {"kernel": {"a": own["a"], "b": b}}}
        change = D.merged(net, one)["params"]["kernel"] - base["params"]["kernel"]
        outputs = model.apply({"params": {"kernel": change, "bias": jnp.zeros(5)}}, x, train=False, key=None)[0]
        got = float(jnp.mean(jnp.square(outputs["logits"][..., 0])))
        assert got == pytest.approx(np.linalg.eigvalsh(grams["kernel"])[-1 - direction], rel=1e-4)


def test_a_batch_that_names_no_delta_is_not_run_by_the_base():
    model = jt.models.linen(nn.Dense(3))
    base = model.init(KEY, X)
    parts = {"one": D.lora(1), "two": D.full().on("bias")}
    net = D.choosing(model, base, parts)
    own = net.complete(net.init(KEY, {"inputs": X, "delta": np.zeros(6, np.int32)}))
    run = jax.jit(lambda which: net.apply(own, {"inputs": X, "delta": which}, train=False, key=None)[0]["logits"])
    for number, known in ((0, True), (1, True), (2, False), (-1, False)):
        assert np.all(np.isfinite(run(np.full(6, number, np.int32)))) == known
    for refused in (lambda: D.merged(net, own), lambda: D.l2_sp(net), lambda: D.unmerge(net, own, base)):
        with pytest.raises(jt.InputError, match="chooses among the deltas one, two with each batch"):
            refused()
    assert D.base_of(net) is base["params"]
    one = D.delta(model, base, parts["two"])
    merged = D.merged(one, {"params": own["params"]["two"]})
    np.testing.assert_array_equal(merged["params"]["bias"], base["params"]["bias"])


DROPPED = {
    "lora": lambda: D.lora(2, alpha=3, dropout=0.4),
    "dora": lambda: D.dora(2, alpha=3, dropout=0.4),
    "ada_lora": lambda: D.ada_lora(2, alpha=3, dropout=0.4),
}


@pytest.mark.parametrize("name", DROPPED)
def test_dropout_leaves_inputs_out_of_the_difference_in_training_alone(name):
    """A dense layer on unit vectors shows its kernel, row by row: each is the base's or has the difference / 0.6."""
    model, one = jt.models.linen(nn.Dense(3, use_bias=False)), np.eye(40, dtype=np.float32)
    base = model.init(KEY, one)
    net = D.delta(model, base, D.chain(held=D.held(DROPPED[name]().on("kernel"), drawn(name)), task=DROPPED[name]()))
    own = {"params": {"held": {}, "task": drawn(name, 8)}}

    def kernel(key, train=True, still=None):
        run = {} if still is None else {"still": still}
        return np.asarray(net.apply(net.complete(own), one, train=train, key=key, **run)[0]["logits"], np.float64)

    keys = jax.random.split(KEY, 2)
    seen, again, other = (kernel(key) for key in (keys[0], keys[0], keys[1]))
    np.testing.assert_array_equal(seen, again)
    assert np.abs(seen - other).max() > 0.01
    w = np.asarray(D.merged(D.delta(model, base, DROPPED[name]()), {"params": drawn(name)})["params"]["kernel"], float)
    a, b, e, m = (np.asarray(own["params"]["task"]["kernel"].get(n, 1), float) for n in "abem")
    difference = 1.5 * (a * e) @ b
    found = [seen if name != "dora" else unscaled(seen, w, difference / 0.6, m)]
    found += [other if name != "dora" else unscaled(other, w, difference / 0.6, m)]
    for rows in found:
        dropped = np.abs(rows - w).max(1) < 1e-5
        kept = np.abs(rows - w - difference / 0.6).max(1) < 1e-4
        assert np.all(dropped ^ kept)
        assert 6 <= dropped.sum() <= 26  # of 40, 16 expected
    flags = jax.tree.map(lambda _: True, own["params"])
    whole = kernel(None, train=False)
    np.testing.assert_allclose(kernel(KEY, still=flags), whole, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(D.merged(net, own)["params"]["kernel"], whole, rtol=1e-6, atol=1e-6)
    with pytest.raises(jt.InputError, match="has dropout, which draws in training"):
        kernel(None)


def drawn(name, seed=7):
    rng = np.random.default_rng(seed)
    shapes = {"a": (40, 2), "b": (2, 3), **{"lora": {}, "dora": {"m": (3,)}, "ada_lora": {"e": (2,)}}[name]}
    return {"kernel": {n: np.abs(rng.normal(size=shape)).astype(np.float32) + 0.1 for n, shape in shapes.items()}}


def unscaled(rows, w, difference, m):
    """DoRA's direction, whose lengths follow from which rows are left out: a fixed point, tried row by row."""
    kept = np.ones(len(rows), bool)
    for _ in range(20):
        v = w + kept[:, None] * difference
        found = rows * np.linalg.norm(v, axis=0) / m
        now = np.abs(found - w).sum(1) > np.abs(found - w - difference).sum(1)
        if np.array_equal(now, kept):
            break
        kept = now
    return found


def test_what_a_chain_notes_is_all_that_it_needs():
    """A part that begins elsewhere changes what a start reads off the weights: that is no longer told by arguments."""
    moved = jax.tree.map(lambda w: w + 1, PARAMS)
    further = D.lora(1, start=D.pissa)
    begun = D.starting(D.full(), moved)
    assert D.described_part(begun) == D.described_part(D.full())
    assert D.described_part(D.chain(begun=begun, further=further)) is None
    assert D.described_part(D.chain(inner=D.chain(begun=begun), further=further)) is None
    assert D.described_part(D.chain(sum=D.weighted({"begun": begun}), further=further)) is None
    assert D.described_part(D.chain(further=further, begun=begun)) is not None
    assert D.described_part(D.chain(inner=D.chain(one=D.full()), further=further)) is not None


def test_arguments_of_another_kind_are_told_in_a_line():
    model = jt.models.linen(nn.Dense(3))
    base = model.init(KEY, X)
    two = D.delta(model, base, D.lora(2)).init(KEY, X)["params"]
    full = D.full()
    cases = {
        "the rank of a delta must be a whole number, 1 or more; got 1.5": lambda: D.lora(1.5),
        "the rank of a delta must be a whole number, 1 or more; got '8'": lambda: D.dora("8"),
        "the rank of a delta must be a whole number, 1 or more; got True": lambda: D.vera(True),
        "oft: the width of its blocks must be a whole number, 2 or more; got 1": lambda: D.oft(1),
        "dropout must be a number from 0 to below 1; got 1": lambda: D.lora(1, dropout=1),
        "dropout must be a number from 0 to below 1; got -0.1": lambda: D.dora(1, dropout=-0.1),
        "boft: the number of its factors must be a whole number": lambda: D.boft(2, factors=0),
        r"delta\(model, base, part\) takes parts, such as jt.deltas.lora\(8\); 'part' is a function": lambda: D.delta(
            model, base, D.lora
        ),
        "a chain takes parts, .* 'a' is a int": lambda: D.chain(a=3),
        "weighted takes parts, .* 'b' is a dict": lambda: D.weighted({"a": full, "b": {}}),
        "starting takes parts": lambda: D.starting(two, D.lora(2)),
        "held takes parts": lambda: D.held(two, D.lora(2)),
        "a delta is of a jt.Model and its weights; got a Dense": lambda: D.delta(nn.Dense(3), base, full),
        r"held: the parameters are not those of this delta on this base .*kernel/a: expected \(4, 1\), got \(4, 2\)": (
            lambda: D.delta(model, base, D.held(D.lora(1), two))
        ),
        r"starting: the parameters are not those .*- kernel/a \(4, 2\)": lambda: D.delta(
            model, base, D.chain(one=D.starting(D.lora(2), {}))
        ),
        r"must be 2 integers from 0 to 11, each once; got \[0, 12\]": lambda: D.delta(
            model, base, D.fourier_ft(2, places=lambda o, i: [0, o * i])
        ),
        r"must be 2 integers .* got \[3, 3\]": lambda: D.delta(
            model, base, D.fourier_ft(2, places=lambda o, i: [3, 3])
        ),
        r"must be 2 integers .* got \[3\]": lambda: D.delta(model, base, D.fourier_ft(2, places=lambda o, i: [3])),
        r"a digest is of variables .* got \['bias', 'kernel'\]": lambda: D.digest(base["params"]),
        "expected the variables of model 'model'": lambda: D.unmerge(D.delta(model, base, full), base, 3),
        "the base's weights must be arrays; 'kernel' is an Int8. .* jt.deltas.plain": lambda: jt.models.side_tuning(
            model, D.quantize(base), model
        ),
        "pruned takes parameters with gates": lambda: D.pruned({"experts": {"gate": X}}, 0.5),
    }
    for message, wrong in cases.items():
        with pytest.raises(jt.InputError, match=message) as error:
            wrong()
        assert "\n" not in str(error.value)


def test_a_twin_is_merged_and_what_is_made_of_a_delta_is_not():
    model = jt.models.mlp(3, hidden=(4,))
    base = model.init(KEY, X)
    net = D.delta(model, base, D.full().on("head"))
    own = jax.tree.map(lambda leaf: leaf + 1, net.init(KEY, X))
    state = jt.TrainState(jnp.zeros((), int), KEY, {"model": own["params"], "twin": {}}, {}, ())
    merged = D.merged(net.twin("twin"), state)
    np.testing.assert_array_equal(merged["params"]["head"]["bias"], base["params"]["head"]["bias"] + 1)
    heads = jt.models.with_heads(net, projection=jt.models.head(4, 2))
    variables = heads.init(KEY, X)
    adapted = jt.models.side_tuning(net, own, model)
    for wrong in (heads, adapted):
        with pytest.raises(jt.InputError, match=r"is made of a delta and is none itself|is no delta"):
            D.merged(wrong, variables)
    D.merged(net, jt.models.encoder_of(variables))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_what_was_merged_in_any_type_gives_the_base_to_the_bit(dtype):
    rng = np.random.default_rng(2)
    params = {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)}
    params = {name: leaf.astype(np.float32) for name, leaf in params.items()}
    net = D.delta(jt.models.linen(nn.Dense(3)), {"params": params}, D.full().on("kernel"))
    moved = {"params": {"kernel": np.full((4, 3), 0.3, np.float32)}}
    whole = D.merged(net, moved, dtype=dtype)
    assert {name: leaf.dtype for name, leaf in whole["params"].items()} == {"kernel": dtype, "bias": jnp.float32}
    for given in (whole, jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(dtype), whole)):
        found = D.unmerge(net, moved, given)["params"]
        for name, leaf in params.items():
            np.testing.assert_array_equal(found[name], leaf)
            assert found[name].dtype == jnp.float32
    trained = D.unmerge(net, moved, jax.tree.map(lambda leaf: leaf + 1, whole))["params"]["kernel"]
    np.testing.assert_allclose(trained, params["kernel"] + 1, atol=4 * float(jnp.finfo(dtype).eps))
    with pytest.raises(jt.InputError, match=r"merged weights are of a floating-point type.*got int8"):
        D.merged(net, moved, dtype=jnp.int8)
