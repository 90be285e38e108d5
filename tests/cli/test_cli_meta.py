import json

import jax
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.cli.registry.fewshot import METHODS, learner
from jaxtransfer.cli.runs import build_model

EPISODES = [
    "--tasks",
    "8",
    "--data",
    "digits/upright",
    "--split-classes",
    "6",
    "2",
    "2",
    "--ways",
    "2",
    "--queries",
    "3",
]
SHORT = ["--steps", "4", "--eval-every", "4", "--model", "mlp", "--test-episodes", "10"]


def config(method, **more):
    return {
        "method": method, "ways": 3, "train_ways": 3, "class_names": ["a", "b", "c"], "model": "conv4", "mean": [0.3],
        "std": [0.4], "inner_steps": 2, "test_steps": 2, "inner_lr": 0.1, "statistics": "transductive", "steps": 8,
        **more,
    }  # fmt: skip


FAST = ("meta-sgd", "linear-head")


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in METHODS]
)
def test_every_method_fits_its_data(method, rng):
    def part(rows):
        return {
            "image": rng.integers(0, 256, (2, rows, 8, 8, 1), dtype=np.uint8),
            "label": np.arange(2 * rows).reshape(2, rows) % 3,
        }

    episodes, own = {"support": part(3), "query": part(6)}, config(method, test_steps=3)
    made = learner(build_model(own), own)
    batch = episodes if not METHODS[method].facts.labelled else jax.tree.map(lambda x: x[0], episodes["query"])
    state = jt.init(made.train, optax.adam(1e-3), jax.random.key(0), batch)
    means = [jax.tree.map(lambda x: x[0], episodes["query"])]
    for objective in (made.validate, made.test(state, lambda: means)):
        evaluated = jax.eval_shape(
            lambda s, o=objective: o(s.params, s.state, episodes, jt.Context(train=False)), state
        )
        assert evaluated[0].shape == ()
        assert "accuracy" in evaluated[2]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["prototypical", "maml++", "simpleshot"])
def test_a_run_is_trained_tested_and_evaluated(run, refused, tmp_path, method):
    out = tmp_path / "run"
    command = ("meta", "--method", method, *EPISODES, *SHORT, "--inner-steps", "2", "--out", out)
    lines, _ = run(*command)
    assert "episodes of new classes" in lines[-1]
    assert (out / "report.md").exists()
    test = json.loads((out / "test.json").read_text())
    assert test["episodes"] == 10
    assert 0 <= test["accuracy"] <= 1
    line = json.loads(run("evaluate", out, "--episodes", "10")[0][0])
    assert line["accuracy"] == pytest.approx(test["accuracy"])
    assert line["accuracy_interval"] == pytest.approx(test["accuracy_interval"])
    assert "already done" in run(*command)[0][0]
    if method == "prototypical":
        more = json.loads(run("evaluate", out, "--episodes", "5", "--shots", "3", "--queries", "2")[0][0])
        assert (more["shots"], more["queries"], more["episodes"]) == (3, 2, 5)
        elsewhere = json.loads(run("evaluate", out, "--data", "digits/noisy", "--ways", "4", "--episodes", "5")[0][0])
        assert (elsewhere["data"], elsewhere["ways"]) == ("digits/noisy", 4)
        run("finetune", "--from", out, "--data", "digits/noisy", "--steps", "2", "--out", tmp_path / "moved")
    if method == "maml++":
        assert "trained on 2 ways and can't be tested on 3" in refused("evaluate", out, "--ways", "3")


@pytest.mark.slow
def test_more_steps_at_test_than_in_training(run, tmp_path):
    out = tmp_path / "run"
    command = ["meta", "--method", "maml++", *EPISODES, *SHORT, "--inner-steps", "2", "--test-steps", "4", "--out", out]
    assert "episodes of new classes" in run(*command)[0][-1]
    line = json.loads(run("evaluate", out, "--episodes", "10")[0][0])
    assert line["accuracy"] == pytest.approx(json.loads((out / "test.json").read_text())["accuracy"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--data", "digits/upright", "--tasks", "8"], "class '0' is in 'train' and in 'test'"),
        ([*EPISODES, "--method", "mamal"], "unknown method 'mamal'"),
        ([*EPISODES, "--model", "conv5"], "unknown model 'conv5'"),
        ([*EPISODES, "--statistics", "none"], "unknown statistics 'none'"),
        ([*EPISODES, "--shots", "0"], "--shots must be at least 1"),
        ([*EPISODES, "--ways", "1"], "--ways must be at least 2"),
        ([*EPISODES, "--inner-lr", "-1"], "--inner-lr must be positive"),
        ([*EPISODES, "--ways", "3"], "has 2 classes with examples, 3 ways asked"),
        ([*EPISODES, "--queries", "500"], "examples, an episode takes 501"),
        ([*EPISODES, "--split-classes", "8", "2", "2"], "10 classes with examples"),
        ([*EPISODES, "--method", "maml", "--train-ways", "3"], "--train-ways: maml has one output per way"),
        ([*EPISODES, "--test-episodes", "0"], "--test-episodes must be at least 1"),
        ([*EPISODES, "--test-episodes", "1000001"], "--test-episodes must be at most 1000000, whose interval is about"),
        ([*EPISODES, "--method", "relation", "--model", "mlp"], "stage4"),
    ],
)
def test_what_cannot_be_is_refused(refused, tmp_path, options, says):
    assert says in refused("meta", *options, "--out", tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
