"""Deltas of weights: the base's function at the start, merged as run, references in NumPy, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.deltas.weight import weights_of

KEY = jax.random.key(2)
D = jt.deltas


def drawn(shapes, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return jt.tree.nested({path: rng.normal(size=shape).astype(dtype) for path, shape in shapes.items()})


LAYERS = {
    "dense/kernel": (6, 5),
    "dense/bias": (5,),
    "conv/kernel": (3, 2, 4, 5),
    "deep/kernel": (3, 3, 1, 6),
    "sound/kernel": (3, 4, 5),
    "sound/bias": (5,),
    "attention/query/kernel": (6, 2, 3),
    "attention/query/bias": (2, 3),
    "attention/key/kernel": (6, 2, 3),
    "attention/out/kernel": (2, 3, 6),
    "attention/out/bias": (6,),
    "words/embedding": (9, 6),
    "stem_positions": (7, 6),
    "stem_position": (1, 7, 6),
    "haiku/w": (6, 5),
    "layers/0/weight": (5, 6),
    "maps/weight": (5, 4, 3, 2),
    "maps/bias": (5, 1, 1),
    "embed/weight": (9, 6),
    "other": (2, 3, 4),
}
INPUTS = {
    "dense/kernel": (0,),
    "dense/bias": None,
    "conv/kernel": (2, 0, 1),
    "deep/kernel": (2, 0, 1),
    "sound/kernel": (1, 0),
    "attention/query/kernel": (0,),
    "attention/query/bias": None,
    "attention/key/kernel": (0,),
    "attention/out/kernel": (0, 1),
    "words/embedding": (0,),
    "stem_positions": (0,),
    "stem_position": (0, 1),
    "haiku/w": (0,),
    "layers/0/weight": (1,),
    "maps/weight": (1, 2, 3),
    "maps/bias": None,
    "embed/weight": (0,),
}


@pytest.mark.slow
def test_which_axes_are_inputs_is_known_for_every_layer_of_the_zoo():
    weights = weights_of(drawn(LAYERS))
    assert {path: D.input_axes(path, weights) for path in INPUTS} == INPUTS
    for name in ("vit-ti-4", "minilm-l6", "mobilenet-v2", "lenet", "conv4"):
        model, x = jt.models.create(name, 3), jt.models.ZOO[name].inputs(1)
        found = weights_of(jax.eval_shape(model.init, KEY, x)["params"])
        for path, weight in found.items():
            if len(weight.shape) > 1 and not path.endswith("token"):
                assert (D.input_axes(path, found) is None) == path.endswith("bias"), path


@pytest.mark.slow
def test_a_matrix_multiplies_as_its_layer_does():
    tree, rng = drawn(LAYERS), np.random.default_rng(1)
    weights = weights_of(tree)
    chosen = D.matrices(weights, [path for path, axes in INPUTS.items() if axes], None)
    x = rng.normal(size=(4, 6)).astype(np.float32)
    query = chosen["attention/query/kernel"]
    np.testing.assert_allclose(x @ query.matrix, np.einsum("bd,dhk->bhk", x, query.value).reshape(4, 6), rtol=1e-5)
    heads = rng.normal(size=(4, 2, 3)).astype(np.float32)
    out = chosen["attention/out/kernel"]
    np.testing.assert_allclose(
        heads.reshape(4, 6) @ out.matrix, np.einsum("bhk,hkd->bd", heads, out.value), rtol=1e-4, atol=1e-6
    )
    conv = chosen["conv/kernel"]
    patch = rng.normal(size=(4, 3, 2)).astype(np.float32)  # channels, then rows and columns, as PyTorch unfolds
    np.testing.assert_allclose(
        patch.reshape(1, -1) @ conv.matrix, np.einsum("chw,hwco->o", patch, conv.value)[None], rtol=1e-4, atol=1e-5
    )
    for path, weight in chosen.items():
        assert weight.matrix.shape == (weight.rows, weight.columns)
        np.testing.assert_array_equal(weight.shaped(weight.matrix), weight.value, err_msg=path)
        by_output = jnp.arange(weight.columns, dtype=jnp.float32) + 1
        np.testing.assert_array_equal(
            weight.value * weight.beside(by_output), weight.shaped(weight.matrix * by_output[None]), err_msg=path
        )
        by_input = jnp.arange(weight.rows, dtype=jnp.float32) + 1
        np.testing.assert_array_equal(
            weight.value * weight.beside(by_input, of_inputs=True), weight.shaped(weight.matrix * by_input[:, None])
        )


def test_a_layer_that_is_not_known_is_told_and_can_be_named():
    weights = weights_of(drawn(LAYERS))
    with pytest.raises(jt.InputError, match=r"which axes of 'other' \[2, 3, 4\] are inputs can't be told: name them"):
        D.lora(1).on("other").chosen(weights)
    named = D.lora(1).on("other", as_matrix={"other": (2, 0)}).chosen(weights)["other"]
    assert (named.rows, named.columns) == (8, 3)
    np.testing.assert_array_equal(named.matrix, np.transpose(named.value, (2, 0, 1)).reshape(8, 3))
    for axes in ((), (0, 0), (0, 1, 2), (3,)):
        with pytest.raises(jt.InputError, match="the input axes of 'other'"):
            D.lora(1).on("other", as_matrix={"other": axes}).chosen(weights)
    with pytest.raises(jt.InputError, match="as_matrix: the pattern 'nowhere' selects no parameter"):
        D.lora(1).on("other", as_matrix={"nowhere": (0,)}).chosen(weights)


BASE = {"a/kernel": (6, 5), "a/bias": (5,), "c/kernel": (3, 3, 2, 4), "head/kernel": (5, 3), "head/bias": (3,)}
PARTS = {
    "lora": lambda: D.lora(2, alpha=3.0),
    "lora gaussian": lambda: D.lora(2, start=D.gaussian, rank_stabilized=True),
    "pissa": lambda: D.lora(2, start=D.pissa, alpha=4.0),
    "olora": lambda: D.lora(3, start=D.olora, alpha=1.5),
    "dora": lambda: D.dora(2, alpha=5.0),
    "full": lambda: D.full(),
    "dora over dora": lambda: D.chain(one=D.dora(2), two=D.dora(3)),
    "any": lambda: D.chain(
        one=D.dora(1), two=D.lora(2, start=D.pissa), three=D.full().on("head"), four=D.chain(five=D.dora(2).on("c"))
    ),
}
LOOSE = {"dora", "dora over dora", "any"}  # a norm divided by a norm


def moved(params, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32), params)


@pytest.mark.parametrize("name", PARTS)
def test_at_the_start_it_is_the_base_and_then_it_is_not(name):
    part, base = PARTS[name](), drawn(BASE)
    weights = weights_of(base)

    @jax.jit
    def both(key):
        own, fixed = part.fresh(key, weights), part.constants(weights)
        after = {path: weight.held for path, weight in part.merged(weights, own, fixed).items()}
        return own, after

    own, after = both(KEY)
    for path, leaf in jt.tree.leaves_by_path(base).items():
        if name in LOOSE:
            np.testing.assert_allclose(after[path], leaf, rtol=3e-6, err_msg=path)
        else:
            np.testing.assert_array_equal(after[path], leaf, err_msg=path)
    later = part.merged(weights, moved(own), part.constants(weights))
    changed = {path for path in BASE if np.abs(later[path].held - weights[path].value).max() > 0.05}
    assert changed == (set(BASE) if name == "full" else {p for p in BASE if "kernel" in p} | ({"head/bias"} & changed))
    again = jax.tree.map(np.array, both(jax.random.key(9))[0])
    drew = any(np.abs(a - b).max() > 0 for a, b in zip(*map(jax.tree.leaves, (own, again)), strict=True))
    assert drew == (name not in ("pissa", "olora", "full"))


def as_numpy(weight):
    kernel = np.asarray(weight.value, np.float64)
    return kernel.transpose(2, 0, 1, 3).reshape(-1, kernel.shape[-1]) if kernel.ndim == 4 else kernel


@pytest.mark.slow
@pytest.mark.parametrize("path", ["a/kernel", "c/kernel"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_values_and_gradients_are_those_of_the_formulas(kind, path):
    make = {"lora": D.lora, "dora": D.dora}[kind]
    part = make(2, alpha=3.0, rank_stabilized=kind == "dora").on(path)
    weights = weights_of(drawn(BASE))
    own, direction = moved(part.fresh(KEY, weights)), np.random.default_rng(3).normal(size=BASE[path])

    def value(own):
        return jnp.sum(part.merged(weights, own, {})[path].held * direction.astype(np.float32))

    got = jt.tree.leaves_by_path(jax.grad(value)(own))
    a, b = (np.asarray(jt.tree.leaves_by_path(own)[f"{path}/{name}"], np.float64) for name in "ab")
    w, g = as_numpy(weights[path]), as_numpy(weights[path].named(direction))
    scale = 3 / 2 if kind == "lora" else 3 / np.sqrt(2)
    v = w + scale * a @ b
    expected = {}
    if kind == "dora":
        m, lengths = np.asarray(jt.tree.leaves_by_path(own)[f"{path}/m"], np.float64), np.linalg.norm(v, axis=0)
        expected["m"], total = (g * v / lengths).sum(0), (g * v * m / lengths).sum()
        g = g * m / lengths  # the length counts as a constant
    else:
        total = (g * v).sum()
    expected |= {"a": scale * g @ b.T, "b": scale * a.T @ g}
    assert float(value(own)) == pytest.approx(total, rel=1e-5)
    assert {p.rsplit("/", 1)[1] for p in got} == set(expected)
    for name, leaf in expected.items():
        np.testing.assert_allclose(got[f"{path}/{name}"], leaf, rtol=1e-5, atol=1e-5)


def test_starts_are_what_they_are_called():
    weights = weights_of(drawn(BASE))
    weight = D.lora(1).on("c").chosen(weights)["c/kernel"]
    matrix = np.asarray(weight.matrix, np.float64)
    a, b = D.pissa(KEY, weight, 2, 4.0)
    left, sizes, right = np.linalg.svd(matrix)
    np.testing.assert_allclose(4.0 * a @ b, (left[:, :2] * sizes[:2]) @ right[:2], rtol=1e-4, atol=1e-5)
    a, b = D.olora(KEY, weight, 3, 1.0)
    np.testing.assert_allclose(b @ b.T, np.eye(3), atol=1e-5)
    np.testing.assert_allclose((a @ b)[:3], matrix[:3], rtol=1e-4, atol=1e-5)  # the first inputs, whole
    seen = np.random.default_rng(0).normal(size=(50, 18)) * np.linspace(3, 0.1, 18)
    a, b = D.eva({"c/kernel": seen.T @ seen / 50})(KEY, weight, 2, 1.0)
    directions = np.linalg.svd(seen)[2][:2].reshape(2, *weight.shape[:3]).transpose(0, 3, 1, 2).reshape(2, 18)
    np.testing.assert_allclose(np.abs(directions @ a), np.eye(2), atol=1e-4)
    assert b is None
    a, _ = D.kaiming(KEY, weight, 4, 1.0)
    assert a.shape == (18, 4)
    assert 0.15 < np.abs(a).max() <= 18**-0.5
    with pytest.raises(jt.InputError, match="eva: no Gram matrix of what 'a/kernel' sees"):
        D.lora(1, start=D.eva({})).on("a").fresh(KEY, weights)
    with pytest.raises(jt.InputError, match=r"must be \[18, 18\]"):
        D.lora(1, start=D.eva({"c/kernel": np.eye(4)})).on("c").fresh(KEY, weights)


def test_a_delta_that_is_held_goes_on_below_a_new_one():
    weights, first = weights_of(drawn(BASE)), D.dora(2).on("a")
    trained = moved(first.fresh(KEY, weights))
    below = first.merged(weights, trained, {})
    for one, names in ((D.held(first, trained), {"task"}), (D.starting(first, trained), {"domain", "task"})):
        both = D.chain(domain=one, task=D.dora(2))
        own, fixed = both.fresh(KEY, weights), both.constants(weights)
        assert {p.split("/")[0] for p in jt.tree.leaves_by_path(own)} == names
        after = both.merged(weights, own, fixed)
        np.testing.assert_allclose(after["a/kernel"].held, below["a/kernel"].held, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(after["c/kernel"].held, weights["c/kernel"].value, rtol=1e-5, atol=1e-6)


def test_how_a_part_was_made_is_noted():
    stack = D.chain(low=D.lora(4, start=D.pissa).on("a", as_matrix={"a/kernel": (1,)}), head=D.full().on(["head", "c"]))
    assert D.described_part(stack) == {
        "kind": "chain",
        "parts": {
            "low": {
                "kind": "lora",
                "arguments": {"rank": 4, "alpha": None, "rank_stabilized": False, "start": "pissa"},
                "only": ["a"],
                "as_matrix": {"a/kernel": [1]},
            },
            "head": {"kind": "full", "arguments": {}, "only": ["head", "c"]},
        },
    }
    assert D.described_part(D.lora(2, start=D.eva({}))) is None
    assert D.described_part(D.chain(one=D.lora(2, start=lambda *_: (jnp.ones(1), None)))) is None
    later = D.described_part(D.lora(2, dropout=0.5))
    assert later == {
        "kind": "lora",
        "arguments": {"rank": 2, "alpha": None, "rank_stabilized": False, "start": "kaiming", "dropout": 0.5},
    }
    assert D.rebuild(later).drop is not None


def test_what_has_no_meaning_is_refused():
    weights = weights_of(drawn(BASE))
    cases = {
        "the rank of a delta must be a whole number, 1 or more; got 0": lambda: D.lora(0),
        "alpha must be positive and finite; got -1": lambda: D.dora(1, alpha=-1),
        "alpha must be positive and finite; got inf": lambda: D.lora(1, alpha=float("inf")),
        r"rank 4 is above that of 'head/kernel', a matrix 5 × 3 whose rank is 3": lambda: D.lora(4).fresh(KEY, weights),
        "only: the pattern 'nowhere' selects no parameter": lambda: D.lora(1).on("nowhere").chosen(weights),
        r"selects no kernel for this delta to change; it selects a/bias \[5\]": lambda: (
            D.lora(1).on("bias").chosen(weights)
        ),
        "a chain of deltas needs one part": lambda: D.chain(),
        "patterns are for the parts of a chain": lambda: D.chain(a=D.full()).on("head").chosen(weights),
        "the ratio of the rates must be positive": lambda: D.lora_plus(optax.sgd(1), ratio=0),
        "the ratio of the rates must be positive and finite": lambda: D.lora_plus(optax.sgd(1), ratio=float("inf")),
        "no parameter is b of a low-rank delta": lambda: D.lora_plus(optax.sgd(1)).init({"w": jnp.zeros(2)}),
    }
    for message, wrong in cases.items():
        with pytest.raises(jt.InputError, match=message):
            wrong()


def test_the_second_factor_learns_faster():
    params = {"net": {"kernel": {"a": jnp.ones((2, 1)), "b": jnp.zeros((1, 3))}, "b": jnp.ones(2)}}
    optimizer = D.lora_plus(optax.sgd(0.1), ratio=8.0)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    rates = jax.tree.map(lambda leaf: float(leaf.ravel()[0]), updates)
    assert rates == {"net": {"kernel": {"a": pytest.approx(-0.1), "b": pytest.approx(-0.8)}, "b": pytest.approx(-0.1)}}
