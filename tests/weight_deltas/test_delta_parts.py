"""Each kind of delta against its formula in NumPy, values and gradients, on layers of all forms."""

import json
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.deltas.weight import weights_of

KEY = jax.random.key(2)
D = jt.deltas
SHAPES = {
    "dense/kernel": (6, 8),
    "dense/bias": (8,),
    "conv/kernel": (3, 1, 4, 6),
    "norm/scale": (6,),
    "norm/bias": (6,),
    "query/kernel": (6, 2, 4),
    "query/bias": (2, 4),
    "out/kernel": (2, 4, 6),
    "out/bias": (6,),
}
KERNELS = [path for path in SHAPES if path.endswith("kernel")]
ROWS = {"dense": 6, "conv": 12, "query": 6, "out": 8}


def base_of(dtype: type = np.float32):
    rng = np.random.default_rng(0)
    return jt.tree.nested({path: rng.normal(size=shape).astype(dtype) for path, shape in SHAPES.items()})


def matrix_of(path, w):
    """As PyTorch flattens it, transposed: inputs of a convolution by channel, then by place."""
    if path.startswith("conv"):
        return w.transpose(2, 0, 1, 3).reshape(12, 6)
    return w.reshape(ROWS[path.split("/")[0]], -1)


def kernel_of(path, m):
    return m.reshape(4, 3, 1, 6).transpose(1, 2, 0, 3) if path.startswith("conv") else m.reshape(SHAPES[path])


def low_rank(m, own):
    return m + 1.5 * own["a"] @ (own["e"][:, None] * own["b"] if "e" in own else own["b"])


def vera(m, own, shared):
    a, b = shared
    return m + np.einsum("ir,r,ro,o->io", a[: m.shape[0]], own["d"], b[:, : m.shape[1]], own["b"])


def product(own, number):
    a, b = own[f"a{number}"], own[f"b{number}"]
    if f"t{number}" not in own:
        return a @ b
    core = own[f"t{number}"]
    out = np.zeros((len(a) * core.shape[2], b.shape[1]))
    for c in range(len(a)):
        for place in range(core.shape[2]):
            out[c * core.shape[2] + place] = (a[c] @ core[:, :, place].T) @ b
    return out


def hadamard(m, own):
    return m + 1.5 * product(own, 1) * product(own, 2)


