"""Models of several tasks: forward passes against NumPy in double precision, on any devices, with frozen parts."""

import jax
import numpy as np
import optax
import pytest

import jaxtransfer as jt

KEY = jax.random.key(2)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 6)).astype(np.float32)
IMAGES = RNG.normal(size=(4, 8, 8, 2)).astype(np.float32)


def head(size=3):
    return jt.models.head(size, batch_norm=False)


def encoder(width=5):
    return jt.models.mlp(4, hidden=(width,))


def made(model, inputs=X):
    """Variables with no zeros among them, the outputs in one program, and the parameters in double precision."""
    variables = model.init(KEY, inputs)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: np.float32(x + 0.3 * rng.normal(size=x.shape)), variables["params"])
    variables = {**variables, "params": params}
    outputs, _ = jax.jit(lambda v, x: model.apply(v, x, train=False, key=None))(variables, inputs)
    return variables, outputs, jax.tree.map(np.float64, params)


def affine(params, x):
    return x @ params["kernel"] + params["bias"]


def softmax(x):
    x = np.exp(x - x.max(1, keepdims=True))
    return x / x.sum(1, keepdims=True)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def expert(params, x):
    return np.maximum(affine(params["stage1"], x), 0)


def gated(params, x, vectors):
    return sum(share[:, None] * one for share, one in zip(softmax(affine(params["shares"], x)).T, vectors, strict=True))


def test_experts_are_mixed_by_each_task():
    _, outputs, params = made(jt.models.mmoe([encoder()] * 3, left=head(), right=head(2)))
    assert sorted(params) == ["expert0", "expert1", "expert2", "left", "left_gate", "right", "right_gate"]
    experts = [expert(params[f"expert{k}"], X) for k in range(3)]
    for task in ("left", "right"):
        mixed = gated(params[f"{task}_gate"], X, experts)
        close(outputs[f"{task}_gate"], softmax(affine(params[f"{task}_gate"]["shares"], X)))
        close(outputs[f"{task}_features"], mixed)
        close(outputs[task], affine(params[task]["dense1"], mixed))
    assert np.abs(outputs["left_features"] - outputs["right_features"]).max() > 0.1


def test_own_experts_are_of_one_task():
    _, outputs, params = made(jt.models.cgc([encoder()], [encoder()] * 2, left=head(), right=head()))
    for task in ("left", "right"):
        names = ["expert0", f"{task}_expert0", f"{task}_expert1"]
        mixed = gated(params[f"{task}_gate"], X, [expert(params[name], X) for name in names])
        close(outputs[task], affine(params[task]["dense1"], mixed))


def test_levels_are_mixed_one_after_another():
    levels = [([encoder()] * 2, [encoder()]), ([head(4)], [head(4)])]
    _, outputs, params = made(jt.models.ple(levels, left=head(), right=head()))
    first = {
        who: [expert(params[name], X) for name in names]
        for who, names in {"": ["expert0", "expert1"], "left": ["left_expert0"], "right": ["right_expert0"]}.items()
    }
    below = {task: gated(params[f"{task}_gate"], X, first[""] + first[task]) for task in ("left", "right")}
    shared = gated(params["gate"], X, first[""] + first["left"] + first["right"])
    for task in ("left", "right"):
        second = [
            affine(params["level2_expert0"]["dense1"], shared),
            affine(params[f"level2_{task}_expert0"]["dense1"], below[task]),
        ]
        mixed = gated(params[f"level2_{task}_gate"], below[task], second)
        close(outputs[f"{task}_features"], mixed)
        close(outputs[task], affine(params[task]["dense1"], mixed))


@pytest.mark.parametrize("at", [None, ["stage2"]])
def test_activations_are_stitched_together(at):
    net = jt.models.cross_stitch(jt.models.mlp(4, hidden=(5, 4)), at, left=head(), right=head(2))
    fresh = net.init(KEY, X)["params"]
    assert sorted(fresh["stitches"]) == sorted(at or ["stage1", "stage2"])
    np.testing.assert_allclose(fresh["stitches"]["stage2"], [[0.9, 0.1], [0.1, 0.9]], rtol=1e-6)
    _, outputs, params = made(net)
    x = [np.float64(X)] * 2
    for stage in ("stage1", "stage2"):
        x = [affine(params[f"{task}_encoder"][stage], own) for task, own in zip(("left", "right"), x, strict=True)]
        if stage in params["stitches"]:
            x = list(np.einsum("ts,sbd->tbd", params["stitches"][stage], x))
        x = [np.maximum(own, 0) for own in x]
    for task, own in zip(("left", "right"), x, strict=True):
        close(outputs[f"{task}_features"], own)
        close(outputs[task], affine(params[task]["dense1"], own))


