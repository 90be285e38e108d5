"""Options from a file, what a run notes of how it came about, and the schedules and accumulation that they choose."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.cli.options import RateOptions, TrainOptions
from jaxtransfer.runs.loggers import read_jsonl

DIGITS = ("--data", "digits/upright", "--split", "train[:40]", "--eval-split", "test[:16]", "--batch-size", "16")


@pytest.fixture
def written(tmp_path):
    """Writes a file of settings."""

    def write(text, name="run.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


@pytest.mark.slow
def test_a_file_gives_options_and_the_command_line_goes_before_it(run, refused, written, tmp_path):
    settings = written(
        "data: digits/upright\nsplit: 'train[:40]'\neval_split: test[:16]\nmodel: linear\nbatch-size: 16\n"
        "epochs: 9\nlr: 1e-2\nschedule: step\nmilestones: [0.25, 0.5]\nfactor: 0.5\nclip: null\n"
    )
    out = tmp_path / "out"
    words = ("pretrain", "--config", settings, "--steps", "4", "--lr=0.5", "--out", out)
    run(*words)
    config = json.loads((out / "config.json").read_text())
    assert config["lr"] == 0.5
    assert config["steps"] == 4
    assert config["batch_size"] == 16
    assert config["milestones"] == [0.25, 0.5]
    assert config["clip"] is None
    assert "config" not in config
    made = config["made"]
    assert made["options"]["split"] == "train[:40]"
    assert made["jax"] == jax.__version__
    assert made["devices"] == "8 × cpu"
    assert made["date"].startswith("20")
    assert made["command line"].startswith("jaxtransfer pretrain --data digits/upright --split 'train[:40]' ")
    assert str(out) in made["command line"]
    assert "| command line | jaxtransfer pretrain --data digits/upright" in (out / "report.md").read_text()
    # the configuration repeats the run, elsewhere, and here, where the date of its beginning stays
    again = tmp_path / "again"
    run("pretrain", "--config", out / "config.json", "--out", again)
    repeated = json.loads((again / "config.json").read_text())
    assert {**repeated, "made": 0} == {**config, "made": 0}
    assert read_jsonl(again / "metrics.jsonl") == read_jsonl(out / "metrics.jsonl")
    assert run(*words)[0][0].startswith("already done: ")
    assert json.loads((out / "config.json").read_text()) == config
    # another option is refused by name, and the configuration of another command by its own
    assert "factor: 0.5 there, 0.2 now" in refused(*words, "--factor", "0.2")
    message = refused("finetune", "--from", out, "--config", out / "config.json", "--out", again)
    assert "is the configuration of a run of pretrain, and this is finetune" in message


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("batchsize: 3", "a.yaml", "unknown option of pretrain 'batchsize' (did you mean 'batch-size'?)"),
        ('{"lr": 0.1, "lr": 0.2}', "a.json", "'lr' is there twice"),
        ("lr: 0.1\nlr: 0.2", "a.yaml", "'lr' is there twice"),
        ("lr: fast", "a.yaml", "a.yaml: --lr: expected a number, got 'fast'"),
        ("steps: true", "a.yaml", "--steps takes INT; got True"),
        ("image-shape: [8, 8]", "a.yaml", "--image-shape needs 3 values (H W C); got 8 8"),
        ("lr: [0.1, 0.2]", "a.yaml", "--lr takes FLOAT; got 0.1 0.2"),
        ("config: b.yaml", "a.yaml", "unknown option of pretrain 'config'"),
        ("- lr", "a.yaml", "expected options by name"),
        ("lr: !!python/object/apply:os.system ['true']", "a.yaml", "cannot read"),
        ("{", "a.json", "cannot read"),
        ('{"format": 1, "command": "pretrain"}', "a.json", "didn't note its options"),
        ("schedule: cosin", "a.yaml", "unknown schedule 'cosin' (did you mean 'cosine'?)"),
        ("milestones: 0.5", "a.yaml", "--milestones is of --schedule step; got --schedule cosine"),
        ("{schedule: step, milestones: [0.5, 0.2]}", "a.yaml", "shares of the steps that rise"),
        ("{schedule: step, milestones: [30]}", "a.yaml", "above 0 and below 1; got 30"),
        ("{schedule: step, factor: 2}", "a.yaml", "--factor must be above 0 and at most 1; got 2.0"),
        ("{schedule: constant, factor: 0.5}", "a.yaml", "--factor is of --schedule step"),
        ("accumulate: 0", "a.yaml", "--accumulate must be at least 1; got 0"),
        ("{accumulate: 3, steps: 4}", "a.yaml", "--accumulate 3: 4 steps"),
    ],
)
def test_what_a_file_can_not_say(refused, written, tmp_path, text, name, expected):
    out = tmp_path / "out"
    assert expected in refused("pretrain", *DIGITS, "--config", written(text, name), "--out", out)
    assert not (out / "config.json").exists()


def test_a_file_that_is_not_there(refused, tmp_path):
    assert "cannot read nowhere.yaml" in refused("pretrain", *DIGITS, "--config", "nowhere.yaml", "--out", tmp_path)
    assert "--config needs a value (FILE)" in refused("pretrain", *DIGITS, "--out", tmp_path, "--config")
    assert "evaluate has no option --config" in refused("evaluate", tmp_path, "--config", "a.yaml")


def moved(options, steps):
    """How far each step moves a scalar whose gradient is 1, then 3, then 1, ..."""
    optimizer = options.optimizer_for(steps)
    params = {"bias": jnp.zeros(())}
    state, places, update = optimizer.init(params), [], jax.jit(optimizer.update)
    for step in range(steps):
        updates, state = update({"bias": jnp.asarray(3.0 if step % 2 else 1.0)}, state, params)
        places.append(-float(updates["bias"]))
    return places


def test_accumulated_batches_make_one_update_with_the_schedule_over_updates():
    given = {"out": Path("nowhere"), "optimizer": "sgd", "lr": 0.1, "schedule": "linear", "warmup": 2}
    rates, speed, expected = [0.05, 0.1, 0.1 * 2 / 3, 0.1 / 3], 0.0, []  # one update of warm-up, then down to 0
    for rate in rates:
        speed = 0.9 * speed + 2.0  # the mean of the two gradients, with Nesterov momentum
        expected += [0.0, rate * (0.9 * speed + 2.0)]
    np.testing.assert_allclose(moved(TrainOptions(accumulate=2, **given), 8), expected, rtol=1e-5)


def test_epochs_make_whole_updates():
    options = TrainOptions(out=Path("nowhere"), epochs=1.0, accumulate=4, batch_size=16)
    assert options.for_data(100, 16).steps == 8  # of 7 batches


def test_milestones_are_shares_of_the_steps():
    assert RateOptions(schedule="step").places_in(100) == [50, 75]
    assert RateOptions(schedule="step", milestones=(0.1, 0.5)).places_in(10) == [1, 5]
    assert RateOptions(schedule="step", milestones=(0.1, 0.2), warmup=6).places_in(10) == [7, 8]
