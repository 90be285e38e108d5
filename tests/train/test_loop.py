"""The loop: what it records and when, where it stops, and that an interrupted run ends as the unbroken one."""

import fcntl
import json
import re
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import jaxtransfer as jt
from jaxtransfer.runs import checkpoints


def perceptron(dropout=0.0):
    """A perceptron with running statistics; one with dropout must draw after resuming what it would have drawn."""

    def init(key, inputs):
        keys = jax.random.split(key)
        return {
            "params": {
                "body": 0.5 * jax.random.normal(keys[0], (inputs.shape[1], 8)),
                "head": 0.5 * jax.random.normal(keys[1], (8, 3)),
            },
            "stats": {"mean": jnp.zeros(8)},
        }

    def apply(variables, inputs, *, train, key, axis=None):
        params, mean = variables["params"], variables["stats"]["mean"]
        x = jnp.tanh(inputs @ params["body"])
        if train and dropout:
            x = jnp.where(jax.random.bernoulli(key, 1 - dropout, x.shape), x, 0)
        if train:
            mean = 0.9 * mean + 0.1 * x.mean(0)
        return {"logits": (x - mean[None]) @ params["head"]}, {"stats": {"mean": mean}}

    return jt.Model(init, apply, stages=("body", "head"))


def batch(i, rows=8):
    rng = np.random.default_rng([17, i])
    label = rng.integers(0, 3, rows)
    image = rng.normal(size=(rows, 4)) + 2 * np.eye(3, 4)[label]
    return {"image": image.astype(np.float32), "label": label.astype(np.int32)}


class Data:
    """Endless batches that know their position; may fail at one of them and notes what was asked."""

    def __init__(self, fails_at=None):
        self.fails_at, self.starts = fails_at, []

    def iterate(self, start):
        self.starts.append(start)
        i = start
        while True:
            if i == self.fails_at:
                raise RuntimeError("the disk of the data went away")
            yield batch(i)
            i += 1


MODEL = perceptron()
OBJECTIVE = jt.classification(MODEL)
DRAWS = jt.classification(perceptron(dropout=0.2))
EVAL = [batch(1000), batch(1001)]


def fit(data=None, objective=OBJECTIVE, optimizer=None, **options):
    options = {"steps": 12, "key": 3, "eval_data": EVAL, "eval_every": 4, "log_every": 3, **options}
    return jt.fit(objective, optimizer or optax.sgd(0.1, momentum=0.9), Data() if data is None else data, **options)


def assert_same(got, want):
    for path, leaf in jt.tree.leaves_by_path(want).items():
        other = jt.tree.leaves_by_path(got)[path]
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf, other = jax.random.key_data(leaf), jax.random.key_data(other)
        assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes(), path


def scored(scores):
    """An objective whose evaluation metric `score` is a table of the step."""
    table = jnp.asarray(scores, jnp.float32)

    def loss(outputs, params, state, batch, ctx):
        value = params["p"] ** 2
        return value, state, {"score": jt.Mean(table[ctx.step], jnp.ones(()))}

    return jt.Objective("scored", (), loss, setup=lambda key, batch: ({"p": jnp.ones(())}, {}))


@pytest.mark.slow
def test_records(rng):
    logged = []
    fitted = fit(log=logged.append)
    assert logged == fitted.history
    steps = {side: [r["step"] for r in fitted.history if f"{side}/loss" in r] for side in ("train", "eval")}
    assert steps == {"train": [3, 4, 6, 8, 9, 12], "eval": [4, 8, 12]}  # each evaluation flushes a training record
    optimizer = optax.sgd(0.1, momentum=0.9)
    state = jt.init(OBJECTIVE, optimizer, jax.random.key(3), batch(0))
    step, metrics, evals = jt.train_step(OBJECTIVE, optimizer), [], {}
    for i in range(12):
        state, values = step(state, batch(i))
        metrics.append({name: float(value) for name, value in values.items()})
        if (i + 1) % 4 == 0:
            evals[i + 1] = jt.evaluate(OBJECTIVE, state, EVAL)
    assert_same(fitted.state, state)
    begin = 0
    for end, record in zip(steps["train"], (r for r in fitted.history if "train/loss" in r), strict=True):
        for name in ("loss", "classification", "accuracy"):
            want = np.mean([m[name] for m in metrics[begin:end]])
            assert record[f"train/{name}"] == pytest.approx(want, rel=1e-6), (end, name)
        begin = end
    for record in (r for r in fitted.history if "eval/loss" in r):
        want = {f"eval/{k}": v for k, v in evals[record["step"]].items()}
        assert {k: v for k, v in record.items() if k != "step"} == pytest.approx(want, rel=1e-6)
    assert fitted.best["eval/accuracy"] == max(e["accuracy"] for e in evals.values())
    assert fitted.timing["seconds"] > fitted.timing["compile_seconds"] > 0
    assert 0 <= fitted.timing["data_wait_fraction"] <= 1
    assert fitted.timing["examples_per_second"] > 0


