"""Re-Basin: permutations that change nothing, found back; specifications of our networks, and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fusion_trees import flat

import jaxtransfer as jt

F = jt.fusion


def fresh(model, shape, seed=0):
    """Returns variables of a model's shapes, all leaves drawn: norms and statistics, too."""
    like = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *shape))))
    rng = np.random.default_rng(seed)

    def drawn(path, leaf):
        value = rng.normal(size=leaf.shape)
        if jt.tree.path_of(path).endswith("var"):
            value = np.abs(value) + 0.5
        fans = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 4
        return (value / np.sqrt(fans)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(drawn, like)


def shuffled(variables, specification, seed=1):
    rng = np.random.default_rng(seed)
    sizes = F.permutation_sizes(variables, specification)
    orders = {name: rng.permutation(size) for name, size in sizes.items()}
    return F.permuted(variables, specification, orders), orders


SMALL = {
    "mlp": (jt.models.mlp(3, hidden=(9, 8, 7)), (4, 2)),
    "deep mlp": (jt.models.mlp(3, hidden=(5,) * 11), (6,)),  # stage10 comes after stage2
    "lenet": (jt.models.lenet(3, bottleneck=6), (16, 16, 1)),
    "conv4": (jt.models.conv4(3, width=5), (16, 16, 2)),
    "small-cnn": (jt.models.small_cnn(3, width=4), (8, 8, 1)),
    "resnet20": (jt.models.resnet20(3), (8, 8, 3)),
    "preactivation": (jt.models.cifar_resnet(14, 3, preactivation=True), (8, 8, 3)),
    "wide": (jt.models.wide_resnet(10, 2, 3), (8, 8, 3)),
    "vit": (jt.models.vit(12, 2, 3, 4, patch=4), (8, 8, 3)),
}
LARGE = {
    "vgg11": (jt.models.vgg11(3, small_images=True), (16, 16, 3)),
    "vgg11 without norms": (jt.models.vgg11(3, small_images=True, batch_norm=False), (16, 16, 3)),
    "resnet18": (jt.models.resnet18(3, small_images=True), (16, 16, 3)),
    "resnet50": (jt.models.resnet50(3, small_images=True), (16, 16, 3)),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in LARGE]


def logits(model, variables, shape):
    x = np.random.default_rng(5).normal(size=(4, *shape)).astype(np.float32)
    run = jax.jit(lambda v, x: model.apply(v, x, train=False, key=None)[0]["logits"])
    return np.asarray(run(variables, x))


@pytest.mark.parametrize("name", [*SMALL, *SLOW])
def test_a_permuted_copy_is_found_back(name):
    model, shape = (SMALL | LARGE)[name]
    one = fresh(model, shape)
    specification = F.specification(one)
    other, orders = shuffled(one, specification)
    assert any(np.abs(a - b).max() > 0.1 for a, b in zip(flat(one).values(), flat(other).values(), strict=True))
    found = F.weight_matching(one, other, specification)
    for unit, order in orders.items():
        np.testing.assert_array_equal(order[found[unit]], np.arange(len(order)), err_msg=unit)
    back = F.rebasin(one, other, specification)
    for path, leaf in flat(one).items():
        np.testing.assert_array_equal(flat(back)[path], leaf, err_msg=path)
    assert F.permutation_sizes(one["params"], F.specification(one["params"])) == F.permutation_sizes(one, specification)


@pytest.mark.parametrize(
    "name", ["mlp", "lenet", "conv4", "resnet20", "vit", *(pytest.param(n, marks=pytest.mark.slow) for n in
             ("preactivation", "wide", "small-cnn", "vgg11", "vgg11 without norms", "resnet18", "resnet50"))]
)  # fmt: skip
def test_a_permutation_changes_nothing_of_what_is_computed(name):
    model, shape = (SMALL | LARGE)[name]
    one = fresh(model, shape)
    other, _ = shuffled(one, F.specification(one))
    np.testing.assert_allclose(logits(model, other, shape), logits(model, one, shape), rtol=2e-4, atol=2e-4)


def test_a_narrow_vgg_is_found_back():
    model = jt.models.vgg16(3)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3))))
    rng = np.random.default_rng(0)
    one = jax.tree.map(lambda x: rng.normal(size=[n // 16 if n >= 64 else n for n in x.shape]), shapes)
    specification = F.specification(one)
    other, _ = shuffled(one, specification)
    back = F.rebasin(one, other, specification)
    for path, leaf in flat(one).items():
        np.testing.assert_array_equal(flat(back)[path], leaf, err_msg=path)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_the_large_head_of_vgg_reads_a_flattened_map(batch_norm):
    model = jt.models.vgg11(3, batch_norm=batch_norm)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3))))
    specification = F.specification(shapes)
    sizes = F.permutation_sizes(shapes, specification)
    assert sizes["stage5_conv2"] == 512
    assert sizes["fc1"] == sizes["fc2"] == 4096
    places = np.asarray(specification["fc1/kernel"][0]["stage5_conv2"])
    np.testing.assert_array_equal(places, np.arange(7 * 7 * 512).reshape(49, 512).T)


