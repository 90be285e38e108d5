"""`finetune --delta`, and what the other commands make of its runs."""

import json
import shutil
from typing import Any

import cv2
import numpy as np
import pytest

import jaxtransfer as jt
from jaxtransfer.cli.registry.deltas import DELTAS

TRAIN = ("--data", "digits/inverted", "--steps", "4", "--batch-size", "32", "--eval-every", "4")


@pytest.fixture(scope="session")
def delta_run(source, tmp_path_factory):
    """A LoRA of rank 2 on `source`, whose head is new."""
    from jaxtransfer.cli import main

    out = tmp_path_factory.mktemp("deltas") / "lora"
    words = (
        "finetune",
        "--from",
        str(source),
        *TRAIN,
        "--delta",
        "lora",
        "--rank",
        "2",
        "--lr",
        "0.05",
        "--out",
        str(out),
    )
    assert main(words) == 0
    return out


def test_a_delta_is_a_small_run_that_names_its_base(source, delta_run):
    config = json.loads((delta_run / "config.json").read_text())
    assert config["delta"]["base"]["run"] == str(source)
    assert config["delta"]["base"]["fresh"] == {"head/bias": [10], "head/kernel": [64, 10]}
    run, base = jt.load_run(delta_run), jt.load_run(source)
    params = run.params["model"]["delta"]
    for path, kernel in jt.tree.leaves_by_path(base.params["model"]).items():
        if path.endswith("conv/kernel"):
            a, b = (jt.tree.leaves_by_path(params)[f"{path}/{name}"] for name in "ab")
            assert (a.shape, b.shape) == ((np.prod(kernel.shape[:3]), 2), (2, kernel.shape[3]))
    held = jt.deltas.base_of(run.model)
    np.testing.assert_array_equal(held["stem_conv"]["kernel"], base.params["model"]["stem_conv"]["kernel"])
    assert not np.any(held["head"]["kernel"])
    assert np.any(run.params["model"]["head"]["head"]["kernel"])


@pytest.mark.slow
def test_commands_take_it_like_any_run(run, refused, source, delta_run, tmp_path):
    (line,), _ = run("evaluate", delta_run)
    found = json.loads(line)
    loaded = jt.load_run(delta_run)
    assert found["accuracy"] == pytest.approx(loaded.result["accuracy"], abs=1e-6)
    assert found["loss"] == pytest.approx(loaded.result["loss"], rel=1e-4)
    out, _ = run("inspect", delta_run)
    trained = 9 * 2 + 2 * 16 + 144 * 2 + 2 * 32 + 288 * 2 + 2 * 64 + 650
    assert any(f"trained: {trained:,} values; frozen, in its base: 24,058" in line for line in out)
    run("export", delta_run, "--out", tmp_path / "a.safetensors")
    alone = tmp_path / "alone"
    shutil.copytree(delta_run, alone)
    config = json.loads((alone / "config.json").read_text())
    config["delta"]["base"]["run"] = str(tmp_path / "nowhere")
    (alone / "config.json").write_text(json.dumps(config))
    assert "its base is not where it was" in refused("evaluate", alone)
    (line,), _ = run("evaluate", alone, "--base", source)
    assert json.loads(line) == {**found, "run": str(alone)}
    one = jt.data.load("digits/inverted", "test").read([0])["image"][0]
    cv2.imwrite(str(tmp_path / "one.png"), one)
    (there,), _ = run("predict", delta_run, tmp_path / "one.png")
    (here,), _ = run("predict", alone, tmp_path / "one.png", "--base", source)
    assert here == there
    assert "is a delta itself" in refused("evaluate", alone, "--base", delta_run)
    other = tmp_path / "other"
    shutil.copytree(source, other)
    (other / "checkpoints" / "step_000000020").rename(other / "checkpoints" / "step_000000019")
    assert "stands on step 20 of a run, and" in refused("evaluate", alone, "--base", other)
    assert "--base is of a delta" in refused("predict", source, tmp_path / "one.png", "--base", source)
    words = ("finetune", "--from", delta_run, *TRAIN, "--delta", "ia3", "--out", tmp_path / "x")
    assert "is a delta itself; merge it" in refused(*words)


