"""Runs of deltas: small, read back on their base, and refused on another one."""

import json
import shutil

import jax
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.runs.deltas import folded

D = jt.deltas
PART = D.chain(low=D.lora(2, alpha=3).on("stage1"), head=D.full().on("head"))


def training_on(model, seed=0):
    rng = np.random.default_rng(seed)
    images, labels = rng.integers(0, 255, (32, 4, 4, 1), np.uint8), rng.integers(0, 3, 32)
    dataset = jt.data.Dataset.from_columns(
        image=images, label=labels.astype(np.int32), class_names={"label": ["a", "b", "c"]}
    )
    return jt.classification(model), optax.adam(0.05), jt.data.pipeline(dataset, 8, seed=seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base's run, `base`, and that of a delta on it, `sub/delta`, made from the folder above by relative paths."""
    root = tmp_path_factory.mktemp("deltas")
    model = jt.models.normalize(jt.models.mlp(3, hidden=(6,)), 0.5, 0.25)
    jt.fit(*training_on(model), steps=3, out=root / "base", model=model, progress=False)
    base = jt.load_run(root / "base")
    net = D.delta(base.model, base.variables, PART)
    fitted = jt.fit(
        *training_on(net, 1), steps=4, out=root / "sub" / "delta", model=net, config={"base": "base"}, progress=False
    )
    return root, net, fitted


def outputs(model, variables):
    x = np.random.default_rng(5).integers(0, 255, (4, 4, 4, 1), np.uint8)
    return np.asarray(model.apply(model.complete(variables), x, train=False, key=None)[0]["logits"])


def test_a_delta_is_read_on_its_base(folder):
    root, net, fitted = folder
    expected = outputs(net, {"params": fitted.state.params["model"]})
    run = jt.load_run(root / "sub" / "delta")  # the base stands in a folder above the delta's
    assert run.class_names == ("a", "b", "c")
    np.testing.assert_array_equal(outputs(run.model, run.variables), expected)
    assert (
        np.abs(expected - outputs(jt.load_run(root / "base").model, jt.load_run(root / "base").variables)).max() > 0.01
    )
    whole = folded(run)
    assert "delta" not in whole.config
    np.testing.assert_allclose(outputs(whole.model, whole.variables), expected, rtol=1e-6, atol=1e-6)
    assert folded(whole) is whole


def test_a_base_can_be_given_as_a_run_a_place_or_variables_and_is_held_once(folder):
    root, net, fitted = folder
    base = jt.load_run(root / "base")
    expected = outputs(net, {"params": fitted.state.params["model"]})
    for given in (base, root / "base", str(root / "base"), base.variables):
        run = jt.load_run(root / "sub" / "delta", base=given)
        np.testing.assert_array_equal(outputs(run.model, run.variables), expected)
    one, other = (jt.load_run(root / "sub" / "delta", base=base).model for _ in range(2))
    assert D.base_of(one) is D.base_of(other)


def test_another_base_is_refused(folder, tmp_path):
    root, net, _ = folder
    base = jt.load_run(root / "base")
    off = jax.tree.map(np.array, base.variables)
    off["params"]["head"]["bias"][0] += 1e-6
    with pytest.raises(jt.InputError, match=r"delta on the base with the digest .* another one, or has changed"):
        jt.load_run(root / "sub" / "delta", base=off)
    with pytest.raises(jt.InputError, match="got a int"):
        jt.load_run(root / "sub" / "delta", base=3)
    with pytest.raises(jt.InputError, match="base= is of a run of a delta"):
        jt.load_run(root / "base", base=base)
    with pytest.raises(jt.InputError, match="is a delta itself"):
        jt.load_run(root / "sub" / "delta", base=root / "sub" / "delta")
    moved = D.delta(base.model, off, PART)
    with pytest.raises(jt.InputError, match="make it on the base that the run was trained on"):
        jt.load_run(root / "sub" / "delta", model=moved)
    assert jt.load_run(root / "sub" / "delta", model=net).model is net


def test_the_encoder_of_a_base_of_several_tasks_is_found(folder):
    root, net, fitted = folder
    base = jt.load_run(root / "base").variables
    several = {"params": {"encoder": base["params"], "heads": {"who": {"bias": np.zeros(2, np.float32)}}}}
    run = jt.load_run(root / "sub" / "delta", base=several)
    np.testing.assert_array_equal(
        outputs(run.model, run.variables), outputs(net, {"params": fitted.state.params["model"]})
    )


def test_a_delta_is_merged_into_the_step_it_stands_on(folder, tmp_path):
    """The base went on to a better step since, which stands on other weights."""
    from jaxtransfer.cli.merge_runs import read_deltas

    root, net, fitted = folder
    shutil.copytree(root / "base", tmp_path / "base")
    shutil.copytree(root / "sub" / "delta", tmp_path / "delta")
    config = json.loads((tmp_path / "delta" / "config.json").read_text())
    config["delta"]["base"]["step"] = 3
    (tmp_path / "delta" / "config.json").write_text(json.dumps(config))
    further = jt.load_run(tmp_path / "base").model
    jt.fit(*training_on(further), steps=5, out=tmp_path / "base", model=further, progress=False, keep=9)
    assert jt.load_run(tmp_path / "base").step == 5
    ((member,), _) = read_deltas([str(tmp_path / "base"), str(tmp_path / "delta")])
    expected = D.merged(net, {"params": fitted.state.params["model"]})
    jax.tree.map(np.testing.assert_array_equal, member.variables["params"], jax.device_get(expected["params"]))


def test_a_base_that_moved_or_changed_is_one_line(folder, tmp_path):
    root, _, _ = folder
    alone = tmp_path / "delta"
    shutil.copytree(root / "sub" / "delta", alone)
    with pytest.raises(jt.InputError, match=r"its base is not where it was, base; move it back, .*base=") as caught:
        jt.load_run(alone)
    assert "\n" not in str(caught.value)
    shutil.copytree(root / "base", tmp_path / "base")  # both moved: found again
    assert jt.load_run(alone).step == 4
    config = json.loads((alone / "config.json").read_text())
    config["delta"]["base"]["digest"] = "0" * 32
    (alone / "config.json").write_text(json.dumps(config))
    with pytest.raises(jt.InputError, match=r"digest 00000000, and .*base has [0-9a-f]{8}: it is another one"):
        jt.load_run(alone)
    config["delta"]["base"] = {"digest": "0" * 32}
    (alone / "config.json").write_text(json.dumps(config))
    with pytest.raises(jt.InputError, match="its base is not noted"):
        jt.load_run(alone)
    config["delta"]["base"] = "base"
    (alone / "config.json").write_text(json.dumps(config))
    with pytest.raises(jt.InputError, match="'delta' should be an object"):
        jt.load_run(alone)


def test_it_resumes_to_the_same_bits_and_not_on_another_base(folder, tmp_path):
    root, _, fitted = folder
    base = jt.load_run(root / "base")

    def go(variables, steps):
        net = D.delta(base.model, variables, PART)
        return jt.fit(
            *training_on(net, 1), steps=steps, out=tmp_path / "run", model=net, config={"base": "base"}, progress=False
        )

    go(base.variables, 2)
    again = go(base.variables, 4)
    for a, b in zip(*map(jax.tree.leaves, (again.state.params, fitted.state.params)), strict=True):
        np.testing.assert_array_equal(a, b)
    off = jax.tree.map(lambda leaf: leaf + 1, base.variables)
    with pytest.raises(jt.InputError, match="delta"):
        go(off, 6)


def test_a_delta_of_ones_own_needs_its_model(folder, tmp_path):
    root, _, _ = folder
    base = jt.load_run(root / "base")
    part = D.leafwise(lambda key, w: np.zeros(w.shape, np.float32), lambda w, own: w.value + own)
    net = D.delta(base.model, base.variables, part, only="head/kernel")
    jt.fit(*training_on(net), steps=1, out=tmp_path / "own", model=net, config={"base": root / "base"}, progress=False)
    with pytest.raises(jt.InputError, match=r"delta of your own making.*model="):
        jt.load_run(tmp_path / "own")
    assert jt.load_run(tmp_path / "own", model=net).model is net


def test_what_is_in_it_and_what_leaves_it(folder, tmp_path):
    root, net, fitted = folder
    found = jt.inspect_weights(root / "sub" / "delta")
    assert found.trained == 16 * 2 + 2 * 6 + 6 * 3 + 3
    assert found.frozen == 16 * 6 + 6 + 6 * 3 + 3
    assert "trained: 65 values; frozen, in its base: 123" in str(found)
    assert (found.as_entries()["trained"], found.as_entries()["frozen"]) == (65, 123)
    assert jt.inspect_weights(root / "base").frozen == 0
    jt.export_weights(root / "sub" / "delta", tmp_path / "a.safetensors")
    base = jt.load_run(root / "base")
    for source in (tmp_path / "a.safetensors", root / "sub" / "delta"):
        loaded = jt.load_pretrained(source, base.model, inputs=np.zeros((1, 4, 4, 1), np.uint8))
        np.testing.assert_allclose(
            outputs(loaded.model, loaded.variables), outputs(net, {"params": fitted.state.params["model"]}), rtol=1e-5
        )
    size = sum(file.stat().st_size for file in (root / "sub" / "delta" / "checkpoints").rglob("*") if file.is_file())
    assert size < 100_000