def test_the_stream_of_a_cifar_resnet_keeps_old_channels_between_new_ones():
    model, shape = SMALL["resnet20"]
    variables = fresh(model, shape)
    specification = F.specification(variables)
    sizes = F.permutation_sizes(variables, specification)
    assert {name: sizes[name] for name in ("stem", "stage2_new", "stage3_new")} == {
        "stem": 16,
        "stage2_new": 16,
        "stage3_new": 32,
    }
    streams = specification["head/kernel"][0]
    assert streams["stem"] == [*range(24, 40)]
    assert streams["stage2_new"] == [*range(16, 24), *range(40, 48)]


@pytest.mark.parametrize("name", ["mlp", "resnet20"])
def test_features_of_an_encoder_without_its_head_stay_in_their_order(name):
    model, shape = SMALL[name]
    variables = fresh(model, shape)
    encoder = {
        kind: {layer: leaves for layer, leaves in tree.items() if layer != "head"} for kind, tree in variables.items()
    }
    other, orders = shuffled(encoder, F.specification(encoder))
    assert orders
    whole = {kind: {**variables[kind], **tree} for kind, tree in other.items()}
    x = jax.random.normal(jax.random.key(1), (2, *shape))
    run = jax.jit(lambda variables: model.apply(variables, x, train=False, key=None)[0]["logits"])
    np.testing.assert_allclose(run(whole), run(variables), atol=1e-4)


def test_other_networks_get_nearer():
    model, shape = SMALL["mlp"]
    one, other = fresh(model, shape), fresh(model, shape, seed=9)
    specification = F.specification(one)
    aligned = F.rebasin(one, other, specification)

    def product(two):
        return sum(
            float(np.sum(a * b))
            for a, b in zip(flat(one["params"]).values(), flat(two["params"]).values(), strict=True)
        )

    best = product(aligned)
    assert best > product(other) + 1
    for seed in range(20):
        assert product(shuffled(other, specification, seed)[0]) < best
    np.testing.assert_allclose(logits(model, aligned, shape), logits(model, other, shape), atol=1e-5)
    # a local maximum: no exchange of two units of a layer gains
    for name, size in F.permutation_sizes(one, specification).items():
        for first in range(size):
            for second in range(first):
                order = np.arange(size)
                order[[first, second]] = second, first
                assert product(F.permuted(aligned, specification, {name: order})) <= best + 1e-5


def test_one_hidden_layer_is_an_assignment():
    rng = np.random.default_rng(3)
    one, other = ({"a": rng.normal(size=(4, 5)), "b": rng.normal(size=(5, 2))} for _ in range(2))
    spec = {"a": (None, "h"), "b": ("h", None)}
    order = F.weight_matching(one, other, spec)["h"]
    import itertools

    def value(p):
        p = list(p)
        return np.sum(one["a"] * other["a"][:, p]) + np.sum(one["b"] * other["b"][p])

    assert tuple(order) == max(itertools.permutations(range(5)), key=value)


