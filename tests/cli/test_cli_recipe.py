"""What stays frozen, the moving average, bfloat16 and weights of classes, on the command line and in Python."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.cli.recipe import RecipeOptions
from jaxtransfer.runs.loggers import read_jsonl

NOISY = ("--data", "digits/noisy", "--split", "train[:64]", "--eval-split", "test[:32]", "--batch-size", "16")
SHORT = ("--steps", "4", "--eval-every", "2")


def test_one_run_with_all_of_them(run, refused, source, tmp_path):
    """Frozen layers and norms keep their bits, the rest moves; the average is what is read; all of it is float32."""
    out = tmp_path / "out"
    words = ("finetune", "--from", source, *NOISY, *SHORT, "--lr", "0.01", "--out", out, "--freeze", "stage1_conv")
    words += (
        "--freeze-bn",
        "--ema",
        "0.9",
        "--dtype",
        "bfloat16",
        "--class-weights",
        "3=2.5",
        "0=0",
        "--accumulate",
        "2",
    )
    run(*words)
    config = json.loads((out / "config.json").read_text())
    assert config["average"] == "model_ema"
    assert config["monitor"] == "average/accuracy"
    assert config["model_options"] == {"dtype": "bfloat16"}
    assert config["freeze"] == ["stage1_conv"]
    begun, own, average = (
        jt.tree.leaves_by_path(jt.load_run(where, **how).variables)
        for where, how in ((source, {}), (out, {"average": False, "checkpoint": "last"}), (out, {"checkpoint": "last"}))
    )
    for path, leaf in own.items():
        stays = "norm" in path or "stage1_conv" in path
        assert leaf.dtype == np.float32, path
        assert np.array_equal(leaf, begun[path]) == stays, path
        assert stays == np.array_equal(leaf, average[path]), path
    last = read_jsonl(out / "metrics.jsonl")[-1]
    assert {"eval/accuracy", "eval/average/accuracy", "eval/average"} <= last.keys()
    assert last["eval/loss"] == pytest.approx(last["eval/classification"])  # the average's stands beside it
    report = (out / "report.md").read_text()
    assert "(best average/accuracy)" in report
    assert "On digits/noisy (test[:32]), 32 examples. The best step is the one of the best average/accuracy" in report
    scores = json.loads(run("evaluate", out, "--split", "test[:32]")[0][0])
    best = max(read_jsonl(out / "metrics.jsonl"), key=lambda record: record.get("eval/average/accuracy", -1))
    assert scores["accuracy"] == pytest.approx(best["eval/average/accuracy"])
    for option, told in {
        "--ema 0.8": "ema: 0.9 there, 0.8 now",
        "--class-weights balanced": "class_weights: ['3=2.5', '0=0'] there, ['balanced'] now",
        "--dtype float32": "dtype: 'bfloat16' there, 'float32' now",
        "--freeze stage2_conv": "freeze: ['stage1_conv'] there, ['stage2_conv'] now",
    }.items():
        assert told in refused(*words, *option.split())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--freeze stage1_cnv", "--freeze 'stage1_cnv' selects no layer (did you mean 'stage1_conv'?); there are "),
        ("--freeze [", "'[' is no regular expression"),
        ("--freeze head", "--freeze selects the head, which is new"),
        ("--freeze .* --keep-head", "--freeze selects all layers"),
        (
            "--freeze head --keep-head --method lp-ft",
            "--freeze selects the head, which is all that a linear probe trains",
        ),
        ("--accumulate 3 --steps 4", "choose --steps so that they do, or --epochs"),
        ("--ema 1", "--ema is the share of the average that a step keeps, below 1; got 1"),
        ("--ema -1", "--ema must be positive and finite; got -1.0"),
        ("--dtype bfloat", "unknown dtype 'bfloat' (did you mean 'bfloat16'?)"),
        ("--class-weights 3", "--class-weights takes balanced, or CLASS=WEIGHT, from 0 on; got '3'"),
        ("--class-weights 3=-1", "got '3=-1'"),
        ("--class-weights 3=1 3=2", "'3' is there twice"),
        ("--class-weights three=1", "unknown class of digits/noisy, in --class-weights, 'three'"),
    ],
)
def test_what_can_not_be(refused, source, tmp_path, words, expected):
    out = tmp_path / "out"
    assert expected in refused("finetune", "--from", source, *NOISY, *SHORT, "--out", out, *words.split())
    assert not (out / "config.json").exists()


def test_a_whole_stage_may_be_frozen_under_rates_by_layer():
    params = {"net": {"stem": {"w": jnp.ones(2)}, "body": {"w": jnp.ones(2)}, "head": {"w": jnp.ones(2)}}}
    stages = ("net/stem", "net/body", "net/head")
    for optimizer in (
        jt.optim.layerwise_decay(optax.sgd(1.0), stages, decay=0.5),
        jt.optim.gradual_unfreeze(optax.sgd(1.0), stages, every=1),
    ):
        held = jt.optim.freeze(optimizer, "stem")
        updates, _ = held.update(params, held.init(params), params)
        assert np.all(updates["net"]["stem"]["w"] == 0)
        assert np.all(updates["net"]["head"]["w"] == -1)
    with pytest.raises(jt.InputError, match="must cover every parameter"):
        jt.optim.freeze(jt.optim.layerwise_decay(optax.sgd(1.0), stages[1:2], decay=0.5), "stem").init(params)


def test_batch_norms_are_the_layers_with_statistics():
    layer = {"scale": jnp.ones(2), "bias": jnp.ones(2)}
    params = {"net": {"a": {"norm": layer}, "norm": layer, "norms": layer}}
    state = {"net": {"batch_stats": {"a": {"norm": {"mean": jnp.ones(2)}}}}, "net_ema": {"batch_stats": {"b": layer}}}
    held = jt.optim.freeze(optax.sgd(1.0), jt.optim.batch_norms(params, state))
    updates, _ = held.update(params, held.init(params), params)
    moved = {path: bool(np.any(leaf)) for path, leaf in jt.tree.leaves_by_path(updates).items()}
    assert {path for path, moves in moved.items() if not moves} == {"net/a/norm/scale", "net/a/norm/bias"}
    assert jt.optim.batch_norms(params, {}) == ()
    with pytest.raises(jt.InputError, match="'net/a' keeps statistics and has no parameters"):
        jt.optim.batch_norms({"net": {"b": layer}}, {"net": {"batch_stats": {"a": {"mean": jnp.ones(2)}}}})


def test_balanced_weights():
    data = jt.data.Dataset.from_arrays(
        np.zeros((6, 2, 2, 1), np.uint8), [0, 0, 0, 2, 2, 3], class_names=["a", "b", "c", "d"]
    )
    np.testing.assert_allclose(jt.data.balanced_weights(data), [6 / (3 * 3), 0, 6 / (3 * 2), 6 / 3])
    with pytest.raises(jt.InputError, match=r"takes a jt\.data\.Dataset"):
        jt.data.balanced_weights([0, 1])


FAMILIES = ["mlp", "small-cnn", "conv4", "resnet20", "vgg11-bn", "vit-ti-4"]
REST = [pytest.param(name, marks=pytest.mark.slow) for name in sorted(jt.models.ZOO.keys() - set(FAMILIES))]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAMILIES, *REST])
def test_every_network_computes_in_bfloat16_and_keeps_float32(name):
    """Products in bfloat16; parameters, statistics and logits in float32. Traced, not compiled."""
    model, shape = jt.models.create(name, 3, dtype=jnp.bfloat16), jt.models.ZOO[name].image
    reads = len(shape) == 1  # tokens
    model = model if reads else jt.models.normalize(model, 0.5, 0.2)
    image = jax.ShapeDtypeStruct((2, *shape), np.int32 if reads else np.uint8)
    variables = dict(jax.eval_shape(model.init, jax.random.key(0), image))
    traced = jax.make_jaxpr(lambda v, x: model.apply(v, x, train=True, key=jax.random.key(0)), return_shape=True)
    program, (outputs, state) = traced(variables, image)
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, state))} == {np.dtype("float32")}
    assert outputs["logits"].dtype == np.float32
    products = [line for line in str(program).splitlines() if "conv_general_dilated[" in line or "dot_general[" in line]
    narrow = [line for line in products if ":bf16[" in line]
    attends = sum(path.endswith("query/kernel") for path in jt.tree.leaves_by_path(variables["params"]))
    wide = 1 + attends  # the head, and what attention weighs by a softmax in float32
    assert len(narrow) >= len(products) - wide
    assert narrow or name == "linear"


def test_rematerialisation_is_an_option_of_the_network_beside_its_type(refused, source, tmp_path):
    described = {"model_options": {"dtype": "bfloat16", "width": 2}}
    assert RecipeOptions(remat=True).entries(described) == {
        "model_options": {"dtype": "bfloat16", "width": 2, "remat": True}
    }
    both = RecipeOptions(remat=True, dtype="float32").entries(described)
    assert both == {"model_options": {"width": 2, "remat": True}}
    assert RecipeOptions().entries(described) == {}
    told = refused("finetune", "--from", source, *NOISY, *SHORT, "--out", tmp_path / "out", "--remat")
    assert "unknown option of " in told
    assert "'remat'" in told


@pytest.mark.slow
def test_float16_scales_the_loss_and_keeps_weights_in_float32(run, source, tmp_path):
    out = tmp_path / "out"
    run("finetune", "--from", source, *NOISY, *SHORT, "--out", out, "--dtype", "float16")
    records = [record for record in read_jsonl(out / "metrics.jsonl") if "train/loss" in record]
    assert [record["train/loss_scale"] for record in records]
    assert all(record["train/loss_scale"] == 2 ** round(np.log2(record["train/loss_scale"])) for record in records)
    assert all("train/loss_scale/skipped" in record for record in records)
    assert json.loads((out / "config.json").read_text())["model_options"]["dtype"] == "float16"
    assert {leaf.dtype for leaf in jax.tree.leaves(dict(jt.load_run(out).variables))} == {np.dtype("float32")}
