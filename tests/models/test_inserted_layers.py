"""Adapters, prompts and prefixes in frozen networks, against networks written out by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtransfer as jt

KEY, D, HEADS, M, P, B = jax.random.key(5), 12, 3, 4, 2, 3
IMAGES = np.random.default_rng(1).normal(size=(B, 8, 8, 3)).astype(np.float32)
TEXTS = np.array([[3, 4, 5, 0, 0], [1, 2, 6, 7, 9], [8, 0, 0, 0, 0]], np.int32)


def vit(classes=5):
    return jt.models.vit(D, 2, HEADS, classes, patch=4, dropout=0.3)


def text(classes=5):
    options = {"width": D, "depth": 2, "heads": HEADS, "vocabulary": 11, "positions": 8, "pooling": "mean"}
    return jt.models.text_encoder(classes, **options)


def stirred(tree, seed=0, size=0.3):
    """The same tree away from its start, where zeros would hide what they are multiplied by."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda w: w + np.float32(size) * rng.normal(size=w.shape).astype(np.float32), tree)


@pytest.fixture(scope="module")
def bases():
    made = {"vit": (vit(), IMAGES), "text": (text(), TEXTS)}
    return {name: (model, x, stirred(model.init(KEY, x), 3)) for name, (model, x) in made.items()}


# The networks by hand: plain formulas of the parameters, with places where something is changed.


def norm(p, x, epsilon):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + epsilon) * at(p["scale"], x) + at(
        p["bias"], x
    )


def at(vector, x):
    return vector.reshape((1,) * (x.ndim - 1) + (-1,))


def dense(p, x):
    return x @ p["kernel"] + at(p["bias"], x)


