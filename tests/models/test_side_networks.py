"""Networks beside a frozen one: side-tuning and ladders, against formulas written out; no gradient enters the base."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtransfer as jt

KEY, B, N, D, C = jax.random.key(2), 3, 5, 12, 4
RNG = np.random.default_rng(8)
TOKENS = RNG.normal(size=(B, N, 7)).astype(np.float32)
IMAGES = RNG.normal(size=(B, 4, 6, 7)).astype(np.float32)


def tokens():
    """A model of another making: three maps of tokens, features and logits."""

    def init(key, x):
        keys = jax.random.split(key, 4)
        shapes = [(7, D), (D, D), (D, D), (D, C)]
        return {
            "params": {
                f"w{i}": 0.4 * jax.random.normal(k, s) for i, (k, s) in enumerate(zip(keys, shapes, strict=True))
            }
        }

    def apply(variables, x, *, train, key):
        w, maps = variables["params"], {}
        for i, name in enumerate(("stem", "stage1", "stage2")):
            maps[name] = x = jnp.tanh(x @ w[f"w{i}"])
        features = x.mean(1)
        return {**maps, "features": features, "logits": features @ w["w3"]}, {}

    return jt.Model(init, apply, "net", ("w0", "w1", "w2", "w3"))


def small():
    """The network beside: a perceptron of another width."""

    def init(key, x):
        return {"params": {"a": 0.3 * jax.random.normal(key, (7, 6)), "b": 0.3 * jax.random.normal(key, (6, C))}}

    def apply(variables, x, *, train, key):
        hidden = jnp.tanh(x.mean(1) @ variables["params"]["a"])
        return {"features": hidden, "logits": hidden @ variables["params"]["b"]}, {}

    return jt.Model(init, apply, "small", ("a", "b"))


def stirred(tree, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda w: w + 0.3 * rng.normal(size=np.shape(w)).astype(np.float32), tree)


def doubled(tree):
    return jax.tree.map(lambda w: np.asarray(w, np.float64), tree)


def close(got, expected, within=1e-5):
    for (path, a), b in zip(jt.tree.leaves_by_path(got).items(), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=within, atol=within * max(np.abs(b).max(), 0.1), err_msg=path)


@pytest.fixture(scope="module")
def base():
    return stirred(tokens().init(KEY, TOKENS))


@pytest.mark.slow
@pytest.mark.parametrize(("classes", "alpha"), [(None, 0.5), (None, None), (6, 0.9), (6, None)])
def test_side_tuning_blends_or_adds(base, classes, alpha):
    model, side = tokens(), small()
    net = jt.models.side_tuning(model, base, side, classes=classes, alpha=alpha)
    start = net.init(KEY, TOKENS)
    f = model.apply(base, TOKENS, train=False, key=None)[0]
    name = "logits" if classes is None else "features"
    outputs, state = net.apply(net.complete(start), TOKENS, train=True, key=KEY)
    assert not jax.tree.leaves(state)
    if alpha is None:
        np.testing.assert_array_equal(outputs[name], f[name])
    else:
        assert float(jax.nn.sigmoid(start["params"]["merge"]["alpha"])) == pytest.approx(alpha, abs=1e-6)
    np.testing.assert_array_equal(outputs["stage1"], f["stage1"])
    own = stirred(start["params"])

    def by_hand(own):
        g = jnp.tanh(TOKENS.mean(1) @ own["side"]["a"])
        g = g if classes else g @ own["side"]["b"]
        merge, there = own["merge"], np.asarray(f[name])
        if "out" in merge:
            g = g @ merge["out"]["kernel"] + merge["out"]["bias"][None]
        share = 1 / (1 + jnp.exp(-merge["alpha"])) if alpha is not None else None
        r = there + g if share is None else share * there + (1 - share) * g
        return r @ own["head"]["dense"]["kernel"] + own["head"]["dense"]["bias"][None] if classes else r

    def ours(own):
        return net.apply(net.complete({"params": own}), TOKENS, train=True, key=KEY)[0]["logits"]

    close(ours(own), by_hand(own))
    close(*(jax.grad(lambda own, run=run: jnp.sum(jnp.sin(run(own))))(own) for run in (ours, by_hand)))


def test_the_side_network_may_start_from_weights_and_keeps_statistics(base):
    side = jt.models.linen(nn.Sequential([nn.Dense(D)]), name="side")
    with pytest.raises(jt.InputError, match="output of 'side' 'features'"):
        jt.models.side_tuning(tokens(), base, side, classes=3).init(KEY, TOKENS)
    with_norm = jt.models.mlp(C, hidden=(5,))
    net = jt.models.side_tuning(tokens(), base, with_norm)
    assert set(net.init(KEY, TOKENS)["params"]["side"]) == set(with_norm.init(KEY, TOKENS)["params"])
    assert net.stages[-1] == "merge"
    assert net.name == "net"


def dense(p, x):
    return x @ p["kernel"] + p["bias"].reshape((1,) * (x.ndim - 1) + (-1,))


def norm(p, x):
    mean = x.mean(-1, keepdims=True)
    x = (x - mean) / jnp.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-6)
    return x * p["scale"].reshape((1,) * (x.ndim - 1) + (-1,)) + p["bias"].reshape((1,) * (x.ndim - 1) + (-1,))


def attention(p, x, mask, heads):
    total = 0
    for h in range(heads):
        q, k, v = (x @ p[n]["kernel"][:, h] + p[n]["bias"][h].reshape(1, 1, -1) for n in ("query", "key", "value"))
        score = jnp.where(mask[:, None], q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]), -1e30)
        total = total + jax.nn.softmax(score, -1) @ v @ p["out"]["kernel"][h]
    return total + p["out"]["bias"].reshape(1, 1, -1)


def ladder_by_hand(p, maps, mask, heads, pool):
    h = dense(p["down0"], maps[0])
    for i, x in enumerate(maps[1:], 1):
        mu = 1 / (1 + jnp.exp(-p[f"gate{i}"] / 0.1))
        h = mu * dense(p[f"down{i}"], x) + (1 - mu) * h
        q = p[f"block{i}"]
        h = h + attention(q["attention"], norm(q["norm1"], h), mask, heads)
        y = dense(q["fc1"], norm(q["norm2"], h))
        h = h + dense(q["fc2"], 0.5 * y * (1 + jax.scipy.special.erf(y / np.sqrt(2))))
    return dense(p["up"], pool(norm(p["norm"], h)))


@pytest.mark.slow
@pytest.mark.parametrize("classes", [None, 6])
def test_a_ladder_over_tokens_is_the_formula(base, classes, x64):
    """In double precision, as the gradient of a key's bias is rounding alone."""
    model, base, x = tokens(), doubled(base), TOKENS.astype(np.float64)
    net = jt.models.ladder(model, base, classes=classes, reduction=3, heads=2, pooling="class" if classes else "mean")
    start = doubled(net.init(KEY, x))
    f = model.apply(base, x, train=False, key=None)[0]
    maps = [np.asarray(f[name]) for name in ("stem", "stage1", "stage2")]
    if classes is None:
        outputs, _ = net.apply(net.complete(start), x, train=True, key=None)
        np.testing.assert_array_equal(outputs["logits"], f["logits"])
    own = doubled(stirred(start["params"]))
    own = {**own, "side": {**own["side"], "gate1": own["side"]["gate1"] / 10, "gate2": own["side"]["gate2"] / 10}}

    def by_hand(own):
        pool = (lambda h: h[:, 0]) if classes else (lambda h: h.mean(1))
        out = dense(own["head"]["dense"], ladder_by_hand(own["side"], maps, np.ones((B, N), bool), 2, pool))
        return out if classes else out + np.asarray(f["logits"])

    def ours(own):
        return net.apply(net.complete({"params": own}), x, train=True, key=None)[0]["logits"]

    def value(run):
        return jax.jit(jax.value_and_grad(lambda own: jnp.sum(jnp.sin(run(own)))))(own)

    close(value(ours), value(by_hand), 1e-9)


