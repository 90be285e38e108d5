import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.train import batches, checkpoints


def linear():
    def init(key, inputs):
        return {"params": {"head": {"kernel": jax.random.normal(key, (inputs.shape[-1], 3))}}}

    def apply(variables, inputs, *, train, key):
        return {"logits": inputs @ variables["params"]["head"]["kernel"]}, {}

    return jt.Model(init, apply, stages=("head",))


def episodes(rng, tasks):
    def part(rows):
        image = rng.normal(size=(tasks, rows, 6)).astype(np.float32)
        return {"image": image, "label": rng.integers(0, 3, (tasks, rows)).astype(np.int32)}

    return {"support": part(6), "query": part(9)}


def reference(kernel, batch, rate):
    """Accuracy and cross-entropy of each episode after one written-out gradient step."""
    rows = []
    for task in range(batch["query"]["label"].shape[0]):
        x, y = batch["support"]["image"][task].astype(np.float64), batch["support"]["label"][task]
        p = np.exp(x @ kernel)
        p /= p.sum(1, keepdims=True)
        adapted = kernel - rate * x.T @ (p - np.eye(3)[y]) / len(y)
        x, y = batch["query"]["image"][task].astype(np.float64), batch["query"]["label"][task]
        scores = x @ adapted
        log = scores - np.log(np.exp(scores).sum(1, keepdims=True))
        rows.append((np.mean(scores.argmax(1) == y), -np.mean(log[np.arange(len(y)), y])))
    return np.array(rows)


@pytest.mark.parametrize(("at_once", "devices"), [(None, None), (1, None), (2, None), (4, None), (None, 4)])
def test_each_episode_by_itself(rng, mesh_of, at_once, devices):
    model = linear()
    objective = jt.maml(jt.classification(model), inner=optax.sgd(0.3), steps=1)
    batches = [episodes(rng, 4) for _ in range(3)]
    state = jt.init(objective, optax.sgd(0.1), jax.random.key(0), batches[0])
    mesh = None if devices is None else mesh_of(devices)
    result = jt.evaluate_episodes(objective, state, batches, at_once=at_once, mesh=mesh)
    kernel = np.asarray(state.params["model"]["head"]["kernel"], np.float64)
    expected = np.concatenate([reference(kernel, batch, 0.3) for batch in batches])
    for name, values in zip(("accuracy", "classification"), expected.T, strict=True):
        assert result[name].episodes == 12
        assert result[name].mean == pytest.approx(values.mean(), rel=1e-5)
        assert result[name].half == pytest.approx(1.96 * values.std(ddof=1) / np.sqrt(12), rel=1e-4)
    assert str(result["accuracy"]) == f"{expected[:, 0].mean():.4f} ± {result['accuracy'].half:.4f}"


def test_one_episode_has_no_spread_and_none_is_an_error(rng):
    model = linear()
    objective = jt.maml(jt.classification(model), inner=optax.sgd(0.3), steps=1)
    batch = episodes(rng, 1)
    state = jt.init(objective, optax.sgd(0.1), jax.random.key(0), batch)
    assert jt.evaluate_episodes(objective, state, [batch])["accuracy"].half == 0
    with pytest.raises(jt.InputError, match="at least one episode"):
        jt.evaluate_episodes(objective, state, [])
    with pytest.raises(jt.InputError, match="got 3 for 4 episodes"):
        jt.evaluate_episodes(objective, state, [episodes(rng, 4)], at_once=3)
    with pytest.raises(jt.InputError, match="got 0 for 4 episodes"):
        jt.evaluate_episodes(objective, state, [episodes(rng, 4)], at_once=0)


def drawing(rows=8):
    def sample(key, data):
        picked = jax.random.randint(key, (rows,), 0, data["image"].shape[0])
        return jax.tree.map(lambda x: jnp.take(x, picked, axis=0), data)

    return sample


@pytest.fixture
def data(rng):
    image = rng.normal(size=(50, 6)).astype(np.float32)
    return {"image": image, "label": (image[:, 0] > 0).astype(np.int32) + (image[:, 1] > 0)}


OPTIONS = {"optimizer": optax.adam(0.05), "steps": 20, "sample": drawing(), "progress": False}


def fitted(data, objective, **options):
    optimizer = options.pop("optimizer", OPTIONS["optimizer"])
    return jt.fit(objective, optimizer, data, **{**{k: v for k, v in OPTIONS.items() if k != "optimizer"}, **options})