def attend(p, x, mask, own):
    """Attention head by head; `own` has the block's prefix."""
    total = 0
    for h in range(HEADS):
        q, k, v = (x @ p[n]["kernel"][:, h] + at(p[n]["bias"][h], x) for n in ("query", "key", "value"))
        seen = mask
        if "prefix" in own:
            more = [jnp.stack([own["prefix"][n][:, h]] * len(x)) for n in ("keys", "values")]
            k, v = jnp.concatenate([more[0], k], 1), jnp.concatenate([more[1], v], 1)
            seen = jnp.concatenate([jnp.ones((len(x), P), bool), mask], 1)
        score = jnp.einsum("bqd,bkd->bqk", q, k) / np.sqrt(D // HEADS)
        weight = jax.nn.softmax(jnp.where(seen[:, None], score, -1e30), -1)
        total = total + weight @ v @ p["out"]["kernel"][h]
    return total + at(p["out"]["bias"], x)


def adapter(own, x, act, scale):
    return scale * dense(own["up"], act(dense(own["down"], x)))


def exact_gelu(x):
    return 0.5 * x * (1 + jax.scipy.special.erf(x / np.sqrt(2)))


def block(kind, p, own, x, mask, pre):
    eps = 1e-6 if pre else 1e-12

    def mlp(z):
        return dense(p["fc2"], exact_gelu(dense(p["fc1"], z)))

    one = norm(p["norm1"], x, eps) if pre else x
    a = attend(p["attention"], one, mask, own)
    if kind == "houlsby":
        a = a + adapter(own["attention_adapter"], a, jnp.tanh, 0.7)
    if kind == "parallel both":
        a = a + adapter(own["attention_adapter"], one, jax.nn.relu, 4.0)
    x = x + a if pre else norm(p["norm1"], x + a, eps)
    two = norm(p["norm2"], x, eps) if pre else x
    h = mlp(two)
    if kind == "houlsby":
        h = h + adapter(own["mlp_adapter"], h, jnp.tanh, 0.7)
    if kind == "parallel both":
        h = h + adapter(own["mlp_adapter"], two, jax.nn.relu, 4.0)
    if kind == "adapt_former":
        h = h + adapter(own["mlp_adapter"], two, jax.nn.relu, 0.1)
    if kind == "pfeiffer" and pre:
        return x + h + adapter(own["mlp_adapter"], x + h, jax.nn.relu, 1.0)
    if kind == "pfeiffer":
        return norm(p["norm2"], x + h + adapter(own["mlp_adapter"], norm(p["norm2"], x + h, eps), jax.nn.relu, 1), eps)
    return x + h if pre else norm(p["norm2"], x + h, eps)


def by_hand(name, kind, p, own, inputs):
    pre = name == "vit"
    if pre:
        cells = inputs.reshape(B, 2, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(B, 4, 48)
        x = cells @ p["stem_conv"]["kernel"].reshape(48, D) + at(p["stem_conv"]["bias"], cells)
        x = jnp.concatenate([jnp.concatenate([p["stem_token"]] * B), x], 1) + p["stem_position"]
        mask = jnp.ones((B, 5), bool)
    else:
        x = p["stem_words"]["embedding"][inputs] + p["stem_positions"][None, : inputs.shape[1]]
        x = norm(p["stem_norm"], x + p["stem_types"]["embedding"][0].reshape(1, 1, D), 1e-12)
        mask = inputs != 0
    first, rest = x[:, :1], x[:, 1:]
    learned, wide = None, jnp.concatenate([mask[:, :1], jnp.ones((B, P), bool), mask[:, 1:]], 1)
    for i in (1, 2):
        mine = own.get(f"stage{i}", {})
        if kind == "deep":
            learned = jnp.stack([mine["prompts"]] * B)
        elif kind == "shallow" and i == 1:
            learned = jnp.stack([own["stem_prompts"]] * B)
        x = jnp.concatenate([first, *([] if learned is None else [learned]), rest], 1)
        x = block(kind, p[f"stage{i}"], mine, x, mask if learned is None else wide, pre)
        end = 1 if learned is None else 1 + P
        first, learned, rest = x[:, :1], x[:, 1:end] if end > 1 else None, x[:, end:]
    x = jnp.concatenate([first, rest], 1)
    if pre:
        features = norm(p["final_norm"], x[:, 0], 1e-6)
    else:
        features = (x * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return {"stage2": x, "logits": dense(own["head"], features)}


KINDS = {
    "houlsby": lambda *a, **k: jt.models.houlsby(*a, bottleneck=M, activation=jnp.tanh, scale=0.7, **k),
    "pfeiffer": lambda *a, **k: jt.models.pfeiffer(*a, bottleneck=M, **k),
    "parallel both": lambda *a, **k: jt.models.parallel_adapter(*a, bottleneck=M, attention=True, **k),
    "adapt_former": lambda *a, **k: jt.models.adapt_former(*a, bottleneck=M, **k),
    "shallow": lambda *a, **k: jt.models.visual_prompts(*a, prompts=P, **k),
    "deep": lambda *a, **k: jt.models.visual_prompts(*a, prompts=P, deep=True, **k),
    "prefix": lambda *a, **k: jt.models.prefix_tuning(*a, prefix=P, **k),
}
ADAPTERS = ("houlsby", "pfeiffer", "parallel both", "adapt_former")
BOTH = [("vit", kind) for kind in KINDS] + [("text", kind) for kind in ("pfeiffer", "prefix", "houlsby", "shallow")]
REPEATED = {("vit", "adapt_former"), ("text", "houlsby"), ("text", "shallow")}  # whose code the others run
CASES = [pytest.param(*one, marks=pytest.mark.slow) if one in REPEATED else one for one in BOTH]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_outputs_and_gradients_are_those_of_the_network_written_out(bases, name, kind):
    model, x, base = bases[name]
    net = KINDS[kind](model, base, own="head")
    start = net.init(jax.random.key(7), x)
    assert start.keys() == {"params"}
    own, weight = stirred(start["params"]), np.random.default_rng(4).normal(size=(B, 5, D)).astype(np.float32)

    def ours(own, frozen, train):
        variables = {"params": own, "frozen": frozen}
        return net.apply(variables, x, train=train, key=KEY)[0]

    def theirs(own, frozen, train):
        return by_hand(name, kind, frozen["base"]["params"], own, x)

    def value(run, train):
        def loss(own, frozen):
            outputs = run(own, frozen, train)
            loss = jnp.sum(outputs["stage2"] * weight) + jnp.sum(jnp.square(outputs["logits"]))
            return loss, {key: outputs[key] for key in ("stage2", "logits")}

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(own, net.complete({})["frozen"])

    (_, out), grad = value(ours, False)
    (_, expected_out), expected = value(theirs, False)
    assert jax.tree.structure(grad) == jax.tree.structure(expected)
    for got, want in ((out, expected_out), (grad, expected)):
        for (path, a), b in zip(jt.tree.leaves_by_path(got).items(), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max(), err_msg=path)
            assert np.abs(b).max() > 0, path


STARTS = [("vit", kind) for kind in ADAPTERS] + [("text", "pfeiffer"), ("text", "houlsby")]


@pytest.mark.parametrize(("name", "kind"), STARTS)
def test_at_start_adapters_give_the_function_of_the_base_to_the_bit(bases, name, kind):
    """In training too: what stays runs in inference mode, and draws no dropout."""
    model, x, base = bases[name]
    expected = model.apply(base, x, train=False, key=None)[0]
    for own in ((), "head"):
        net = KINDS[kind](model, base, own=own)
        start = net.init(jax.random.key(8), x)
        for train in (False, True):
            outputs, state = net.apply(net.complete(start), x, train=train, key=KEY)
            assert state == {}
            for key, value in expected.items():
                np.testing.assert_array_equal(outputs[key], value)


def residual_by_hand(kind, own, mine, x, train):
    """ResNet-8 of one block a stage, with α behind or beside the convolutions of the blocks."""

    def conv(p, x, stride, alpha):
        how: dict[str, Any] = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        y = jax.lax.conv_general_dilated(x, p["kernel"], (stride, stride), ((1, 1), (1, 1)), **how)
        if alpha is None:
            return y
        if kind == "parallel":
            return y + jnp.einsum("bhwc,cd->bhwd", x[:, ::stride, ::stride], alpha["kernel"])
        return y + jnp.einsum("bhwc,cd->bhwd", y, alpha["kernel"])

    def batch_norm(p, stats, x):
        mean, var = (x.mean((0, 1, 2)), x.var((0, 1, 2))) if train else (stats["mean"], stats["var"])
        return (x - at(mean, x)) / jnp.sqrt(at(var, x) + 1e-5) * at(p["scale"], x) + at(p["bias"], x)

    p, stats = own["params"], own["batch_stats"]
    x = jax.nn.relu(batch_norm(p["stem_norm"], stats["stem_norm"], conv(p["stem_conv"], x, 1, None)))
    for stage, filters in ((1, 16), (2, 32), (3, 64)):
        name, stride = f"stage{stage}_block1", 1 if stage == 1 else 2
        q, s, a = p[name], stats[name], mine[name]
        y = jax.nn.relu(batch_norm(q["norm1"], s["norm1"], conv(q["conv1"], x, stride, a["conv1_adapter"])))
        y = batch_norm(q["norm2"], s["norm2"], conv(q["conv2"], y, 1, a["conv2_adapter"]))
        more = (filters - x.shape[-1]) // 2
        x = jax.nn.relu(y + jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (more, more))))
    return dense(p["head"], x.mean((1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parallel", "series"])
@pytest.mark.parametrize("norms", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_residual_adapters_are_those_of_the_network_written_out(kind, norms):
    """Where batch norm is the model's own, it normalises by the batch, and keeps statistics of its own."""
    model, x = jt.models.cifar_resnet(8, 4), IMAGES
    base = model.init(KEY, x)
    base = {
        **stirred({"params": base["params"]}, 5, 0.1),
        "batch_stats": jax.tree.map(lambda s: s + 0.1, base["batch_stats"]),
    }
    net = jt.models.residual_adapters(model, base, parallel=kind == "parallel", own=".*norm.*" if norms else ())
    start = net.init(jax.random.key(9), x)
    expected = model.apply(base, x, train=False, key=None)[0]["logits"]
    np.testing.assert_array_equal(net.apply(net.complete(start), x, train=False, key=None)[0]["logits"], expected)
    own = stirred(start["params"], 6, 0.2)

    def ours(own):
        variables = net.complete({**start, "params": own})
        logits, state = net.apply(variables, x, train=True, key=None)
        return jnp.sum(jnp.square(logits["logits"])), state

    def theirs(own):
        whole = jax.tree.map(lambda leaf: leaf, base)
        for path, leaf in jt.tree.leaves_by_path(own).items():
            if "adapter" not in path:
                *above, last = path.split("/")
                node = whole["params"]
                for key in above:
                    node = node[key]
                node[last] = leaf
        return jnp.sum(jnp.square(residual_by_hand(kind, whole, own, x, norms)))

    (value, state), grad = jax.jit(jax.value_and_grad(ours, has_aux=True))(own)
    wanted, expected = jax.jit(jax.value_and_grad(theirs))(own)
    assert jax.tree.structure(state) == jax.tree.structure({k: v for k, v in start.items() if k != "params"})
    assert ("batch_stats" in state) == norms
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for (path, a), b in zip(jt.tree.leaves_by_path(grad).items(), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max(), err_msg=path)
    if norms:
        moved = jt.tree.leaves_by_path(state["batch_stats"])
        assert all((leaf != moved[p]).any() for p, leaf in jt.tree.leaves_by_path(start["batch_stats"]).items())


def test_what_trains_is_counted_on_vit_ti():
    """12 blocks of width D = 192: an adapter of m is 2Dm + D + m, a prompt D, a prefix 2D a block."""
    model = jt.models.vit_ti(10, patch=4)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(KEY, x), image)
    base = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)

    def count(make, **options):
        net = make(model, base, **options)
        return jt.models.count_parameters(net, (32, 32, 3))

    assert count(jt.models.houlsby) == 595_968 == 24 * (2 * 192 * 64 + 192 + 64)
    assert count(jt.models.pfeiffer, bottleneck=12, only="stage1[12]", own="head") == 2 * 4_812 + 1_930
    assert count(jt.models.visual_prompts, deep=True) == 23_040 == 12 * 10 * 192
    assert count(jt.models.prefix_tuning) == 46_080


def test_a_head_for_other_classes_is_drawn_anew_and_norms_start_from_the_base(bases):
    _, x, base = bases["vit"]
    net = jt.models.adapt_former(vit(classes=7), base, bottleneck=M, own="head|final_norm")
    start = net.init(KEY, jax.ShapeDtypeStruct(x.shape, x.dtype))
    params = start["params"]
    assert params["head"]["kernel"].shape == (D, 7)
    np.testing.assert_array_equal(params["final_norm"]["scale"], base["params"]["final_norm"]["scale"])
    assert params["final_norm"]["scale"] is not base["params"]["final_norm"]["scale"]  # which may be donated
    without = {"params": {key: value for key, value in base["params"].items() if key != "head"}}
    other = jt.models.adapt_former(vit(classes=7), without, bottleneck=M, own="head")
    assert other.stages == ("stage1", "stage2|final_norm", "head")
    start = other.init(KEY, x)
    logits = other.apply(other.complete(start), x, train=False, key=None)[0]["logits"]
    features = net.apply(net.complete(net.init(KEY, x)), x, train=False, key=None)[0]["features"]
    np.testing.assert_allclose(logits, dense(start["params"]["head"], features), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_below_heads_layers_are_found_where_they_are(bases):
    model, x, _ = bases["vit"]
    heads = jt.models.with_heads(jt.models.normalize(model, 0.1, 0.9), projection=jt.models.head(4, batch_norm=False))
    whole = heads.init(KEY, x)
    net = jt.models.houlsby(heads, whole, bottleneck=M, own="projection")
    start = net.init(KEY, x)
    assert net.stages == ("encoder/(?:stage1)", "encoder/(?:stage2|final_norm)", "projection")
    assert set(start["params"]) == {"encoder", "projection"}
    moved = stirred(start["params"])
    below = jt.models.houlsby(model, jt.models.encoder_of(whole), bottleneck=M)
    got = net.apply(net.complete({"params": moved}), x, train=False, key=None)[0]
    own = {"params": moved["encoder"]}
    expected = below.apply(below.complete(own), (x - np.float32(0.1)) / np.float32(0.9), train=False, key=None)[0]
    np.testing.assert_allclose(got["features"], expected["features"], rtol=1e-5, atol=1e-5)
    micro = jt.micro_batched(net, 1)
    again = micro.apply(micro.complete({"params": moved}), x, train=False, key=None)[0]
    np.testing.assert_allclose(again["projection"], got["projection"], rtol=1e-5, atol=1e-5)