@pytest.mark.slow
def test_training_goes_on_from_it(run, delta_run, tmp_path):
    run("finetune", "--from", delta_run, *TRAIN, "--lr", "1e-9", "--keep-head", "--out", tmp_path / "further")
    further, before = jt.load_run(tmp_path / "further"), jt.load_run(delta_run)
    assert "delta" not in further.config
    merged = jt.tree.leaves_by_path(jt.deltas.merged(before.model, before.variables)["params"])
    for path, leaf in jt.tree.leaves_by_path(further.params["model"]).items():
        np.testing.assert_allclose(leaf, merged[path], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_resuming_goes_to_the_same_bits(run, source, delta_run, tmp_path):
    words = ("finetune", "--from", source, "--delta", "lora", "--rank", "2", "--lr", "0.05", "--out", tmp_path / "run")
    run(*words, *TRAIN[:2], "--batch-size", "32", "--eval-every", "4", "--steps", "4", "--keep", "9")
    for a, b in zip(
        *(jt.tree.leaves_by_path(jt.load_run(one).params).items() for one in (tmp_path / "run", delta_run)), strict=True
    ):
        assert a[0] == b[0]
        np.testing.assert_array_equal(a[1], b[1])


WRONG = {
    "no such delta": (("--delta", "lorra"), "did you mean 'lora'"),
    "rank without a delta": (("--rank", "4"), "--rank is of a delta; add --delta NAME"),
    "only without a delta": (("--only", "head"), "--only is of a delta"),
    "of another kind": (("--delta", "bitfit", "--rank", "4"), "--rank: bitfit has none"),
    "no rank": (("--delta", "lora", "--rank", "0"), "--rank must be at least 1"),
    "alpha": (("--delta", "lora", "--alpha", "-1"), "--alpha must be positive"),
    "dropout": (("--delta", "lora", "--dropout", "1"), "--dropout must be from 0 to below 1"),
    "dropout of another kind": (("--delta", "loha", "--dropout", "0.1"), "--dropout: loha has none"),
    "no such layer": (("--delta", "lora", "--only", "stage7"), "--only 'stage7' selects no layer"),
    "no kernel": (("--delta", "lora", "--only", "stem_conv/bias"), "--only"),
    "rank above": (("--delta", "lora", "--rank", "99"), "rank 99 is above that of 'stage1_conv/kernel'"),
    "the new head": (("--delta", "lora", "--only", "head"), "--only selects the head, which is new"),
    "no transformer": (("--delta", "vpt"), "--delta vpt: "),
    "method": (("--delta", "lora", "--method", "l2-sp"), "leave --method out"),
    "freeze": (("--delta", "lora", "--freeze-bn"), "leave --freeze-bn out"),
    "head rate": (("--delta", "lora", "--keep-head", "--head-rate", "0.1"), "a head that is kept stays"),
    "pattern": (("--delta", "lora", "--only", "("), "no regular expression"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_can_not_be_is_one_line_before_anything_runs(refused, source, tmp_path, case):
    words, told = WRONG[case]
    assert told in refused("finetune", "--from", source, *TRAIN, "--out", tmp_path / "out", *words)
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_delta_stands_on_a_run_and_not_on_weights(refused, source, tmp_path):
    jt.export_weights(source, tmp_path / "a.safetensors")
    words = ("--model", "small-cnn", *TRAIN, "--out", tmp_path / "out", "--delta", "lora")
    assert "jaxtransfer convert" in refused("finetune", "--from", tmp_path / "a.safetensors", *words)


@pytest.mark.slow
def test_each_kind_is_made_and_says_how(source):
    """On a small transformer, with a new head and with the source's."""
    import jax

    from jaxtransfer.cli.delta_options import DeltaOptions
    from jaxtransfer.runs.deltas import made_of

    model = jt.models.vit(8, 2, 2, 3, patch=4)
    variables = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), dict(variables))
    base = jt.load_run(source)._replace(model=model, params={"model": variables["params"]}, state={"model": {}})
    wide = jt.models.vit(8, 2, 2, 5, patch=4)
    for name, row in DELTAS.items():
        small: dict[str, Any] = {size: 2 for size in row.facts.usual if size not in ("alpha", "dropout")}
        options = DeltaOptions(delta=name, **small)
        for target, new_head in ((model, False), (wide, True)):
            net, note = options.made(base, target, (8, 8, 1), new_head=new_head)
            assert json.loads(json.dumps(note)) == note
            whole = {"params": jt.deltas.base_of(net) if hasattr(net, "of") else net.frozen["base"].tree["params"]}
            again = made_of(note, target, whole)
            image = jax.ShapeDtypeStruct((1, 8, 8, 1), np.float32)
            one, other = (
                jt.tree.leaves_by_path(jax.eval_shape(m.init, jax.random.key(0), image)) for m in (net, again)
            )
            assert {path: leaf.shape for path, leaf in one.items()} == {
                path: leaf.shape for path, leaf in other.items()
            }
            assert any("head" in path for path in one) == new_head or name in (
                "ssf",
                "bitfit",
                "full",
                "norm-tuning",
            ), name


@pytest.mark.slow
def test_a_budget_falls_to_the_rank_that_is_asked_for(run, source, tmp_path):
    """AdaLoRA with dropout, two batches an update: of the 3 · 3 directions that it begins with 3 · 2 stay."""
    words = ("finetune", "--from", source, "--delta", "adalora", "--rank", "2", "--dropout", "0.2", "--lr", "0.05")
    words = (*words, *TRAIN[:2], "--batch-size", "32", "--accumulate", "2", "--eval-every", "12", "--steps", "12")
    run(*words, "--out", tmp_path / "out")
    found = jt.load_run(tmp_path / "out")
    params = jt.tree.leaves_by_path(found.params["model"]["delta"])
    weights = [leaf for path, leaf in params.items() if path.endswith("/e")]
    assert [leaf.shape for leaf in weights] == [(3,)] * 3
    assert sum(np.count_nonzero(leaf) for leaf in weights) == 6
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["delta"]["budget"] == {"rank": 2}
    assert "orthogonality" in (tmp_path / "out" / "metrics.jsonl").read_text()


def test_it_is_merged_into_its_base(run, refused, source, delta_run, tmp_path):
    out = tmp_path / "whole"
    run("merge", source, delta_run, "--method", "delta", "--out", out)
    whole, apart = jt.load_run(out), jt.load_run(delta_run)
    assert whole.class_names == apart.class_names
    expected = jt.deltas.merged(apart.model, apart.variables)
    for path, leaf in jt.tree.leaves_by_path(whole.variables).items():
        np.testing.assert_array_equal(leaf, jt.tree.leaves_by_path(expected)[path])
    words = ("--method", "delta", "--out", tmp_path / "out")
    assert "is a run of all its weights" in refused("merge", source, source, *words)
    assert "it is another one, or has changed" in refused("merge", out, delta_run, *words)
    assert "takes 2 or more runs" in refused("merge", delta_run, *words)
    assert "has no use for it" in refused("merge", source, delta_run, "--base", source, *words)


@pytest.mark.slow
def test_several_deltas_add_up(run, source, tmp_path):
    """Two differences of the source's own head, whose sum has both."""
    import optax

    base = jt.load_run(source)
    data = jt.data.load("digits/upright", "train", like=base).take(64)
    for number, place in enumerate(("bias", "kernel")):
        net = jt.deltas.delta(base.model, base.variables, jt.deltas.full(), only=f"head/{place}")
        jt.fit(
            *(jt.classification(net), optax.sgd(0.5), jt.data.pipeline(data, 16)),
            **{"steps": 1, "out": tmp_path / str(number), "model": net, "config": {"base": source}, "progress": False},
        )
    words = (tmp_path / "0", tmp_path / "1", "--method", "delta", "--keep-statistics", "--out", tmp_path / "both")
    run("merge", source, *words)
    both = jt.load_run(tmp_path / "both").params["model"]["head"]
    for number, place in enumerate(("bias", "kernel")):
        alone = jt.load_run(tmp_path / str(number))
        expected = jt.deltas.merged(alone.model, alone.variables)["params"]["head"][place]
        assert np.abs(expected - base.params["model"]["head"][place]).max() > 1e-4
        np.testing.assert_allclose(both[place], expected, rtol=1e-5, atol=1e-6)