def test_fit_draws_inside_the_step_and_the_number_per_call_changes_nothing(data):
    objective = jt.classification(linear())
    runs = {k: fitted(data, objective, steps_per_call=k) for k in (1, 3, 7, 20, None)}
    first = runs[1].state.params["model"]["head"]["kernel"]
    for k, run in runs.items():
        assert int(run.state.step) == 20
        np.testing.assert_array_equal(run.state.params["model"]["head"]["kernel"], first, err_msg=str(k))
        assert run.history[-1]["step"] == 20
    assert [record["step"] for record in runs[7].history] == [7, 14, 20]
    whole, parts = runs[20].history, runs[1].history
    assert whole[0]["train/loss"] == pytest.approx(np.mean([r["train/loss"] for r in parts]), rel=1e-5)
    assert runs[7].history[0]["train/loss"] == pytest.approx(np.mean([r["train/loss"] for r in parts[:7]]), rel=1e-5)


@pytest.mark.slow
def test_fit_evaluates_and_saves_between_the_calls(data, tmp_path):
    objective, evals = jt.classification(linear()), [data]
    options = {"eval_data": evals, "eval_every": 5, "save_every": 5, "log_every": 5}
    run = fitted(data, objective, steps_per_call=4, out=tmp_path / "a", **options)
    assert [record["step"] for record in run.history if "eval/loss" in record] == [8, 16, 20]
    assert checkpoints.steps(tmp_path / "a" / "checkpoints")[-1] == 20


@pytest.mark.slow
def test_a_drawn_run_that_was_interrupted_ends_as_the_unbroken_one(data, tmp_path):
    objective, unbroken = jt.classification(linear()), None

    class Stop(Exception):
        pass

    def stop(record):
        if record["step"] == 12:
            raise Stop

    options = {"steps_per_call": 4, "save_every": 4, "log_every": 4}
    unbroken = fitted(data, objective, **options)
    with pytest.raises(Stop):
        fitted(data, objective, out=tmp_path / "a", log=stop, **options)
    resumed = fitted(data, objective, out=tmp_path / "a", **{**options, "steps_per_call": 3})
    chex.assert_trees_all_equal(resumed.state.params, unbroken.state.params)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_devices_change_nothing(data, mesh_of, mode):
    objective = jt.classification(linear())
    one = fitted(data, objective, steps_per_call=5)
    four = fitted(data, objective, steps_per_call=5, mesh=mesh_of(4), mode=mode)
    a, b = (np.asarray(run.state.params["model"]["head"]["kernel"]) for run in (one, four))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_loss_that_is_not_finite_names_the_steps(data):
    objective = (lambda step: jnp.where(step == 9, jnp.nan, 1.0)) * jt.classification(linear())
    with pytest.raises(jt.NonFiniteLossError, match="within steps 9 to 12"):
        fitted(data, objective, steps_per_call=4)


def test_steps_per_call_needs_a_sampler(data):
    with pytest.raises(jt.InputError, match="steps_per_call needs sample"):
        jt.fit(jt.classification(linear()), optax.sgd(0.1), [data] * 5, steps=5, steps_per_call=2)
    with pytest.raises(jt.InputError, match="steps_per_call must be a positive"):
        fitted(data, jt.classification(linear()), steps_per_call=0)


@pytest.mark.slow
def test_by_default_convolutions_are_not_looped_over_on_a_cpu(monkeypatch):
    image = np.random.default_rng(0).normal(size=(20, 4, 4, 1)).astype(np.float32)
    data = {"image": image, "label": (np.arange(20) % 3).astype(np.int32)}
    loops = []

    def spied(*args, **kwargs):
        step = train_step(*args, **kwargs)
        loops.append(kwargs.get("steps_per_call"))
        return step

    train_step = batches.train_step
    monkeypatch.setattr(batches, "train_step", spied)
    for model, records in ((jt.models.small_cnn(3), [1, 2, 3, 4]), (jt.models.mlp(3, hidden=()), [4])):
        loops.clear()
        run = fitted(data, jt.classification(model), steps=4, log_every=4, save_every=1)
        assert [record["step"] for record in run.history] == records
        assert set(loops) == ({None} if len(records) > 1 else {None, 4})  # a loop of one is one, too


def test_a_single_step_has_no_loop():
    model = jt.models.mlp(3, hidden=(4,))
    data = {"image": np.zeros((6, 2, 2, 1), np.float32), "label": np.zeros(6, np.int32)}
    programs = {}
    for count in (None, 1, 3):
        step = jt.train_step(
            jt.classification(model), optax.sgd(0.1), sample=lambda key, data: data, steps_per_call=count
        )
        state = jt.init(jt.classification(model), optax.sgd(0.1), jax.random.key(0), data)
        programs[count] = step.lower(state, data).as_text()
    assert "stablehlo.while" not in programs[None]
    assert "stablehlo.while" in programs[3]