@pytest.mark.parametrize(
    ("options", "train", "evals", "saves"),
    [
        ({"steps": 7, "log_every": 3, "eval_every": 5, "save_every": 2}, [2, 3, 4, 5, 6, 7], [5, 7], [2, 4, 6, 7]),
        ({"steps": 6, "log_every": 100, "eval_every": 4}, [4, 6], [4, 6], [4, 6]),
        ({"steps": 5, "log_every": 5, "eval_every": 9, "save_every": 9}, [5], [5], [5]),
        ({"steps": 20, "log_every": None, "eval_every": None}, list(range(1, 21)), list(range(2, 21, 2)), None),
        ({"steps": 100, "log_every": None, "eval_every": 50}, list(range(2, 101, 2)), [50, 100], [50, 100]),
        ({"steps": 4, "eval_data": None, "log_every": 3, "eval_every": 2}, [2, 3, 4], [], [2, 4]),
        ({"steps": 1, "log_every": None, "eval_every": None}, [1], [1], [1]),
    ],
)
def test_the_plan(tmp_path, options, train, evals, saves):
    fitted = fit(out=tmp_path / "run", keep=100, **options)
    assert [r["step"] for r in fitted.history if "train/loss" in r] == train
    assert [r["step"] for r in fitted.history if "eval/loss" in r] == evals
    assert checkpoints.steps(tmp_path / "run" / "checkpoints") == (evals if saves is None else saves)


def test_the_run_directory(tmp_path):
    out = tmp_path / "deep" / "run"
    fitted = fit(out=out, config={"model": "mine", "rates": (0.1, 0.2)})
    assert json.loads((out / "config.json").read_text()) == {"steps": 12, "model": "mine", "rates": [0.1, 0.2]}
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == fitted.history
    assert list((out / "tensorboard").glob("events*"))
    timing = [json.loads(line) for line in (out / "timing.jsonl").read_text().splitlines()]
    assert [record["step"] for record in timing] == [3, 4, 6, 8, 9, 12]
    assert set(timing[-1]) == {"step", *fitted.timing}
    found = checkpoints.read(out / "checkpoints")
    assert found.step == 12
    assert_same(checkpoints.fill(fitted.state, found.leaves), fitted.state)
    assert found.meta == fitted.history[-1]


def test_out_changes_nothing_of_the_training(tmp_path):
    assert_same(fit(out=tmp_path / "run").state, fit().state)


@pytest.mark.slow
def test_seeds_and_keys():
    one = fit(key=3).state
    assert_same(fit(key=jax.random.key(3)).state, one)
    assert_same(fit(key=np.int64(3)).state, one)
    other = fit(key=4, steps=1).state
    assert np.any(np.asarray(other.params["model"]["head"]) != np.asarray(one.params["model"]["head"]))
    key = jax.random.key(3)
    fit(key=key, steps=2)
    jax.random.fold_in(key, 0)  # still the caller's


@pytest.mark.slow
def test_data_of_every_kind():
    want = fit().state

    def generator(count):
        for i in range(count):
            yield batch(i)

    for data in ([batch(i) for i in range(12)], generator(12), generator(20), map(batch, range(12))):
        assert_same(fit(data).state, want)
    data = Data(fails_at=12)  # no batch beyond the last step is asked for
    assert_same(fit(data).state, want)
    assert data.starts == [0, 0]
    stream = generator(24)
    fit(stream)
    np.testing.assert_array_equal(next(stream)["image"], batch(12)["image"])


