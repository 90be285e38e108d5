"""Networks on frozen bases in training: on any devices, in checkpoints, under objectives, in half precision."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.runs import checkpoints
from tests.contract import batches

KEY, IMAGE = jax.random.key(6), jax.ShapeDtypeStruct((2, 4, 4, 1), jnp.float32)


class Net(nn.Module):
    """Two convolutions and batch norm, which compile fast."""

    classes: int = 4
    axis: str | None = None

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        x = nn.relu(nn.Conv(6, (3, 3), name="stem_conv")(x))
        y = nn.Conv(6, (3, 3), strides=2, padding=1, name="stage1_conv")(x)
        y = nn.relu(jt.models.BatchNorm(train, axis=self.axis, name="stage1_norm")(y))
        return {"stem": x, "stage1": y, "features": y.mean((1, 2)), "logits": nn.Dense(4, name="head")(y.mean((1, 2)))}


@functools.cache
def transformer():
    model = jt.models.vit(8, 1, 2, 4, patch=2)
    return model, moved(model.init(KEY, IMAGE))


@functools.cache
def convolutional():
    model = jt.models.linen(Net(), stages=("stem_.*", "stage1_.*", "head"))
    return model, moved(model.init(KEY, IMAGE))


def moved(tree, size=0.2):
    rng = np.random.default_rng(9)
    return jax.tree.map(lambda w: w + np.float32(size) * rng.uniform(size=w.shape).astype(np.float32), tree)


NETS = {
    "houlsby": lambda: jt.models.houlsby(*transformer(), bottleneck=3, own="head"),
    "pfeiffer": lambda: jt.models.pfeiffer(*transformer(), bottleneck=3),
    "deep prompts": lambda: jt.models.visual_prompts(*transformer(), prompts=2, deep=True, own="head"),
    "prefix": lambda: jt.models.prefix_tuning(*transformer(), prefix=2, own="head"),
    "residual": lambda: jt.models.residual_adapters(*convolutional(), own=".*norm|head"),
    "side_tuning": lambda: jt.models.side_tuning(*convolutional(), jt.models.linen(Net(), name="side"), classes=4),
    "ladder": lambda: jt.models.ladder(*convolutional(), classes=4, reduction=2),
}
QUICK = ("houlsby", "residual")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NETS])
def test_it_trains_alike_on_any_devices_and_leaves_the_base(name, tmp_path, mesh_of):
    net = NETS[name]()
    base = net.frozen["base"]
    handle = base if hasattr(base, "tree") else base["base"]
    before, found = jax.tree.map(np.array, handle.tree), {}
    data, objective = batches(np.random.default_rng(3), 4), jt.classification(net)
    for place, how in {"jit": {}, "mesh": {"mesh": mesh_of(4)}, "pmap": {"mesh": mesh_of(4), "mode": "pmap"}}.items():
        out = tmp_path / "run" if place == "mesh" else None
        fitted = jt.fit(objective, optax.sgd(0.2), data, steps=4, out=out, progress=False, **how)
        found[place] = jax.tree.map(np.array, (fitted.state.params, fitted.state.state))
    start = objective.init(KEY, data[0])
    for place in ("mesh", "pmap"):
        assert jax.tree.structure(found[place]) == jax.tree.structure(start)
        for a, b in zip(*map(jax.tree.leaves, (found["jit"], found[place])), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)
    for (path, a), b in zip(jt.tree.leaves_by_path(before).items(), jax.tree.leaves(handle.tree), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)
    saved = checkpoints.read(tmp_path / "run" / "checkpoints").leaves
    assert not [path for path in saved if "frozen" in path]
    floats = sum(np.size(leaf) for leaf in saved.values() if np.asarray(leaf).dtype == np.float32)
    assert floats == jt.tree.count(start)


def test_the_stages_partition_what_trains():
    for name, make in NETS.items():
        net = make()
        params = jax.eval_shape(lambda x, net=net: net.init(KEY, x), IMAGE)["params"]
        labels = jt.tree.label(params, {stage: stage for stage in net.stages})
        assert set(jax.tree.leaves(labels)) == set(net.stages), name


@pytest.mark.slow
def test_averages_teachers_and_frozen_heads_share_the_base():
    """The same handle: what is frozen travels once. Where the head is frozen, the adapters alone move."""
    model, variables = transformer()
    handle = jt.Frozen(variables)
    net = jt.models.adapt_former(model, handle, bottleneck=3, own="head")
    teacher = jt.frozen(model.named("teacher"), variables)
    assert teacher.variables == handle
    objective = jt.classification(net) + jt.distillation(net, teacher) + jt.distillation(net, jt.ema(net)).named("own")
    assert len(objective.frozen) == 1
    data = batches(np.random.default_rng(4), 3)
    optimizer = jt.optim.only(optax.sgd(0.3), "model/stage1")
    fitted = jt.fit(objective, optimizer, data, steps=3, progress=False)
    params = fitted.state.params["model"]
    np.testing.assert_array_equal(params["head"]["kernel"], variables["params"]["head"]["kernel"])
    assert np.any(params["stage1"]["mlp_adapter"]["up"]["kernel"])
    again = jt.models.adapt_former(model, teacher, bottleneck=3)
    assert again.frozen["base"] == handle


@pytest.mark.slow
def test_maml_through_adapters_at_their_zero_start_gives_the_meta_gradient():
    model, variables = transformer()
    net = jt.models.adapt_former(model, variables, bottleneck=3, scale=1.0)
    rng = np.random.default_rng(5)
    parts = batches(rng, 4, 8)

    def stacked(rows):
        return {name: np.stack([part[name] for part in rows]) for name in ("image", "label")}

    batch = {"support": stacked(parts[:2]), "query": stacked(parts[2:])}
    objective = jt.maml(jt.classification(net), inner=optax.sgd(0.5), steps=1)
    params, state = objective.init(KEY, batch)
    frozen = {handle: handle.tree for handle in objective.frozen}

    def ours(params):
        return objective(params, state, batch, jt.Context(key=KEY, frozen=frozen))[0]

    def loss(own, rows):
        logits = net.apply({"params": own, "frozen": {"base": variables}}, rows["image"], train=True, key=None)[0]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits["logits"]), rows["label"][:, None], 1)
        return -picked.mean()

    def by_hand(params):
        total = 0
        for task in range(2):
            support, query = ({n: v[task] for n, v in batch[part].items()} for part in ("support", "query"))
            own = params["model"]
            adapted = jax.tree.map(lambda w, g: w - 0.5 * g, own, jax.grad(loss)(own, support))
            total = total + loss(adapted, query) / 2
        return total

    got, expected = (jax.jit(jax.value_and_grad(run))(params) for run in (ours, by_hand))
    for (path, a), b in zip(jt.tree.leaves_by_path(got).items(), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=path)
    assert np.any(got[1]["model"]["stage1"]["mlp_adapter"]["down"]["kernel"])  # of the second order: the first is zero


@pytest.mark.slow
def test_a_base_in_half_precision_keeps_its_bits_and_what_trains_is_float32():
    _, variables = transformer()
    low = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), variables)
    half = jt.models.vit(8, 1, 2, 4, patch=2, dtype=jnp.bfloat16)
    image = batches(np.random.default_rng(6), 1)[0]["image"]
    expected = half.apply(low, image, train=False, key=None)[0]
    for make in (jt.models.houlsby, jt.models.pfeiffer, jt.models.parallel_adapter):
        net = make(half, low, bottleneck=3)
        start = net.init(KEY, image)
        assert {leaf.dtype for leaf in jax.tree.leaves(start)} == {jnp.dtype(jnp.float32)}
        outputs = net.apply(net.complete(start), image, train=True, key=None)[0]
        for name, value in expected.items():
            assert outputs[name].dtype == value.dtype
            np.testing.assert_array_equal(outputs[name], value)


@pytest.mark.slow
def test_a_base_may_have_a_frozen_base_itself():
    """Adapters trained before stay, as a base of new ones' prompts."""
    model, variables = transformer()
    image = batches(np.random.default_rng(7), 1)[0]["image"]
    first = jt.models.residual_adapters(*convolutional())
    own = moved(first.init(KEY, IMAGE))
    beside = jt.models.side_tuning(first, own, jt.models.linen(Net(), name="side"), alpha=None)
    start = beside.init(KEY, image)
    expected = first.apply(first.complete(own), image, train=False, key=None)[0]["logits"]
    got, _ = beside.apply(beside.complete(start), image, train=True, key=KEY)
    np.testing.assert_array_equal(got["logits"], expected)
    assert len(beside.handles) == 2
    with pytest.raises(jt.InputError, match="needs the blocks of a transformer"):
        jt.models.prefix_tuning(jt.models.houlsby(model, variables), first.init(KEY, IMAGE))


