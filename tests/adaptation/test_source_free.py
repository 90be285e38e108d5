"""Source-free and test-time adaptation: each method against its formula, the contract, and runs that go on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from tests.contract import KEY, assert_same_on_any_devices, batches, normalised

A = jt.adaptation
METHODS = {"shot": lambda model: A.shot(model, examples=8), "tent": lambda model: A.tent(model)}
METHOD = [pytest.param("shot"), pytest.param("tent", marks=pytest.mark.slow)]


def softmax(logits):
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


@pytest.mark.parametrize("name", METHOD)
def test_contract(name, mesh_of):
    ended = assert_same_on_any_devices(
        lambda model: jt.classification(model).on("source") + METHODS[name](model), mesh_of
    )
    assert any(path.split("/", 1)[-1] == name for path in ended)


@pytest.fixture
def given(rng):
    """A model, a batch of the target whose mask leaves one out, a state, and the logits in training mode."""
    model, batch = normalised([]), {"target": batches(rng, 1, 6)[0]}
    batch["target"]["mask"] = np.float32([1, 1, 0, 1, 1, 1])
    state = jt.init(A.tent(model), optax.sgd(0.1), KEY, batch)
    variables = {"params": state.params["model"], **state.state["model"]}
    logits = jax.jit(lambda x: model.apply(variables, x, train=True, key=None)[0]["logits"])
    return model, batch, state, np.float64(logits(batch["target"]["image"]))


def value_of(objective, state, batch, **entries):
    run = jax.jit(lambda params, own, batch: objective(params, own, batch, jt.Context(key=KEY)))
    value, _, metrics = run(state.params, {**state.state, **entries}, batch)
    return float(value), {name: float(one.value) for name, one in metrics.items()}


def test_tent_is_the_mean_entropy(given):
    model, batch, state, logits = given
    value, metrics = value_of(A.tent(model), state, batch)
    p = softmax(logits)[batch["target"]["mask"] > 0]
    np.testing.assert_allclose(value, -np.mean(np.sum(p * np.log(p), axis=1)), rtol=1e-5)
    assert metrics == {"tent": pytest.approx(value)}


def test_shot_is_information_and_the_labels_of_the_state(given):
    model, batch, state, logits = given
    batch["target"]["index"] = np.int32([3, 0, 7, 5, 1, 2])
    label = np.int32([2, -1, 1, 0, 3, 3, 0, 1])  # one of the batch has none yet
    objective = A.shot(model, examples=8, strength=0.7, eps=1e-3)
    value, metrics = value_of(objective, state, batch, model_target_shot={"label": label})
    keep = batch["target"]["mask"] > 0
    p, own = softmax(logits)[keep], label[batch["target"]["index"]][keep]
    mean = p.mean(0)
    information = np.mean(-np.sum(p * np.log(p + 1e-3), 1)) + np.sum(mean * np.log(mean + 1e-3))
    taught = sum(-np.log(row[y]) for row, y in zip(p, own, strict=True) if y >= 0) / len(p)
    np.testing.assert_allclose(value, information + 0.7 * taught, rtol=1e-5)
    np.testing.assert_allclose([metrics["shot/information"], metrics["shot/labels"]], [information, taught], rtol=1e-4)
    none, _ = value_of(objective, state, batch, **objective.init(KEY, batch)[1])
    np.testing.assert_allclose(none, information, rtol=1e-4)
    batch["target"]["index"] = np.where(keep, batch["target"]["index"], -1)  # padding has no number
    assert value_of(objective, state, batch, model_target_shot={"label": label})[0] == pytest.approx(value)
    batch["target"]["index"] = batch["target"]["index"] + np.int32(5)
    wrong, _ = value_of(objective, state, batch, model_target_shot={"label": label})
    assert np.isnan(wrong)  # rather than another example's label


def centroid_loop(features, logits, rounds=2, least=0):
    """As released, by loops: cosine distances to the centroids of classes that are there."""
    p = softmax(logits)
    f = np.array([np.append(row, 1) / np.sqrt(row @ row + 1) for row in features])
    label = [int(row.argmax()) for row in p]
    for _ in range(rounds):
        best = [(2.0, -1)] * len(f)
        for k in range(p.shape[1]):
            if label.count(k) <= least:
                continue
            c = sum(w * row for w, row in zip(p[:, k], f, strict=True))
            for n, row in enumerate(f):
                best[n] = min(best[n], (1 - row @ c / np.sqrt(c @ c), k))
        label = [k for _, k in best]
        p = np.eye(p.shape[1])[label]
    return np.array(label)


@pytest.mark.parametrize(("rounds", "least"), [(1, 0), (2, 0), (3, 4)])
def test_labels_are_the_nearest_centroids(rng, rounds, least):
    features = rng.normal(size=(40, 3)) + 2 * np.eye(3)[rng.integers(0, 3, 40)]
    logits = features @ rng.normal(size=(3, 5)) - [0, 0, 0, 30, 0]  # nobody is of the fourth class
    found = A.nearest_centroids(features, logits, rounds=rounds, least=least)
    np.testing.assert_array_equal(found, centroid_loop(features, logits, rounds, least))
    assert 3 not in found
    assert np.any(found != logits.argmax(1))
    with pytest.raises(jt.InputError, match="no class has more than least=40"):
        A.nearest_centroids(features, logits, least=40)


class Stopped(Exception):
    pass


@pytest.fixture
def target(rng):
    images = np.concatenate([one["image"] for one in batches(rng, 3, 4)])
    numbers = np.arange(12, dtype=np.int32)
    batch = [{"image": images[rows], "index": numbers[rows]} for rows in (rng.permutation(12)[:8] for _ in range(6))]
    whole = [{"image": images[:8]}, {"image": np.concatenate([images[8:]] * 2), "mask": np.float32([1] * 4 + [0] * 4)}]
    return [{"target": one} for one in batch], whole


def adapt(target, model, start, out=None, stop=None, **how):
    data, whole = target

    def log(record):
        if stop is not None and record["step"] >= stop:
            raise Stopped

    optimizer = jt.optim.freeze(optax.sgd(0.1, momentum=0.9), "model/head", adapt_statistics=True)
    how = {"save_every": 1, "log_every": 1, "steps": 6, "progress": False, "log": log, **start, **how}
    refresh = jt.Refresh(2, A.shot_labels(model, whole))
    return jt.fit(A.shot(model, examples=12), optimizer, data, out=out, refresh=refresh, **how).state


@pytest.mark.slow
def test_shot_goes_on_to_the_same_bits_and_its_head_stays(target, tmp_path):
    model = normalised([])
    variables = jax.tree.map(np.array, model.init(KEY, target[0][0]["target"]["image"]))
    params = {"model": variables["params"]}
    start = {"params": params, "state": {"model": {"batch_stats": variables["batch_stats"]}}}
    whole = adapt(target, model, start)
    with pytest.raises(Stopped):
        adapt(target, model, start, tmp_path / "run", stop=3)
    again = adapt(target, model, start, tmp_path / "run")
    for a, b in zip(*(jax.tree.leaves((one.params, one.state)) for one in (whole, again)), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(whole.params["model"]["head"]["kernel"], params["model"]["head"]["kernel"])
    assert np.any(whole.params["model"]["body"]["kernel"] != params["model"]["body"]["kernel"])
    assert np.all(whole.state["model_target_shot"]["label"] >= 0)


def test_shot_labels_reads_the_whole_target_by_number(target, rng):
    model, (_, whole) = normalised([]), target
    objective = A.shot(model, examples=12)
    state = jt.init(objective, optax.sgd(0.1), KEY, target[0][0])
    label = A.shot_labels(model, whole)(state)["model_target_shot"]["label"]
    variables = {"params": state.params["model"], **state.state["model"]}
    images = np.concatenate([whole[0]["image"], whole[1]["image"][:4]])
    found = jax.jit(lambda x: model.apply(variables, x, train=False, key=None)[0])(images)
    np.testing.assert_array_equal(label, centroid_loop(np.float64(found["features"]), np.float64(found["logits"])))
    order = rng.permutation(12).astype(np.int32)
    mixed = [{"image": images[order[:8]], "index": order[:8]}, {"image": images[order[8:]], "index": order[8:]}]
    np.testing.assert_array_equal(A.shot_labels(model, mixed)(state)["model_target_shot"]["label"], label)
    with pytest.raises(jt.InputError, match="each of the 12 examples of the target once; its batches have 8"):
        A.shot_labels(model, mixed[:1])(state)
    with pytest.raises(jt.InputError, match="at least one example"):
        A.shot_labels(model, [])(state)
    with pytest.raises(jt.InputError, match="reads the target again"):
        A.shot_labels(model, iter(whole))
    with pytest.raises(jt.InputError, match="rounds of at least 1"):
        A.shot_labels(model, whole, rounds=0)


def t3a_loop(kernel, bias, stream, keep):
    """As released: all supports in a list, of which each class keeps those of least entropy; unit sums classify."""

    def entropy(z):
        p = softmax((z @ kernel + bias)[None])[0]
        return -(p * np.log(p)).sum()

    def predicted(z):
        return int((z @ kernel + bias).argmax())

    supports, scores = [(entropy(w), predicted(w), w) for w in kernel.T], []
    for batch in stream:
        supports += [(entropy(z), predicted(z), z) for z in batch]
        templates = np.zeros_like(kernel)
        for k in range(kernel.shape[1]):
            mine = sorted((one for one in supports if one[1] == k), key=lambda one: one[0])[:keep]
            total = sum((z / np.linalg.norm(z) for _, _, z in mine), np.zeros(len(kernel)))
            templates[:, k] = total / max(np.linalg.norm(total), 1e-12)
        scores.append(batch @ templates)
    return np.concatenate(scores)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [1, 3, 50])
def test_t3a_is_the_released_loop_over_a_stream(rng, keep):
    kernel, bias = rng.normal(size=(5, 4)), 0.3 * rng.normal(size=4)
    stream = rng.normal(size=(3, 8, 5))
    bias[3] = -9  # a class that none is taken for, its own template not either
    step = jax.jit(lambda templates, z: A.t3a(templates, z, z @ kernel + bias[None]))
    with jax.enable_x64(True):
        templates, scores = A.t3a_templates(jnp.asarray(kernel), jnp.asarray(bias), keep=keep), []
        for batch in stream:
            one, templates = step(templates, jnp.asarray(batch))
            scores.append(np.asarray(one))
    np.testing.assert_allclose(np.concatenate(scores), t3a_loop(kernel, bias, stream, keep), rtol=1e-9, atol=1e-12)
    assert not np.any(np.concatenate(scores)[:, 3])


@pytest.mark.slow
def test_t3a_of_a_model_leaves_padding_out(rng):
    model, (batch,) = normalised([]), batches(rng, 1, 8)
    variables = model.init(KEY, batch["image"])
    padded = [{"image": batch["image"][:5]}, {"image": batch["image"][[5, 6, 7, 0, 0]], "mask": [1, 1, 1, 0, 0]}]
    found = A.t3a_predictions(model, variables, padded, keep=3)
    features = jax.jit(lambda x: model.apply(variables, x, train=False, key=None)[0]["features"])(batch["image"])
    head = jax.tree.map(np.float64, variables["params"]["head"])
    expected = t3a_loop(head["kernel"], head["bias"], np.split(np.float64(features), [5]), 3)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(jt.InputError, match="at least one example"):
        A.t3a_predictions(model, variables, [])
    kernel = np.float32(head["kernel"])
    deep = jt.Model(model.init, model.apply, stages=("body", "none"))
    with pytest.raises(jt.InputError, match="a linear head, one kernel"):
        A.t3a_predictions(deep, variables, padded)
    with pytest.raises(jt.InputError, match="at least 1 feature"):
        A.t3a_templates(kernel, keep=0)
    with pytest.raises(jt.InputError, match=r"bias \[C\]; got \(8, 4\) and \(8,\)"):
        A.t3a_templates(kernel, np.zeros(8), keep=1)
    with pytest.raises(jt.InputError, match=r"features \[B, 8\] and logits \[B, 4\]"):
        A.t3a(A.t3a_templates(kernel, keep=1), np.zeros((2, 7)), np.zeros((2, 4)))


@pytest.fixture(scope="module")
def small():
    """A network whose batch norm is Linen's, its variables, and images of another brightness."""
    model = jt.models.small_cnn(3, width=2)
    images = np.random.default_rng(0).normal(size=(12, 8, 8, 1)).astype(np.float32) * 3 + 1
    return model, jax.tree.map(np.array, model.init(KEY, images[:2])), images