def test_stitches_read_from_a_file_are_arrays_of_numpy():
    net = jt.models.cross_stitch(encoder(), left=head(), right=head(2))
    variables, outputs, _ = made(net)
    found, _ = net.apply(jax.device_get(variables), X, train=False, key=None)
    np.testing.assert_allclose(found["right"], outputs["right"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_task_reads_maps_through_its_masks():
    net = jt.models.small_cnn(3, width=2)
    model = jt.models.task_attention(net, ("stem", "stage1", "stage2"), left=head(), right=head())
    variables, outputs, params = made(model, IMAGES)
    maps = [np.float64(outputs[name]) for name in ("stem", "stage1", "stage2")]

    def normed(params, name, x):
        x = np.einsum("bhwc,cd->bhwd", x, params[f"{name}_conv"]["kernel"][0, 0]) + params[f"{name}_conv"]["bias"]
        return x / np.sqrt(1 + 1e-5) * params[f"{name}_norm"]["scale"] + params[f"{name}_norm"]["bias"]

    for task in ("left", "right"):
        own, picked = params[f"{task}_attention"], None
        for number, seen in enumerate(maps, 1):
            features = seen
            if picked is not None:
                passed = np.maximum(normed(own, f"pass{number}", picked), 0)
                if passed.shape[1] != features.shape[1]:
                    b, h, w, c = passed.shape
                    passed = passed.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))
                seen = np.concatenate([features, passed], -1)
            hidden = np.maximum(normed(own, f"hidden{number}", seen), 0)
            picked = features / (1 + np.exp(-normed(own, f"mask{number}", hidden)))
        close(outputs[f"{task}_features"], picked.mean((1, 2)))
        close(outputs[task], affine(params[task]["dense1"], picked.mean((1, 2))))
    assert set(variables["batch_stats"]) == {"encoder", "left_attention", "right_attention"}


def models():
    cnn = jt.models.small_cnn(3, width=2)
    return {
        "mmoe": jt.models.mmoe([cnn] * 2, left=head(), right=head()),
        "ple": jt.models.ple([([cnn], [cnn]), ([head(4)], [head(4)])], left=head(), right=head()),
        "cross_stitch": jt.models.cross_stitch(cnn, left=head(), right=head()),
        "task_attention": jt.models.task_attention(cnn, ("stage1", "stage2"), left=head(), right=head()),
    }


def tasks_of(model):
    return sum(
        jt.multitask.masked(jt.classification(model, output=task, label=task), f"has_{task}").named(task)
        for task in ("left", "right")
    )


def a_batch(seed):
    rng = np.random.default_rng(seed)
    labels = {task: rng.integers(0, 3, 8) for task in ("left", "right")}
    known = {f"has_{task}": rng.integers(0, 2, 8).astype(bool) for task in labels}
    labels = {task: np.where(known[f"has_{task}"], one, -1) for task, one in labels.items()}
    return {"image": rng.normal(size=(8, 8, 8, 2)).astype(np.float32), **labels, **known}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mmoe", "ple", "cross_stitch", "task_attention"])
def test_they_train_alike_on_any_devices(name, mesh_of):
    model = models()[name]
    shared = {"task_attention": "model/encoder", "cross_stitch": "model/.*_encoder"}.get(name, "model/expert.*")
    objective = jt.balance(tasks_of(model), jt.multitask.pcgrad, shared=shared)
    ended = []
    for place in ({}, {"mesh": mesh_of(4)}, {"mesh": mesh_of(4), "mode": "pmap"}):
        state = jt.init(objective, optax.sgd(0.05), KEY, a_batch(0))
        step = jt.train_step(objective, optax.sgd(0.05), **place)
        for seed in range(2):
            state, metrics = step(state, a_batch(seed))
        ended.append(jt.tree.leaves_by_path(jax.tree.map(np.array, (state.params, state.state, dict(metrics)))))
    for other in ended[1:]:
        for path, leaf in ended[0].items():
            np.testing.assert_allclose(other[path], leaf, rtol=1e-4, atol=1e-5, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mmoe", "ple", "cross_stitch", "task_attention"])
def test_a_frozen_part_keeps_its_statistics(name):
    model = models()[name]
    frozen = {"task_attention": "left_attention", "cross_stitch": "left_encoder"}.get(name, "expert0")
    objective, optimizer = tasks_of(model), jt.optim.freeze(optax.sgd(0.1), f"model/{frozen}")
    before = jt.init(objective, optimizer, KEY, a_batch(0))
    kept = jax.tree.map(np.array, (before.params["model"], before.state["model"]["batch_stats"]))
    after, _ = jt.train_step(objective, optimizer)(before, a_batch(0))
    for old, new in zip(kept, (after.params["model"], after.state["model"]["batch_stats"]), strict=True):
        for part in old:
            same = [np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (old[part], new[part])), strict=True)]
            assert all(same) if part == frozen else not all(same), part