def elsewhere():
    """Parameters named as a transformer's, of a model that is no module of Linen."""
    model, variables = transformer()
    return jt.Model(model.init, lambda v, x, *, train, key: ({"logits": x.mean((1, 2))}, {}), "plain"), variables


def test_misuse_is_told_in_a_line():
    (vit, base), (net, weights), image = transformer(), convolutional(), np.zeros((2, 4, 4, 1), np.float32)
    other = jt.models.vit(8, 1, 2, 9, patch=2)
    no_model: Any = Net()

    def run(made):
        return made.apply(made.complete(made.init(KEY, image)), image, train=True, key=KEY)

    grouped = jt.models.linen(Grouped(), stages=("stem_.*", "stage1_.*"))
    wrong = {
        "houlsby needs the blocks of a transformer, layers with the parameters attention/query/kernel": (
            lambda: jt.models.houlsby(net, weights)
        ),
        "visual_prompts needs the blocks": lambda: jt.models.visual_prompts(net, weights),
        "residual_adapters needs convolutions larger than 1×1": lambda: jt.models.residual_adapters(vit, base),
        "residual_adapters, only: the pattern 'conv9'": lambda: jt.models.residual_adapters(net, weights, only="conv9"),
        "pfeiffer, only: the pattern 'stage7'": lambda: jt.models.pfeiffer(vit, base, only="stage7"),
        "bottleneck must be a whole number": lambda: jt.models.houlsby(vit, base, bottleneck=0),
        "needs a place": lambda: jt.models.parallel_adapter(vit, base, mlp=False),
        "prompts must be": lambda: jt.models.visual_prompts(vit, base, prompts=0),
        "prefix must be": lambda: jt.models.prefix_tuning(vit, base, prefix=-1),
        "expected the base's weights": lambda: jt.models.houlsby(vit, base["params"]),
        "got a list": lambda: jt.models.houlsby(vit, [base]),
        "takes a jt.Model": lambda: jt.models.houlsby(no_model, base),
        "is a twin": lambda: jt.models.houlsby(vit.twin("second", own="head"), base),
        "houlsby, own: the pattern 'haed' selects no parameter": lambda: run(jt.models.houlsby(vit, base, own="haed")),
        r"not those of model 'model' .*head/bias: expected \(9,\), got \(4,\).* own='head'": (
            lambda: run(jt.models.houlsby(other, base))
        ),
        "'plain' runs no layer of Flax Linen called stage1/": lambda: run(jt.models.houlsby(*elsewhere())),
        "take parallel=False": lambda: run(jt.models.residual_adapters(grouped, grouped.init(KEY, image))),
    }
    for message, make in wrong.items():
        with pytest.raises(jt.InputError, match=message) as told:
            make()
        assert "\n" not in str(told.value)
    run(jt.models.residual_adapters(grouped, grouped.init(KEY, image), parallel=False))
    twice = jt.models.with_heads(vit, projection=("logits", jt.models.head(3, batch_norm=False)))
    lost = jt.models.houlsby(twice, twice.init(KEY, image))
    with pytest.raises(jt.InputError, match="they lack encoder/stage1/"):
        lost.apply(lost.complete({"params": {}}), image, train=False, key=None)


class Grouped(nn.Module):
    """A convolution in groups, beside which no full 1×1 convolution stands."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="stem_conv")(x)
        return nn.Conv(4, (3, 3), feature_group_count=4, name="stage1_conv")(x).mean((1, 2))