def test_norm_parameters_are_those_with_statistics(small):
    model, variables, _ = small
    names = {f"model/{layer}_norm/{kind}" for layer in ("stem", "stage1", "stage2") for kind in ("scale", "bias")}
    patterns = A.norm_parameters(model, variables)
    paths = jt.tree.leaves_by_path({"model": variables["params"]})
    assert {path for path in paths if jt.tree.matches(path, patterns)} == names
    assert len(patterns) == 6
    with pytest.raises(jt.InputError, match="no layer with both running statistics and parameters"):
        A.norm_parameters(jt.models.mlp(3), {"params": {"head": {"kernel": np.zeros((2, 3))}}})
    with pytest.raises(jt.InputError, match="no layer with both"):
        A.dsbn(normalised([]), normalised([]).init(KEY, np.zeros((2, 4, 4, 1))))  # its scale is no layer of its own


@pytest.mark.slow
def test_tent_moves_scales_and_shifts_alone_and_lowers_the_entropy(small):
    model, variables, images = small
    optimizer = jt.optim.only(optax.adam(0.05), A.norm_parameters(model, variables))
    start = {"params": {"model": variables["params"]}, "state": {"model": {"batch_stats": variables["batch_stats"]}}}
    seen = []
    data = [{"target": {"image": images}}] * 8
    log = {"log": seen.append, "log_every": 1, "progress": False}
    state = jt.fit(A.tent(model), optimizer, data, steps=8, **start, **log).state
    for path, leaf in jt.tree.leaves_by_path(state.params["model"]).items():
        assert np.array_equal(leaf, jt.tree.leaves_by_path(variables["params"])[path]) == ("norm" not in path), path
    values = [record["train/tent"] for record in seen if "train/tent" in record]
    assert values[-1] < values[0] - 0.02