@pytest.mark.slow
def test_data_that_ends_early(tmp_path):
    with pytest.raises(jt.InputError, match="the data ended before 12 steps"):
        fit([batch(i) for i in range(7)], out=tmp_path / "run")
    assert checkpoints.steps(tmp_path / "run" / "checkpoints") == [4]  # what was done is kept
    got = fit([batch(i) for i in range(12)], out=tmp_path / "run")
    assert_same(got.state, fit().state)
    with pytest.raises(jt.InputError, match="the data is empty"):
        fit([])


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"steps": 2.5},
        {"eval_every": 0},
        {"save_every": -1},
        {"log_every": 0},
        {"patience": 0},
        {"keep": 0},
    ],
)
def test_numbers_that_make_no_sense(tmp_path, wrong):
    (name,) = wrong
    with pytest.raises(jt.InputError, match=f"{name} must be a positive whole number; got"):
        fit(out=tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fails_at", [1, None])
def test_a_run_that_was_interrupted_ends_as_the_unbroken_one(tmp_path, fails_at):
    fails_at = fails_at or int(np.random.default_rng().integers(3, 12))  # at another moment each time
    run = {"objective": DRAWS, "optimizer": optax.adam(0.05), "save_every": 2}
    whole = fit(out=tmp_path / "whole", **run)
    with pytest.raises(RuntimeError, match="went away"):
        fit(Data(fails_at), out=tmp_path / "run", **run)
    before = checkpoints.steps(tmp_path / "run" / "checkpoints")
    assert all(step < fails_at for step in before)
    assert fails_at < 4 or before
    data = Data()
    resumed = fit(data, out=tmp_path / "run", **run)
    assert data.starts == [0, max(before, default=0)]  # the first batch for the shapes, then on from there
    assert_same(resumed.state, whole.state)
    assert resumed.history == whole.history
    assert resumed.best == whole.best
    for name in ("metrics.jsonl", "config.json"):
        assert (tmp_path / "run" / name).read_text() == (tmp_path / "whole" / name).read_text()
    timing = [json.loads(line)["step"] for line in (tmp_path / "run" / "timing.jsonl").read_text().splitlines()]
    assert timing == sorted(set(timing))


@pytest.mark.slow
def test_resuming_through_a_one_shot_generator_reads_on_from_the_position(tmp_path):
    with pytest.raises(RuntimeError):
        fit(Data(9), out=tmp_path / "run")
    resumed = fit((batch(i) for i in range(12)), out=tmp_path / "run")
    assert_same(resumed.state, fit().state)


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_only_steps(tmp_path):
    whole = fit(out=tmp_path / "whole")
    with pytest.raises(RuntimeError):
        fit(Data(11), out=tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step_000000008" / "meta.json").write_text("")
    data = Data()
    with pytest.warns(UserWarning, match="step_000000008 is damaged"):
        resumed = fit(data, out=tmp_path / "run")
    assert data.starts == [0, 4]
    assert_same(resumed.state, whole.state)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_a_metrics_file_that_was_cut_off(tmp_path):
    whole = fit(out=tmp_path / "whole")
    with pytest.raises(RuntimeError):
        fit(Data(11), out=tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-9])
    fit(out=tmp_path / "run")
    assert metrics.read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert whole.history


def test_a_finished_run_returns_what_it_came_to(tmp_path):
    first = fit(out=tmp_path / "run")
    files = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    again = fit(Data(fails_at=1), out=tmp_path / "run")
    assert_same(again.state, first.state)
    assert again.history == first.history
    assert again.best == first.best
    assert again.timing == {}
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == files


def test_another_configuration_is_refused(tmp_path):
    fit(out=tmp_path / "run", config={"rate": 0.1})
    for change in ({"config": {"rate": 0.2}}, {"config": {"rate": 0.1, "more": 1}}, {"config": None}):
        with pytest.raises(jt.InputError, match=r"another configuration \((rate: 0.1 there|more: None there, 1 now)"):
            fit(out=tmp_path / "run", **change)
    with pytest.raises(jt.InputError, match=r"rate: 0.1 there, 0.2 now; steps: 12 there, 13 now"):
        fit(out=tmp_path / "run", config={"rate": 0.2}, steps=13)
    with pytest.raises(jt.InputError, match=r"another configuration \(optimizer\)"):
        fit(out=tmp_path / "run", config={"rate": 0.1}, optimizer=optax.sgd(0.1))
    (tmp_path / "run" / "identity.json").unlink()  # as older versions left a run
    with pytest.raises(jt.InputError, match=r"checkpoint is of another run .*opt_state"):
        fit(out=tmp_path / "run", config={"rate": 0.1}, optimizer=optax.sgd(0.1))


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(jt.InputError, match=r"is no run directory, but holds 'thesis.tex'"):
        fit(out=tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    with pytest.raises(jt.InputError, match="cannot write to the run directory"):
        fit(out=tmp_path / "thesis.tex")


@pytest.mark.slow
def test_a_second_process_in_the_same_directory_is_refused(tmp_path):
    fit(out=tmp_path / "run", steps=1)
    script = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", script, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        with pytest.raises(jt.InputError, match="another process is training in"):
            fit(out=tmp_path / "run", steps=1)
        other.stdin.write("\n")
        other.stdin.close()
    fit(out=tmp_path / "run", steps=1)

    class Nested(Data):  # a run holds its directory while it trains, and lets go of it after
        def iterate(self, start):
            with (tmp_path / "new" / ".lock").open() as lock, pytest.raises(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield from super().iterate(start)

    fit(Nested(), out=tmp_path / "new", steps=1)
    with (tmp_path / "new" / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_names_step_and_term(tmp_path, bad):
    batches = [batch(i) for i in range(12)]
    batches[6]["image"][2, 1] = bad if np.isnan(bad) else np.nan
    objective = OBJECTIVE + 0.1 * jt.l2()
    with pytest.raises(
        jt.NonFiniteLossError,
        match=r"not finite at step 7: term .*'classification'.*nan; the last good checkpoint is step 5",
    ) as error:
        fit(batches, objective, out=tmp_path / "run", log_every=100, eval_every=100, save_every=5)
    assert "'l2'" not in str(error.value)
    assert str(tmp_path / "run" / "checkpoints") in str(error.value)
    found = checkpoints.read(tmp_path / "run" / "checkpoints")
    assert found.step == 5
    assert all(np.all(np.isfinite(v)) for v in found.leaves.values() if v.dtype == np.float32)
    with pytest.raises(jt.NonFiniteLossError, match=r"step 7: term 'classification' is nan\. Lower"):
        fit(batches, objective)
    resumed = fit(objective=objective, out=tmp_path / "run", log_every=100, eval_every=100, save_every=5)
    assert int(resumed.state.step) == 12  # with good data it goes on from the last good one


def test_an_infinite_term_is_named():
    def loss(outputs, params, state, batch, ctx):
        value = jnp.where(ctx.step == 4, jnp.inf, 0.0)
        return value, state, {"odd": jt.Mean(value, jnp.ones(()))}

    objective = OBJECTIVE + jt.Objective("odd", (), loss)
    with pytest.raises(jt.NonFiniteLossError, match="at step 5: term 'odd' is inf"):
        fit(objective=objective, eval_data=None)
    with pytest.raises(jt.NonFiniteLossError, match="evaluation is not finite after step 4: term 'odd' is inf"):
        fit(objective=objective)  # which evaluates with the weight of that step


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """The loss is still finite at the step whose update broke the weights."""
    broken = optax.GradientTransformation(
        lambda params: jnp.zeros((), jnp.int32),
        lambda updates, count, params=None: (
            jax.tree.map(lambda u: jnp.where(count == 7, jnp.nan, -0.1 * u), updates),
            count + 1,
        ),
    )
    with pytest.raises(jt.NonFiniteLossError, match=r"params/model/\w+ is not finite after step 8"):
        fit(optimizer=broken, out=tmp_path / "run", eval_data=None)
    assert checkpoints.steps(tmp_path / "run" / "checkpoints") == [4]


@pytest.mark.slow
def test_best_by_the_monitored_metric(tmp_path):
    scores = [0, 3, 1, 7, 7, 2, 5, 0]
    run = {"objective": scored(scores), "steps": 7, "eval_every": 1, "monitor": "score", "keep": 1}
    fitted = fit(**run, out=tmp_path / "max")
    assert (fitted.best["step"], fitted.best["eval/score"]) == (3, 7)  # of equals the earliest
    assert checkpoints.steps(tmp_path / "max" / "checkpoints") == [3, 7]
    fitted = fit(**run, maximize=False, out=tmp_path / "min")
    assert (fitted.best["step"], fitted.best["eval/score"]) == (7, 0)
    assert checkpoints.steps(tmp_path / "min" / "checkpoints") == [7]
    assert fit(**{**run, "eval_data": None}).best is None
    with pytest.raises(jt.InputError, match="unknown metric to monitor 'nothing'; known: loss, score"):
        fit(**{**run, "monitor": "nothing"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scores", "patience", "stops", "sign"),
    [
        ([0, 1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3], 2, 5, 1),
        ([0, 1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3], 4, 7, -1),
        ([0, 5, 4, 6, 4, 5, 7, 1, 1, 1, 1, 1, 1], 3, 9, 1),
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], 1, 12, -1),
        ([0, 5, 4, 6, 4, 5, 7, 1, 1, 1, 1, 1, 1], None, 12, -1),
        ([0, 5, 5, 6, 7, 8, 9, 9, 9, 9, 9, 9, 9], 1, 2, -1),
    ],
)
def test_early_stop(tmp_path, scores, patience, stops, sign):
    run = {"eval_every": 1, "monitor": "score", "maximize": sign > 0, "patience": patience, "out": tmp_path / "run"}
    run["objective"] = scored([sign * score for score in scores])
    fitted = fit(**run, save_every=4)
    assert int(fitted.state.step) == stops
    assert fitted.history[-1]["step"] == stops
    assert stops in checkpoints.steps(tmp_path / "run" / "checkpoints")
    again = fit(**run, save_every=4)
    assert int(again.state.step) == stops
    assert again.history == fitted.history
    assert again.best == fitted.best


def test_evaluation_of_another_objective():
    fitted = fit(eval_objective=jt.classification(MODEL).named("other"), monitor="other/accuracy")
    assert "eval/other" in fitted.history[-1]
    assert fitted.best is not None


@pytest.mark.slow
def test_start_from_given_weights(tmp_path):
    start = jt.init(OBJECTIVE, optax.sgd(0.1), jax.random.key(50), batch(0))
    params, state = jax.tree.map(lambda x: x + 0.5, (start.params, start.state))
    kept = jax.tree.map(np.array, (params, state))
    fitted = fit(optimizer=optax.set_to_zero(), params=params, state=state, steps=1)
    assert_same(fitted.state.params, params)
    fit(params=params, state=state, steps=2)
    chex.assert_trees_all_equal(kept, (params, state))


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_devices_change_nothing(mesh_of, mode):
    objective = jt.classification(jt.models.mlp(3, hidden=(5,)))  # which draws nothing
    one = fit(objective=objective)
    many = fit(objective=objective, mesh=mesh_of(4), mode=mode)
    for record, want in zip(many.history, one.history, strict=True):
        assert record == pytest.approx(want, rel=1e-4)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_it_goes_on_when_there_is_space(tmp_path, monkeypatch):
    whole, save, count = fit(out=tmp_path / "whole", save_every=2), ocp.Checkpointer.save, []

    def failing(self, *args, **kwargs):
        count.append(1)
        if len(count) == 3:
            raise OSError(28, "No space left on device")
        return save(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(ocp.Checkpointer, "save", failing)
        with pytest.raises(jt.InputError, match=r"could not save step 6 .*No space left on device"):
            fit(out=tmp_path / "run", save_every=2)
    folder = tmp_path / "run" / "checkpoints"
    assert checkpoints.steps(folder) == [2, 4]
    assert not list(folder.glob(".writing-*"))
    assert_same(fit(out=tmp_path / "run", save_every=2).state, whole.state)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


def test_what_is_best_by_default():
    fitted = fit()
    assert fitted.best["eval/accuracy"] == max(r["eval/accuracy"] for r in fitted.history if "eval/loss" in r)
    fitted = fit(objective=jt.l2() + 0 * OBJECTIVE.named("task"))  # no accuracy under its name: the smallest loss
    losses = {r["step"]: r["eval/loss"] for r in fitted.history if "eval/loss" in r}
    assert fitted.best["step"] == min(losses, key=losses.get)


def test_the_progress_bar_goes_to_stderr_only_where_it_is_wanted(capsys, monkeypatch):
    fit(steps=2)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal
    fit(steps=2, progress=False)
    assert capsys.readouterr() == ("", "")
    fit(steps=2)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"2/2", err)


@pytest.mark.slow
def test_measures_beside_the_evaluation(tmp_path):
    """A measure runs at its own steps, stands in the records, chooses the checkpoint, and resumes the same."""
    seen = []

    def measure(state):
        seen.append(int(state.step))
        return {"nearness": -abs(int(state.step) - 4.0)}

    images = np.arange(8 * 4, dtype=np.uint8).reshape(8, 2, 2, 1)
    batch = {"image": images, "label": np.arange(8, dtype=np.int32) % 3}
    objective = jt.classification(jt.models.mlp(3, hidden=()))

    def fitted(**more):
        return jt.fit(objective, optax.sgd(0.1), [batch] * 10, steps=10, progress=False, **more)

    options = {"eval_data": [batch], "eval_every": 5, "measure": measure, "measure_every": 4, "keep": 1}
    run = fitted(**options, monitor="nearness", out=tmp_path / "run")
    assert seen == [4, 8, 10]
    found = [(one["step"], [name for name in ("eval/loss", "eval/nearness") if name in one]) for one in run.history]
    assert [one for one in found if one[1]] == [
        (4, ["eval/nearness"]),
        (5, ["eval/loss"]),
        (8, ["eval/nearness"]),
        (10, ["eval/loss", "eval/nearness"]),
    ]
    assert run.best["step"] == 4
    assert {4, 10} <= set(checkpoints.steps(tmp_path / "run" / "checkpoints"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["eval/nearness"] for line in lines if "eval/nearness" in line] == [0, -4, -6]
    beside = fitted(measure=measure, measure_every=4, eval_data=[batch], eval_every=5, monitor="accuracy")
    evaluated = [record for record in beside.history if "eval/accuracy" in record]
    assert beside.best == max(evaluated, key=lambda record: record["eval/accuracy"])
    assert fitted(measure=measure, eval_every=10).best is None  # no accuracy and no loss among what is measured
    for more, why in (
        ({"measure": lambda: {}}, r"measure is a function of \(state\)"),
        ({"measure": measure, "measure_every": 0}, "measure_every must be a positive whole number"),
        ({"measure": measure, "monitor": "nearnes"}, r"unknown metric to monitor 'nearnes' \(did you mean 'nearness'"),
        ({"measure": lambda state: {"loss": 0.0}, "eval_data": [batch]}, "can't be called 'loss'"),
    ):
        with pytest.raises(jt.InputError, match=why):
            fitted(**more)


def test_what_fit_gives_back_prints_its_result():
    state = jt.TrainState.of({"model": {"w": jnp.zeros((300, 300))}})
    history = [{"step": 5, "train/loss": 0.51239}, {"step": 5, "eval/accuracy": 0.75}, {"step": 9, "train/loss": 0.25}]
    fitted = jt.Fitted(state, history, history[1], {"seconds": 12.345})
    expected = "best at 5: eval/accuracy 0.75; last: train/loss 0.25, eval/accuracy 0.75; 12.3 s)"
    assert repr(fitted) == f"Fitted(step 9; {expected}"
    assert repr(jt.Fitted(state, [], None, {})) == "Fitted(nothing recorded)"