def test_each_parameter_is_in_one_stage():
    for model in models().values():
        paths = jt.tree.leaves_by_path(jax.eval_shape(model.init, KEY, IMAGES)["params"])
        for path in paths:
            assert sum(jt.tree.matches(path, stage) for stage in model.stages) == 1, (path, model.stages)


def test_nonsense_is_refused():
    cnn, mlp = jt.models.small_cnn(3, width=2), encoder()
    for make, told in (
        (lambda: jt.models.mmoe([], left=head()), "a shared expert on each level"),
        (lambda: jt.models.mmoe([mlp]), "a head for each task"),
        (lambda: jt.models.mmoe([mlp], expert0=head()), "two parts of the model are called 'expert0'"),
        (lambda: jt.models.cross_stitch(mlp, "stage1", left=head()), "names of layers in a list"),
        (lambda: jt.models.task_attention(cnn, "stage1", left=head()), "a tuple of names of maps"),
        (lambda: jt.models.mmoe([mlp.twin("other")], left=head()), "is a twin"),
    ):
        with pytest.raises(jt.InputError, match=told):
            make()
    for model, inputs, told in (
        (jt.models.mmoe([mlp, encoder(6)], left=head()), X, "vectors of one shape"),
        (jt.models.cross_stitch(mlp, ["stage7"], left=head()), X, "has no layer 'stage7'; it calls .*stage1"),
        (jt.models.task_attention(cnn, ("nope",), left=head()), IMAGES, "nope"),
        (jt.models.task_attention(cnn, ("features",), left=head()), IMAGES, r"maps \[B, H, W, C\]"),
    ):
        with pytest.raises(jt.InputError, match=told):
            model.init(KEY, inputs)


def test_missing_labels_are_masked():
    """A masked task is that of the rows which have a label; one without any is 0, and so is its gradient."""
    net = jt.models.with_heads(encoder(), left=head(), right=head())
    batch = a_batch(3) | {"input": X, "has_right": np.zeros(8), "mask": np.float32([1, 1, 0, 1, 2, 1, 1, 1])}
    del batch["image"]
    term = jt.classification(net, view="input", output="left", label="left")
    params, state = jt.multitask.masked(term, "has_left").init(KEY, batch)
    known = (batch["mask"] > 0) & batch["has_left"]
    assert 0 < known.sum() < 8

    def value(objective, batch):
        def loss(params):
            value, _, metrics = objective(params, state, batch, jt.Context(key=KEY))
            return value, metrics

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (loss, metrics), gradient = value(jt.multitask.masked(term, "has_left"), batch)
    rows = {name: leaf[known] for name, leaf in batch.items()}
    (want, told), expected = value(term, rows)
    close(loss, want)
    assert float(metrics["accuracy"].value) == pytest.approx(float(told["accuracy"].value))
    for got, leaf in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        close(got, leaf)
    other = jt.classification(net, view="input", output="right", label="right").named("right")
    both = jt.multitask.masked(term.named("left") + other, "has_right")
    (loss, _), gradient = value(both, batch)
    assert float(loss) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    with pytest.raises(jt.InputError, match="no column 'has_middle'"):
        value(jt.multitask.masked(term, "has_middle"), batch)
    with pytest.raises(jt.InputError, match="one entry per example"):
        value(jt.multitask.masked(term, "has_left"), batch | {"has_left": np.ones(3)})
    with pytest.raises(jt.InputError, match=r"labels of 'left' must be in \[0, 3\)"):
        jt.init(jt.multitask.masked(term, "all"), optax.sgd(0.1), KEY, batch | {"all": np.ones(8)})