@pytest.mark.slow
def test_a_ladder_on_texts_attends_to_no_padding():
    model = jt.models.text_encoder(C, width=12, depth=1, heads=2, vocabulary=9, positions=8)
    texts = np.array([[3, 4, 5, 0, 0], [1, 2, 6, 7, 8]], np.int32)
    weights = model.init(KEY, texts)
    net = jt.models.ladder(model, weights, classes=3, reduction=3, pooling="mean")
    own = stirred(net.init(KEY, texts)["params"])
    run = jax.jit(lambda x: net.apply(net.complete({"params": own}), x, train=False, key=None)[0]["logits"])
    expected = run(texts)[0]
    np.testing.assert_allclose(run(texts[:1, :3])[0], expected, rtol=1e-5, atol=1e-5)
    given = {"tokens": np.array([[3, 4, 5, 7, 2]], np.int32), "mask": np.array([[1, 1, 1, 0, 0]])}
    np.testing.assert_allclose(run(given)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_ladder_over_maps_follows_their_sides_and_channels():
    def init(key, x):
        return {"params": {"w": 0.5 * jax.random.normal(key, (7, 16)), "head": jnp.ones((16, C))}}

    def apply(variables, x, *, train, key):
        first = jnp.tanh(x)
        second = jnp.tanh(first[:, ::2, ::2] @ variables["params"]["w"])
        features = second.mean((1, 2))
        return {"low": first, "high": second, "logits": features @ variables["params"]["head"]}, {}

    model = jt.Model(init, apply, "maps")
    weights = model.init(KEY, IMAGES)
    net = jt.models.ladder(model, weights, maps=("low", "high"), classes=2, reduction=4)
    own = stirred(net.init(KEY, IMAGES)["params"])
    got = net.apply(net.complete({"params": own}), IMAGES, train=False, key=None)[0]
    p, f = own["side"], model.apply(weights, IMAGES, train=False, key=None)[0]
    h = dense(p["pass1"], dense(p["down0"], np.asarray(f["low"])))  # [B, 4, 6, 4]

    def shrunk(h, axis):
        """Linear interpolation at half the size, its triangle twice as wide: weights 1 3 3 1, less at the border."""
        out, size = [], h.shape[axis]
        for i in range(size // 2):
            near = [(j, w) for j, w in zip(range(2 * i - 1, 2 * i + 3), (1, 3, 3, 1), strict=True) if 0 <= j < size]
            out.append(sum(w * jnp.take(h, j, axis) for j, w in near) / sum(w for _, w in near))
        return jnp.stack(out, axis)

    mu = 1 / (1 + np.exp(-p["gate1"] / 0.1))
    h = mu * dense(p["down1"], np.asarray(f["high"])) + (1 - mu) * shrunk(shrunk(h, 1), 2)
    q = p["block1"]

    def conv(p, x):
        y = jax.lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y + p["bias"].reshape(1, 1, 1, -1)

    h = h + conv(q["conv2"], jax.nn.relu(conv(q["conv1"], norm(q["norm1"], h))))
    close(got["features"], dense(p["up"], norm(p["norm"], h).mean((1, 2))))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ladder", "side_tuning"])
def test_the_backward_pass_does_not_enter_the_base(base, name):
    """Its products with the base's kernels are those of the forward pass: no transposed one, and nothing behind."""
    model = tokens()
    make = {
        "ladder": lambda: jt.models.ladder(model, base, classes=6, reduction=3),
        "side_tuning": lambda: jt.models.side_tuning(model, base, small(), classes=6),
    }
    net = make[name]()
    variables = net.init(KEY, TOKENS)

    def loss(params, frozen):
        outputs, _ = net.apply({"params": params, "frozen": frozen}, TOKENS, train=True, key=None)
        return jnp.sum(jnp.square(outputs["logits"]))

    def products(function):
        frozen = net.complete({})["frozen"]
        jaxpr = jax.make_jaxpr(function)(variables["params"], frozen)
        kernels = {(7, D), (D, D)}
        found = 0
        for equation in jaxpr.jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                found += any(v.aval.shape in kernels and v in jaxpr.jaxpr.invars for v in equation.invars)
        return found

    assert products(loss) == 3
    assert products(jax.grad(loss)) == 3
    assert products(jax.grad(loss, argnums=1)) == 3  # even where the base is asked for: its derivative is zero
    for leaf in jax.tree.leaves(jax.grad(loss, argnums=1)(variables["params"], net.complete({})["frozen"])):
        assert not np.any(leaf)


def test_misuse_of_side_networks_is_told(base):
    model = tokens()
    wrong = {
        "alpha must lie between 0 and 1": lambda: jt.models.side_tuning(model, base, small(), alpha=1.0),
        "classes must be a whole number": lambda: jt.models.side_tuning(model, base, small(), classes=0),
        "expected the base's weights": lambda: jt.models.side_tuning(model, {"w": TOKENS}, small()),
        "a tuple of two maps or more": lambda: jt.models.ladder(model, base, maps=("stem",)),
        "reduction must be a whole number": lambda: jt.models.ladder(model, base, reduction=0),
        "heads must be": lambda: jt.models.ladder(model, base, heads=0),
        "unknown pooling": lambda: jt.models.ladder(model, base, pooling="max"),
        "'stage9'": lambda: jt.models.ladder(model, base, maps=("stem", "stage9")).init(KEY, TOKENS),
        "'logits' is": lambda: jt.models.ladder(model, base, maps=("stem", "logits")).init(KEY, TOKENS),
        "less than reduction=13": lambda: jt.models.ladder(model, base, reduction=13).init(KEY, TOKENS),
        "don't divide the width 4": lambda: jt.models.ladder(model, base, reduction=3, heads=3).init(KEY, TOKENS),
        "reads the maps stem, stage1": lambda: jt.models.ladder(small(), small().init(KEY, TOKENS)).init(KEY, TOKENS),
        "not those of model 'small'": lambda: jt.models.ladder(small(), base).init(KEY, TOKENS),
    }
    for message, make in wrong.items():
        with pytest.raises(jt.InputError, match=message):
            make()