def kronecker(m, own):
    one = own["w1"] if "w1" in own else own["a1"] @ own["b1"]
    two = own["w2"] if "w2" in own else product(own, 2)
    (i1, o1), (i2, o2) = one.shape, two.shape
    assert (i1 * i2, o1 * o2) == m.shape
    out = m.copy()
    for i in range(m.shape[0]):
        for o in range(m.shape[1]):
            out[i, o] += 1.5 * one[i // i2, o // o2] * two[i % i2, o % o2]
    return out


def fourier(m, own):
    rows, columns = m.shape
    out = m.copy()
    for place, value in zip(places(columns, rows), own["spectrum"], strict=True):
        p, q = place // rows, place % rows
        waves = np.cos(2 * np.pi * (p * np.arange(columns)[None] / columns + q * np.arange(rows)[:, None] / rows))
        out += 30 * value * waves / (rows * columns)
    return out


def places(outputs, inputs):
    return np.array([0, 3, inputs + 1, outputs * inputs - 1])


def rotation(skew):
    one = np.eye(len(skew))
    return (one - skew) @ np.linalg.inv(one + skew)


def blocks_of(own, block, terms=None):
    for row in own["skew"]:
        skew = np.zeros((block, block))
        skew[np.triu_indices(block, 1)] = row
        skew = skew - skew.T
        if terms is None:
            yield rotation(skew)
        else:
            powers = [np.linalg.matrix_power(skew, k) for k in range(terms)]
            yield powers[0] + 2 * sum(powers[1:-1]) + powers[-1]


def block_diagonal(blocks):
    size = len(blocks[0])
    out = np.zeros((size * len(blocks),) * 2)
    for number, one in enumerate(blocks):
        out[number * size : (number + 1) * size, number * size : (number + 1) * size] = one
    return out


def turned(m, own, terms=None):
    found = list(blocks_of(own, 2, terms))
    return block_diagonal(found * (m.shape[0] // 2 // len(found))) @ m


def butterfly(m, own):
    """Factor i meets, of 2^i blocks beside each other, halves that are 2^i apart: worked out place by place."""
    rows = len(m)
    for number, halves in enumerate(own["skew"]):
        size = halves.shape[1]
        wide, half = size * 2**number, size // 2
        position = {}
        for place in range(rows):
            start, inside = place // wide * wide, place % wide
            chunk, offset = inside // half, inside % half
            chunks = wide // half
            source = 2 * chunk if chunk < (chunks + 1) // 2 else 2 * (chunk - (chunks + 1) // 2) + 1
            position[place] = start + (source if number else chunk) * half + offset
        p = np.zeros((rows, rows))
        for place, source in position.items():
            p[place, source] = 1
        diagonal = block_diagonal([rotation((h - h.T) / 2) for h in halves])
        m = p @ diagonal @ p.T @ m
    return m * own["scale"]


def gated(w, own):
    gate = np.clip(3 / (1 + np.exp(-own["gate"])) - 1.5, 0, 1)
    return w + gate * own["delta"]


RNG = np.random.default_rng(9)
SHARED = (RNG.normal(size=(13, 3)), RNG.normal(size=(3, 9)))
OF_MATRICES = {
    "lora": (lambda: D.lora(2, alpha=3.0), low_rank),
    "ada_lora": (lambda: D.ada_lora(2, alpha=3.0), low_rank),
    "vera": (lambda: D.vera(3, shared=SHARED), lambda m, own: vera(m, own, SHARED)),
    "lo_ha": (lambda: D.lo_ha(2, alpha=3.0), hadamard),
    "lo_ha tucker": (lambda: D.lo_ha(2, alpha=3.0, tucker=True), hadamard),
    "lo_kr": (lambda: D.lo_kr(2, alpha=3.0), kronecker),
    "lo_kr tucker": (lambda: D.lo_kr(1, alpha=1.5, tucker=True), kronecker),
    "lo_kr whole": (lambda: D.lo_kr(4, alpha=6.0, factor=2), kronecker),
    "lo_kr both": (lambda: D.lo_kr(1, alpha=1.5, factor=3, both=True), kronecker),
    "fourier_ft": (lambda: D.fourier_ft(4, scale=30.0, places=places), fourier),
    "oft": (lambda: D.oft(2), turned),
    "oft shared": (lambda: D.oft(2, shared=True), turned),
    "oft series": (lambda: D.oft(2, terms=5), lambda m, own: turned(m, own, 5)),
    "boft": (lambda: D.boft(2), butterfly),
    "boft of several": (lambda: D.boft(2, factors=2).on("conv|out"), butterfly),
}


def moved(params, by=0.3, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(by * rng.normal(size=leaf.shape), leaf.dtype), params)


def at(tree, path):
    for key in path.split("/"):
        tree = tree[key]
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


@pytest.mark.parametrize("name", OF_MATRICES)
def test_values_and_gradients_are_those_of_the_formula(name, x64):
    make, formula = OF_MATRICES[name]
    part, base = make(), base_of(dtype=np.float64)
    weights = weights_of(base)
    chosen = list(part.chosen(weights))
    assert set(chosen) == {p for p in KERNELS if name != "boft of several" or p[:3] in ("con", "out")}
    direction = {path: np.random.default_rng(5).normal(size=SHAPES[path]) for path in chosen}

    @jax.jit
    def both(own):
        def value(own):
            after = part.merged(weights, own, part.constants(weights))
            arrays = {path: after[path].held for path in chosen}
            return sum(jnp.sum(arrays[path] * direction[path]) for path in chosen), arrays

        (_, arrays), gradient = jax.value_and_grad(value, has_aux=True)(own)
        return arrays, gradient

    own = moved(part.fresh(KEY, weights))
    got, gradient = both(own)

    def expected(own):
        return {p: kernel_of(p, formula(matrix_of(p, np.asarray(weights[p].held)), at(own, p))) for p in chosen}

    for path, leaf in expected(own).items():
        np.testing.assert_allclose(got[path], leaf, rtol=1e-9, atol=1e-9, err_msg=path)
        assert np.abs(leaf - np.asarray(weights[path].held)).max() > 1e-3
    for seed in (0, 1):
        line = moved(jax.tree.map(jnp.zeros_like, own), 1.0, seed + 20)
        ends = [
            sum(
                np.sum(leaf * direction[p])
                for p, leaf in expected(jax.tree.map(lambda w, d, s=s: w + s * 1e-5 * d, own, line)).items()
            )
            for s in (1, -1)
        ]
        slope = sum(float(jnp.vdot(g, d)) for g, d in zip(*map(jax.tree.leaves, (gradient, line)), strict=True))
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6, abs=1e-6)


OTHERS = {
    "ia3": lambda: D.ia3(feedforward="conv|out"),
    "ssf": lambda: D.ssf(),
    "bitfit": lambda: D.bitfit(),
    "norm_tuning": lambda: D.norm_tuning(),
    "diff_pruning": lambda: D.diff_pruning(initial=0.3),
}


def of_layers(name, base, own):
    """What the other kinds make of the base, parameter by parameter."""
    after = dict(base)
    if name in ("bitfit", "norm_tuning"):
        return {p: w + (at(own, p) if p in jt.tree.leaves_by_path(own) else 0) for p, w in base.items()}
    if name == "diff_pruning":
        return {p: gated(w, at(own, p)) for p, w in base.items()}
    for path in KERNELS if name == "ia3" else (*KERNELS, "norm/scale"):
        mine, w, bias = at(own, path), base[path], path.split("/")[0] + "/bias"
        if name == "ssf":
            after[path] = w * mine["scale"].reshape(SHAPES.get(bias, (6,)))
            if bias in base:
                after[bias] = base[bias] * mine["scale"].reshape(SHAPES[bias]) + mine["shift"].reshape(SHAPES[bias])
        elif path == "conv/kernel":
            after[path] = w * mine["factor"][None, None, :, None]
        elif path == "out/kernel":
            after[path] = w * mine["factor"].reshape(2, 4)[:, :, None]
        else:
            after[path] = w * mine["factor"].reshape(SHAPES[bias])
            after[bias] = base[bias] * mine["factor"].reshape(SHAPES[bias])
    return after


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_what_acts_on_layers_is_what_its_formula_says(name):
    part, base = OTHERS[name](), base_of()
    weights, flat = weights_of(base), jt.tree.leaves_by_path(base)
    own = moved(part.fresh(KEY, weights))
    got = part.merged(weights, own, part.constants(weights))
    expected = of_layers(name, flat, own)
    changed = {p for p in SHAPES if np.abs(np.asarray(got[p].held) - flat[p]).max() > 1e-3}
    for path, leaf in expected.items():
        np.testing.assert_allclose(got[path].held, leaf, rtol=1e-5, atol=1e-6, err_msg=path)
    assert (
        changed
        == {
            "ia3": {*KERNELS, "dense/bias", "query/bias"},
            "ssf": set(SHAPES),
            "bitfit": {p for p in SHAPES if p.endswith("bias")},
            "norm_tuning": {"norm/scale", "norm/bias"},
            "diff_pruning": set(SHAPES),
        }[name]
    )
    counts = {"ia3": 8 + 4 + 8 + 8, "ssf": 2 * (8 + 6 + 8 + 6) + 6, "bitfit": 28, "norm_tuning": 12}
    assert jt.tree.count(own) == counts.get(name, 2 * jt.tree.count(base))


def test_every_kind_begins_as_the_base_to_the_bit():
    base = base_of()
    weights = weights_of(base)
    makers = {**{name: make for name, (make, _) in OF_MATRICES.items()}, **OTHERS}
    makers |= {"vera": lambda: D.vera(3), "fourier_ft": lambda: D.fourier_ft(5)}

    @jax.jit
    def all_of_them(key):
        found = {}
        for name, make in makers.items():
            part = make()
            after = part.merged(weights, part.fresh(key, weights), part.constants(weights))
            found[name] = {path: weight.value for path, weight in after.items()}
        return found

    assert {make().description["kind"] for make in makers.values() if make().description} | {"dora", "full"} == set(
        D.PARTS
    )
    for name, after in all_of_them(KEY).items():
        for path, leaf in jt.tree.leaves_by_path(base).items():
            np.testing.assert_array_equal(after[path], leaf, err_msg=f"{name}: {path}")


@pytest.mark.slow
def test_a_part_is_made_again_from_what_it_noted():
    base = base_of()
    weights = weights_of(base)
    stack = {
        "low": D.lora(2, alpha=3, start=D.olora).on("query"),
        "both": D.weighted({"x": D.ia3(feedforward=("out",)), "y": D.oft(2).on("dense")}, [0.3, 0.6], learned=True),
        "named": D.lo_kr(1).on("conv", as_matrix={"conv/kernel": (0, 1, 2)}),
    }
    part = D.chain(**stack)
    again = D.rebuild(json.loads(json.dumps(D.described_part(part))))
    assert D.described_part(again) == D.described_part(part)
    own = moved(part.fresh(KEY, weights))
    one, two = (p.merged(weights, own, p.constants(weights)) for p in (part, again))
    for path in SHAPES:
        np.testing.assert_array_equal(one[path].held, two[path].held)
    with pytest.raises(jt.InputError, match=r"unknown delta 'lorra' \(did you mean 'lora'\?\)"):
        D.rebuild({"kind": "lorra", "arguments": {}})
    with pytest.raises(jt.InputError, match="unknown start 'pisa'"):
        D.rebuild({"kind": "lora", "arguments": {"rank": 1, "start": "pisa"}})
    with pytest.raises(jt.InputError, match=r"delta 'ia3'.*unexpected keyword"):
        D.rebuild({"kind": "ia3", "arguments": {"rank": 1}})


def test_weighted_deltas_add_up_and_a_batch_chooses_one():
    model = jt.models.linen(nn.Dense(3))
    x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    variables = model.init(KEY, x)
    parts = {"one": D.lora(2), "two": D.full().on("bias"), "three": D.dora(1)}
    net = D.choosing(model, variables, parts)

    def inputs(which):
        return {"inputs": x, "delta": which}

    own = dict(net.init(KEY, inputs(np.zeros(4, np.int32))))
    assert set(own["params"]) == set(parts)
    own["params"] = moved(own["params"])
    run = jax.jit(lambda which: net.apply(net.complete(own), inputs(which), train=False, key=None)[0]["logits"])
    singles = []
    for number, (name, part) in enumerate(parts.items()):
        alone = D.delta(model, variables, part)
        alone_out = alone.apply(alone.complete({"params": own["params"][name]}), x, train=False, key=None)[0]["logits"]
        np.testing.assert_allclose(run(np.full(4, number, np.int32)), alone_out, rtol=1e-5, atol=1e-6)
        singles.append(np.asarray(alone_out))
    alphas = np.array([0.5, -1.0, 2.0], np.float32)
    base = np.asarray(model.apply(variables, x, train=False, key=None)[0]["logits"])
    expected = base + sum(a * (one - base) for a, one in zip(alphas, singles, strict=True))
    np.testing.assert_allclose(run(np.tile(alphas, (4, 1))), expected, rtol=1e-4, atol=1e-5)
    mean = D.delta(model, variables, D.weighted(parts, alphas.tolist()))
    got = mean.apply(mean.complete({"params": own["params"]}), x, train=False, key=None)[0]["logits"]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    learned = D.delta(model, variables, D.weighted(parts, learned=True)).init(KEY, x)["params"]["weights"]
    np.testing.assert_allclose(learned, np.full(3, 1 / 3), rtol=1e-6)
    for message, wrong in {
        "a choice of deltas reads": lambda: net.init(KEY, x),
        r"integers \[B\] or weights \[B, 3\]": lambda: net.init(KEY, inputs(np.zeros((4, 2), np.float32))),
        "weighted takes parts by names": lambda: D.weighted({"weights": D.full()}),
        "a finite weight for each": lambda: D.weighted(parts, [1.0]),
        "a finite weight for each of": lambda: D.weighted(parts, [1.0, float("nan")]),
    }.items():
        with pytest.raises(jt.InputError, match=message):
            wrong()


def test_merged_deltas_are_trees_for_fusion():
    model = jt.models.linen(nn.Dense(6))
    x = np.ones((2, 8), np.float32)
    variables, net = model.init(KEY, x), None
    net = D.delta(model, variables, D.lora(2))
    runs = [{"params": moved(net.init(KEY, x)["params"], seed=seed)} for seed in (1, 2)]
    whole = [D.merged(net, run) for run in runs]
    w0, w1, w2 = (np.asarray(tree["params"]["kernel"], np.float64) for tree in (variables, *whole))
    fused = jt.fusion.knots(variables, whole, density=1.0, consensus=jt.fusion.weighted_sum)
    np.testing.assert_allclose(fused["params"]["kernel"], w1 + w2 - w0, rtol=1e-4, atol=1e-4)
    assert jt.tree.leaves_by_path(jt.fusion.ties(variables, whole)).keys() == jt.tree.leaves_by_path(variables).keys()


def test_the_penalty_is_on_what_the_delta_adds():
    model = jt.models.linen(nn.Dense(6))
    x = np.ones((2, 8), np.float32)
    variables = model.init(KEY, x)
    net = D.delta(model, variables, D.dora(2))
    own = moved(net.init(KEY, x)["params"])
    term = D.l2_sp(net, strength=3.0)
    value, _, metrics = term({"model": own}, {}, {"image": x}, jt.Context())
    gone = np.asarray(D.merged(net, {"params": own})["params"]["kernel"]) - np.asarray(variables["params"]["kernel"])
    assert float(value) == pytest.approx(1.5 * np.sum(gone**2), rel=1e-5)
    assert set(metrics) == {"l2_sp"}
    assert set(term.frozen) == set(net.handles)
    for strength in (-1, float("nan"), float("inf")):
        with pytest.raises(jt.InputError, match="strength must be finite and not negative"):
            D.l2_sp(net, strength=strength)


@pytest.mark.slow
def test_pruned_keeps_the_largest_and_the_gates_close():
    rng = np.random.default_rng(0)
    own = {
        "w": {"delta": rng.normal(size=(4, 5)).astype(np.float32), "gate": np.zeros((4, 5), np.float32)},
        "v": {"delta": rng.normal(size=10).astype(np.float32), "gate": np.full(10, 4, np.float32)},
    }
    sizes = np.concatenate([np.abs(own["w"]["delta"]).ravel() * 0, np.abs(own["v"]["delta"])])
    cut = D.pruned({"net": own}, 0.2)["net"]
    assert np.count_nonzero(cut["v"]["delta"]) + np.count_nonzero(cut["w"]["delta"]) >= 6
    kept = np.sort(np.abs(np.asarray(cut["v"]["delta"])))[::-1][:6]
    np.testing.assert_allclose(kept, np.sort(sizes)[::-1][:6])
    assert not np.any(D.pruned(own, 0.0)["v"]["delta"])
    value, _, _ = D.sparsity(strength=2.0)({"net": own}, {}, {}, jt.Context())
    assert float(value) == pytest.approx(2 * (20 * 0.5 + 10 / (1 + math.exp(-4))) / 30, rel=1e-5)
    for wrong in (lambda: D.pruned({"w": np.ones(2)}, 0.5), lambda: D.pruned(own, 1.5)):
        with pytest.raises(jt.InputError, match="takes parameters with gates and a density"):
            wrong()
    with pytest.raises(jt.InputError, match="nothing that trains has gates"):
        D.sparsity()({"w": jnp.ones(2)}, {}, {}, jt.Context())


def test_a_budget_keeps_the_important_directions():
    """Ten updates against the rule written out in NumPy."""
    rng = np.random.default_rng(0)
    shapes = {"a": (5, 3), "e": (3,), "b": (3, 4)}
    params: Any = {n: {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()} for n in ("x", "y")}
    params["bias"] = jnp.ones(3)
    optimizer = D.within_budget(
        optax.sgd(0.1), rank=1, steps=10, begin=2, settle=3, every=2, decay=0.5, decay_doubt=0.8
    )
    state = optimizer.init(params)
    step = jax.jit(lambda g, s, p: optimizer.update(g, s, p))
    mine = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    mean, doubt = (jax.tree.map(np.zeros_like, mine) for _ in range(2))
    left = []
    for t in range(1, 11):
        g = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape), jnp.float32), params)
        updates, state = step(g, state, params)
        params = optax.apply_updates(params, updates)
        mine = jax.tree.map(lambda w, g: w - 0.1 * np.asarray(g, np.float64), mine, g)
        if t < 7:
            now = jax.tree.map(lambda w, g: np.abs(w * np.asarray(g, np.float64)), mine, g)
            mean = jax.tree.map(lambda m, i: 0.5 * m + 0.5 * i, mean, now)
            doubt = jax.tree.map(lambda u, i, m: 0.8 * u + 0.2 * np.abs(i - m), doubt, now, mean)
        score = jax.tree.map(np.multiply, mean, doubt)
        triple = {n: score[n]["e"] + score[n]["a"].mean(0) + score[n]["b"].mean(1) for n in "xy"}
        budget = 6
        if t > 7:
            budget = 2
        elif t > 2 and t % 2 == 0:
            budget = int(4 * (1 - (t - 2) / 5) ** 3 + 2)
        order = np.sort(np.concatenate([triple["x"], triple["y"]]))
        for n in "xy":
            if budget < 6:
                mine[n]["e"] = np.where(triple[n] > order[5 - budget], mine[n]["e"], 0)
        left.append(sum(int(np.count_nonzero(params[n]["e"])) for n in "xy"))
        for a, b in zip(*map(jax.tree.leaves, (params, mine)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert left[:3] == [6, 6, 6]
    assert left[3] < 6
    assert left[-1] == 2


def test_what_budgets_and_directions_refuse():
    params = {"x": {"a": jnp.ones((2, 1)), "e": jnp.ones(1), "b": jnp.ones((1, 2))}}
    cases = {
        "the budget falls from begin": lambda: D.within_budget(optax.sgd(1), rank=1, steps=5, begin=3, settle=3),
        r"the decays must be in \(0, 1\)": lambda: D.within_budget(
            optax.sgd(1), rank=1, steps=9, begin=1, settle=1, decay=1.0
        ),
        "a mean rank of 2 is above": lambda: D.within_budget(optax.sgd(1), rank=2, steps=9, begin=1, settle=1).init(
            params
        ),
        "no parameter is an ada_lora's": lambda: D.within_budget(optax.sgd(1), rank=1, steps=9, begin=1, settle=1).init(
            {"w": jnp.ones(2)}
        ),
        "needs the parameters": lambda: D.within_budget(optax.sgd(1), rank=1, steps=9, begin=1, settle=1).update(
            params, D.within_budget(optax.sgd(1), rank=1, steps=9, begin=1, settle=1).init(params)
        ),
        "orthogonality: no parameter": lambda: D.orthogonality()({"w": jnp.ones(2)}, {}, {}, jt.Context()),
    }
    for message, wrong in cases.items():
        with pytest.raises(jt.InputError, match=message):
            wrong()
    value, _, _ = D.orthogonality(strength=0.5)(params, {}, {}, jt.Context())
    assert float(value) == pytest.approx(0.5 * (1 + 1))


def test_what_a_kind_cannot_do_is_told():
    weights = weights_of(base_of())
    cases = {
        "blocks of 5 don't divide the 6 inputs of 'dense/kernel'; 6 would": lambda: (
            D.oft(5).on("dense").fresh(KEY, weights)
        ),
        "boft: 2 factors need a multiple of 2 blocks, but 'dense/kernel' has 3": lambda: (
            D.boft(2, factors=2).on("dense").fresh(KEY, weights)
        ),
        "boft takes even blocks with several factors": lambda: D.boft(3, factors=2),
        "oft: the number of terms must be a whole number, 2 or more; got 1": lambda: D.oft(4, terms=1),
        "'dense/kernel' has 48 entries, fewer than 49": lambda: D.fourier_ft(49).on("dense").constants(weights),
        "the number of entries must be a whole number, 1 or more": lambda: D.fourier_ft(0),
        "the factor must be a whole number, 1 or more": lambda: D.lo_kr(1, factor=0),
        "the rank of a delta must be a whole number": lambda: D.vera(0),
        r"vera: the shared matrices must be \[12, 3\] and \[3, 8\]": lambda: D.vera(
            3, shared=(np.ones((8, 3)), np.ones((3, 8)))
        ).constants(weights),
        "rank 7 is above that of 'dense/kernel'": lambda: D.lo_ha(7).on("dense").fresh(KEY, weights),
        "selects no bias": lambda: D.bitfit().on("conv").chosen(weights),
        "selects no norm": lambda: D.norm_tuning().on("dense").chosen(weights),
        "feedforward: the pattern 'fc2' selects no parameter": lambda: D.ia3(feedforward="fc2").chosen(weights),
    }
    for message, wrong in cases.items():
        with pytest.raises(jt.InputError, match=message):
            wrong()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_a_small_base_carries_a_delta_in_float32(kind):
    model = jt.models.linen(nn.Dense(6))
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    whole = model.init(KEY, x)
    if kind == "int8":
        base = D.quantize(whole)
        held, kernel = base["params"]["kernel"], np.asarray(whole["params"]["kernel"])
        assert isinstance(held, D.Int8)
        assert held.values.dtype == np.int8
        assert base["params"]["bias"] is whole["params"]["bias"]
        scale = np.abs(kernel).max(0, keepdims=True) / 127
        np.testing.assert_array_equal(held.values, np.rint(kernel / scale))
        assert np.abs(D.plain(base)["params"]["kernel"] - kernel).max() <= 0.501 * scale.max()
    else:
        base = jax.tree.map(lambda w: w.astype(jnp.bfloat16), whole)
    net = D.delta(model, base, D.dora(2))
    own = net.init(KEY, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(own["params"])} == {np.dtype(np.float32)}
    before = model.apply(D.plain(base), x, train=False, key=None)[0]["logits"]
    np.testing.assert_allclose(
        net.apply(net.complete(own), x, train=False, key=None)[0]["logits"], before, rtol=2e-2, atol=2e-2
    )
    fitted = jt.fit(
        jt.classification(net),
        optax.sgd(1e-3),
        [{"image": x, "label": np.arange(4, dtype=np.int32)}] * 2,
        steps=2,
        progress=False,
    )
    after = D.merged(net, fitted.state)["params"]["kernel"]
    assert after.dtype == jnp.float32
    change = np.abs(np.asarray(after) - np.asarray(D.plain(base)["params"]["kernel"], np.float32)).max()
    assert 0 < change < 2e-3  # below what bfloat16 keeps of most entries
    got = model.apply(D.merged(net, fitted.state), x, train=False, key=None)[0]["logits"]
    variables = net.complete({"params": fitted.state.params["model"]})
    np.testing.assert_allclose(net.apply(variables, x, train=False, key=None)[0]["logits"], got, rtol=1e-6, atol=1e-6)
    assert D.merged(net, fitted.state, dtype=jnp.bfloat16)["params"]["kernel"].dtype == jnp.bfloat16
    assert D.digest(base) != D.digest(whole)