@pytest.mark.slow
def test_ada_bn_has_the_statistics_of_the_target_and_the_weights_of_the_source(small):
    model, variables, images = small
    found = A.ada_bn(model, variables, [{"image": images}])
    same = jax.tree.map(np.array_equal, found["params"], variables["params"])
    assert all(jax.tree.leaves(same))
    stem = jax.lax.conv_general_dilated(
        images, variables["params"]["stem_conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    stats = found["batch_stats"]["stem_norm"]
    np.testing.assert_allclose(stats["mean"], np.mean(stem, (0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats["var"], np.var(stem, (0, 1, 2)), rtol=1e-3)


def test_dsbn_shares_all_but_batch_norm(small):
    model, variables, _ = small
    inside = A.dsbn(model, variables, "inside")
    own = jt.tree.leaves_by_path(inside.own(variables["params"]))
    assert set(own) == {f"{layer}_norm/{kind}" for layer in ("stem", "stage1", "stage2") for kind in ("scale", "bias")}
    assert inside.name == "inside"
    assert inside.family[1] is model


def test_bad_input_is_one_clear_error(given):
    model, batch, _, _ = given

    def refused(make, match, batch=batch):
        with pytest.raises(jt.InputError, match=match):
            jt.init(make(), optax.sgd(0.1), KEY, batch)

    refused(lambda: A.shot(model, examples=0), "examples must be at least 1")
    refused(lambda: A.shot(model, examples=3, strength=-1), "strength must be finite")
    refused(lambda: A.shot(model, examples=3), r"index must be in \[0, 3\)")
    refused(lambda: A.tent(model, output="logit"), "unknown output")
    unnumbered = {"target": {k: v for k, v in batch["target"].items() if k != "index"}}
    refused(lambda: A.shot(model, examples=9), "number of each example", unnumbered)
    for method in (A.tent, lambda model: A.shot(model, examples=9)):
        refused(lambda method=method: method(model), "target", {"image": batch["target"]["image"]})