def test_a_specification_by_hand():
    rng = np.random.default_rng(0)
    tree = {"recurrent": rng.normal(size=(6, 6)), "table": rng.normal(size=(6, 2)), "scale": rng.normal(size=()),
            "out": rng.normal(size=(12, 2)), "step": np.asarray(3)}  # fmt: skip
    places = [[n, n + 6] for n in range(6)]
    spec = {"recurrent": ("h", "h"), "table": ("h", None), "scale": None, "out": ({"h": places}, None), "step": ()}
    order = rng.permutation(6)
    other = F.permuted(tree, spec, {"h": order})
    np.testing.assert_array_equal(other["recurrent"], tree["recurrent"][order][:, order])
    np.testing.assert_array_equal(other["out"], tree["out"].reshape(2, 6, 2)[:, order].reshape(12, 2))
    assert other["step"] is tree["step"]
    np.testing.assert_array_equal(order[F.weight_matching(tree, other, spec)["h"]], np.arange(6))
    jaxed = F.permuted({name: jnp.asarray(leaf) for name, leaf in tree.items()}, spec, {"h": order})
    assert isinstance(jaxed["table"], jax.Array)
    half = F.permuted({**tree, "table": jnp.ones((6, 2), jnp.bfloat16)}, spec, {"h": order})
    assert half["table"].dtype == jnp.bfloat16


TREE = {"a": np.ones((2, 3)), "b": np.ones((3, 2))}
SPEC = {"a": (None, "h"), "b": ("h", None)}
BLOCK = "stage1_block1/conv1", "stage1_block1/depthwise"
DENSE = {"fc/kernel": np.ones((2, 3)), "fc/bias": np.ones(3), "out/kernel": np.ones((3, 2)), "out/bias": np.ones(2)}
UNITS = {"fc/kernel": (None, "h"), "fc/bias": ("h",), "out/kernel": ("h", None), "out/bias": None}
REFUSED = {
    "a leaf left out": (lambda: F.permutation_sizes(TREE, {"a": (None, "h")}), "leaves out b; a leaf that"),
    "no leaf": (lambda: F.permutation_sizes(TREE, {**SPEC, "c": None}), "'c', which is no leaf"),
    "a rank": (lambda: F.permutation_sizes(TREE, {**SPEC, "a": ("h",)}), r"1 axes for 'a', which is \[2, 3\]"),
    "sizes": (lambda: F.permutation_sizes(TREE, {"a": ("h", None), "b": ("h", None)}), "permutes 2 items of"),
    "places": (lambda: F.permutation_sizes(TREE, {**SPEC, "a": (None, {"h": [0, 1, 3]})}), "distinct and below 3"),
    "an order": (lambda: F.permuted(TREE, SPEC, {"h": [0, 0, 1]}), "must be a permutation of 3 items"),
    "a name": (lambda: F.permuted(TREE, SPEC, {"k": [0]}), "no axis is permuted by 'k'"),
    "nan": (lambda: F.rebasin(TREE, {**TREE, "b": TREE["b"] * np.nan}, SPEC), "the model has NaN or inf at 'b'"),
    "another": (lambda: F.rebasin(TREE, {**TREE, "c": np.ones(1)}, SPEC), "the reference and the model differ at 'c'"),
    "sweeps": (lambda: F.rebasin(TREE, TREE, SPEC, sweeps=0), "sweeps must be at least 1"),
    "unread": (lambda: F.rebasin(DENSE, DENSE, {**UNITS, "out/kernel": None}), "'h' permutes an axis of 'fc/ke"),
    "ungiven": (lambda: F.rebasin(DENSE, DENSE, {**UNITS, "fc/kernel": ("i", "h")}), "'i' permutes an axis of 'fc/k"),
    "outputs": (
        lambda: F.rebasin(DENSE, DENSE, {**UNITS, "out/kernel": ("h", "o"), "out/bias": ("o",)}),
        "'o' permutes an axis of 'out/kernel' alone",
    ),
    "a bias": (lambda: F.rebasin(DENSE, DENSE, {**UNITS, "fc/bias": None}), "belong to the same units"),
    "no stem": (lambda: F.specification({"stage1_block1/conv1/kernel": np.ones((1, 1, 2, 2))}), "here is none"),
    "a network": (lambda: F.specification(TREE), "no network of jt.models has a, b"),
    "depthwise": (
        lambda: F.specification({f"{n}/kernel": np.ones((1, 1, 2, 2)) for n in ("stem_conv", *BLOCK)}),
        "none of our ResNets",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    call, message = REFUSED[name]
    with pytest.raises(jt.InputError, match=message):
        call()
