"""A run is what it was trained on: another call in the same folder is told by name, the same one never is."""

import json
import os
import subprocess
import sys
import warnings

import chex
import cv2
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.train import fingerprint

MODEL = jt.models.mlp(3, hidden=(4,))


def batch(i, rows=6, seed=0):
    rng = np.random.default_rng([seed, i])
    return {"image": rng.normal(size=(rows, 4)).astype(np.float32), "label": rng.integers(0, 3, rows).astype(np.int32)}


BATCHES = [batch(i) for i in range(12)]
WEIGHTS = jt.init(jt.classification(MODEL), optax.sgd(0.1), jax.random.key(5), BATCHES[0]).params


def moved(tree, size):
    """The tree, each of its leaves moved by that much of its norm in a random direction."""
    rng = np.random.default_rng(1)

    def move(x):
        noise = rng.normal(size=x.shape)
        return jnp.asarray(x + size * np.linalg.norm(x) * noise / max(np.linalg.norm(noise), 1e-9), x.dtype)

    return jax.tree.map(move, tree)


def objective(smoothing=0.0, strength=0.1, anchor=WEIGHTS, temperature=2.0, model=MODEL):
    teacher = jt.frozen(MODEL.named("teacher"), {"params": anchor["model"]})
    lesson = jt.distillation(model, teacher, temperature=temperature)
    return jt.classification(model, label_smoothing=smoothing) + jt.l2_sp(anchor, strength=strength) + 0.5 * lesson


def fit(out, **options):
    options = {"steps": 4, "key": 3, "progress": False, **options}
    return jt.fit(
        options.pop("objective", None) or objective(),
        options.pop("optimizer", None) or optax.adamw(0.01),
        options.pop("data", BATCHES),
        out=out,
        **options,
    )


def double(key, batch, rows):
    return {**batch, "image": 2 * batch["image"]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run; nothing of what follows may change it."""
    out = tmp_path_factory.mktemp("identity") / "run"
    fit(out)
    return out


CHANGES = {
    "seed: 3 there, 4 now": {"key": 4},
    "objective": {"objective": objective(smoothing=0.3)},
    "objective ": {"objective": objective(strength=0.2)},
    "objective  ": {"objective": objective(temperature=3.0)},
    "optimizer": {"optimizer": optax.adamw(0.02)},
    "optimizer ": {"optimizer": optax.adamw(0.01, weight_decay=0.3)},
    "optimizer  ": {"optimizer": optax.adamw(optax.cosine_decay_schedule(0.01, 4))},
    "optimizer   ": {"optimizer": optax.inject_hyperparams(optax.adamw)(0.01)},
    "first batch (batch i must depend on i alone": {"data": [batch(i, seed=1) for i in range(12)]},
    "batch size: 6 there, 7 now": {"data": [batch(i, rows=7) for i in range(12)]},
    "transform": {"transform": double},
    "starting weights": {"params": WEIGHTS},
    "frozen weights": {"objective": objective(anchor=moved(WEIGHTS, 0.01))},
}


@pytest.mark.parametrize("told", CHANGES)
def test_what_differs_is_named(trained, told):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    with pytest.raises(jt.InputError, match="holds a run of another configuration") as error:
        fit(trained, **CHANGES[told])
    assert f"({told.strip()}" in str(error.value)
    assert str(error.value).count(";") == 1 + ("first batch" in told), "one difference is one part"
    assert before == {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}


def test_several_differences_are_all_named(trained):
    with pytest.raises(jt.InputError, match=r"\(seed: 3 there, 9 now; optimizer; steps: 4 there, 8 now\)"):
        fit(trained, optimizer=optax.sgd(1.0), key=9, steps=8)


def test_the_same_call_is_the_same_run(trained):
    again = fit(
        trained,
        objective=objective(anchor=jax.tree.map(np.array, WEIGHTS)),
        data=[dict(one) for one in BATCHES],
        key=jax.random.key(3),
        eval_every=1,
        log_every=1,
        save_every=3,
        keep=1,
        mesh=jax.make_mesh((2,), ("x",), devices=jax.devices()[:2]),
    )
    assert again.timing == {}
    assert fit(trained, mode="pmap", mesh=jax.make_mesh((3,), ("x",), devices=jax.devices()[:3])).timing == {}


@pytest.mark.slow
def test_weights_that_are_computed_anew_may_differ_by_their_rounding(tmp_path):
    """Fisher diagonals and encoders' statistics are computed again in each process, on other devices maybe."""
    start = moved(WEIGHTS, 0.1)
    fit(tmp_path, objective=objective(anchor=WEIGHTS), params=start)
    again = {"objective": objective(anchor=moved(WEIGHTS, 1e-6)), "params": moved(start, 1e-6)}
    assert fit(tmp_path, **again).timing == {}
    with pytest.raises(jt.InputError, match=r"\(starting weights\)"):
        fit(tmp_path, **{**again, "params": moved(start, 1e-2)})
    with pytest.raises(jt.InputError, match=r"\(starting weights\)"):
        fit(tmp_path, **{**again, "params": None})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*stored in bfloat16")
def test_half_precision_and_captured_arrays(tmp_path):
    def with_table(table, dtype):
        def loss(outputs, params, state, batch, ctx):
            value = jnp.sum(params["p"].astype(jnp.float32) * table)
            return value**2, state, {"it": jt.Mean(value, jnp.ones(()))}

        return jt.Objective("it", (), loss, setup=lambda key, batch: ({"p": jnp.ones(3, dtype)}, {}))

    table = np.array([1.0, 2.0, 3.0], np.float32)
    fit(tmp_path, objective=with_table(table, jnp.bfloat16))
    assert fit(tmp_path, objective=with_table(jnp.asarray(table.copy()), jnp.bfloat16)).timing == {}
    with pytest.raises(jt.InputError, match=r"\(objective\)"):
        fit(tmp_path, objective=with_table(table[::-1].copy(), jnp.bfloat16))


SCRIPT = """
import sys
import jax, jax.numpy as jnp, numpy as np, optax
import jaxtransfer as jt

table = {name: jnp.arange(3.0) for name in {"a", "b", "c", "d"}}  # a set: its order is the process's own
weight = lambda step: 0.1 + 0.01 * step

class Data:
    def iterate(self, start):
        for i in range(start, 99):
            rng = np.random.default_rng(i)
            yield {"image": rng.normal(size=(8, 4)).astype(np.float32), "label": np.arange(8, dtype=np.int32) % 3}

def penalty():
    def loss(outputs, params, state, batch, ctx):
        value = sum(jnp.sum(entry) * jnp.mean(params["model"]["head"]["bias"]) for _, entry in sorted(table.items()))
        return value**2, state, {"penalty": jt.Mean(value**2, jnp.ones(()))}
    return jt.Objective("penalty", (), loss)

model = jt.models.small_cnn(3) if False else jt.models.mlp(3, hidden=(4,))
masked = optax.masked(optax.add_decayed_weights(1e-3), lambda params: jax.tree.map(lambda x: x.ndim > 1, params))
optimizer = optax.chain(optax.clip_by_global_norm(1.0), masked, optax.adam(lambda step: 0.1 / (1 + step)))
objective = jt.classification(model) + weight * penalty() + 1e-3 * jt.l2(only={"body", "head"} and ".*")
transform = lambda key, batch, rows: {**batch, "image": batch["image"] + jax.random.normal(key, batch["image"].shape)}
count = jax.device_count()
mesh = None if count == 1 else jax.make_mesh((count,), ("x",))
fitted = jt.fit(objective, optimizer, Data(), steps=3, out=sys.argv[1], transform=transform, mesh=mesh)
print(count, bool(fitted.timing))
"""


@pytest.mark.slow
def test_another_process_and_another_number_of_devices_go_on_with_the_run(tmp_path):
    told = []
    for seed, devices in (("1", 1), ("2", 4)):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu"}
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
        words = [sys.executable, "-W", "error::UserWarning", "-c", SCRIPT, str(tmp_path / "run")]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        told.append(done.stdout.split())
    assert told == [["1", "True"], ["4", "False"]]


@pytest.mark.slow
def test_more_steps_train_on(tmp_path):
    long = fit(tmp_path / "long", steps=10, eval_data=BATCHES[:2])
    short = fit(tmp_path / "run", steps=4, eval_data=BATCHES[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        on = fit(tmp_path / "run", steps=10, eval_data=BATCHES[:2])
    chex.assert_trees_all_equal(on.state.params, long.state.params)
    assert on.history[: len(short.history)] == short.history
    steps = [record["step"] for record in on.history if "eval/loss" in record]
    assert steps == list(range(1, 11))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 10
    assert fit(tmp_path / "run", steps=10, eval_data=BATCHES[:2]).timing == {}
    with pytest.raises(jt.InputError, match=r"is at step 10 of 10; got steps=6\. Ask for more"):
        fit(tmp_path / "run", steps=6)


@pytest.mark.slow
def test_more_steps_of_a_schedule_over_all_steps_are_another_run(tmp_path):
    def falling(steps):
        return optax.sgd(optax.cosine_decay_schedule(0.1, steps))

    fit(tmp_path, optimizer=falling(4))
    with pytest.raises(jt.InputError, match=r"run of 4 steps, and got steps=8 with another optimizer: a schedule") as e:
        fit(tmp_path, optimizer=falling(8), steps=8)
    assert "Repeat it with steps=4, or begin a new run from its weights in another --out (params=" in str(e.value)
    fit(tmp_path, optimizer=falling(4), steps=8)  # one that has ended by then is the caller's to choose


@pytest.mark.slow
def test_fewer_steps_end_a_run_that_is_not_there_yet(tmp_path):
    class Fails:
        def iterate(self, start):
            yield from BATCHES[start:4]
            raise RuntimeError("away")

    with pytest.raises(RuntimeError, match="away"):
        fit(tmp_path, data=Fails(), steps=10, save_every=2)
    assert int(fit(tmp_path, steps=6).state.step) == 6


@pytest.mark.slow
def test_a_run_without_a_note_goes_on_with_what_is_known(tmp_path):
    fit(tmp_path)
    (tmp_path / "identity.json").unlink()
    assert fit(tmp_path, optimizer=optax.adamw(0.5)).timing == {}
    with pytest.raises(jt.InputError, match=r"\(optimizer\)"):  # which is noted now
        fit(tmp_path)
    for text in ("", "7", "{}", '{"parts": 3, "steps": 4}', "\x00"):
        (tmp_path / "identity.json").write_text(text)
        with pytest.warns(UserWarning, match=r"identity\.json can't be read: nothing tells whether"):
            assert fit(tmp_path).timing == {}


@pytest.mark.slow
def test_what_has_no_checkpoint_yet_may_be_begun_in_another_way(tmp_path):
    with pytest.raises(jt.NonFiniteLossError):
        fit(tmp_path, data=[{**BATCHES[0], "image": np.full((6, 4), np.nan, np.float32)}] * 12, config={"rate": 9})
    assert int(fit(tmp_path, optimizer=optax.sgd(0.1), key=8, config={"rate": 0.1}).state.step) == 4
    with pytest.raises(jt.InputError, match=r"\(rate: 0\.1 there, 9 now\)"):
        fit(tmp_path, optimizer=optax.sgd(0.1), key=8, config={"rate": 9})


@pytest.mark.slow
def test_programs_are_compared_under_the_same_versions_only(tmp_path):
    fit(tmp_path)
    path = tmp_path / "identity.json"
    note = json.loads(path.read_text())
    note["environment"]["jax"] = "0.1.2"
    path.write_text(json.dumps(note))
    with pytest.warns(UserWarning, match=r"was begun under platform cpu, jax 0.1.2.*can't be compared") as told:
        assert fit(tmp_path, optimizer=optax.adamw(0.5)).timing == {}
    assert len(told) == 1
    path.write_text(json.dumps(note))
    with pytest.raises(jt.InputError, match=r"\(seed: 3 there, 4 now\)"):
        fit(tmp_path, key=4)


@pytest.mark.slow
def test_other_evaluation_data_are_told(tmp_path):
    fit(tmp_path, steps=2, eval_data=BATCHES[:2])
    assert fit(tmp_path, steps=2, eval_data=BATCHES[:2]).timing == {}
    with pytest.warns(UserWarning, match="was evaluated on other data so far: the best step and the patience"):
        fit(tmp_path, steps=3, eval_data=BATCHES[2:4])


@pytest.mark.slow
def test_lines_that_are_missing_are_told(tmp_path):
    whole = fit(tmp_path, eval_data=BATCHES[:1], eval_every=2, log_every=1)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == len(whole.history) == 6
    again = {"eval_data": BATCHES[:1], "eval_every": 2, "log_every": 1}
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:2] + lines[3:]))
    with pytest.warns(UserWarning, match=r"metrics.jsonl lacks 1 records of steps .* the first of step 2; the best"):
        fit(tmp_path, **again)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.warns(UserWarning, match="lacks 6 records"):
        fit(tmp_path, **again)
    fit(tmp_path, **{**again, "log_every": 2})  # under other periods nobody knows what there should be


class Described:
    """Data that draw their batches anew, and say what they are."""

    def __init__(self, name):
        self.name, self.rng = name, np.random.default_rng()

    def iterate(self, start):
        while True:
            yield batch(int(self.rng.integers(1000)))

    def fingerprint(self):
        return {"data": self.name}


@pytest.mark.slow
def test_data_may_say_what_they_are(tmp_path):
    fit(tmp_path, data=Described("mine"))
    assert fit(tmp_path, data=Described("mine")).timing == {}
    with pytest.raises(jt.InputError, match=r"\(data: mine there, yours now\)"):
        fit(tmp_path, data=Described("yours"))


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for label in range(3):
        (tmp_path / "images" / f"class{label}").mkdir(parents=True)
        for number in range(6):
            image = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            assert cv2.imwrite(str(tmp_path / "images" / f"class{label}" / f"{number}.png"), image)
    return tmp_path / "images"


@pytest.mark.slow
def test_the_data_of_a_pipeline(tmp_path, folder):
    model = jt.models.mlp(3, hidden=())

    def run(batch_size=6, **options):
        dataset = jt.data.load(f"folder:{folder}", "train" if options.pop("part", False) else "all")
        data = jt.data.pipeline(
            dataset, batch_size, threads=0, **{"augment": jt.data.augment.random_crop(2), **options}
        )
        return jt.fit(jt.classification(model), optax.sgd(0.1), data, steps=2, out=tmp_path / "run")

    run()
    assert run().timing == {}
    for options, told in (
        ({"batch_size": 9}, r"batch size: 6 there, 9 now\)"),
        ({"seed": 1}, r"\(data seed: 0 there, 1 now\)"),
        ({"shuffle": False}, r"\(shuffle: True there, False now\)"),
        ({"augment": jt.data.augment.random_crop(3)}, r"\(augmentation\)"),
        ({"augment": None}, r"\(augmentation\)"),
        ({"part": True}, r"split: all there, train now"),
    ):
        with pytest.raises(jt.InputError, match=told):
            run(**options)
    drawn_anew = {"augment": lambda batch, rng: {**batch, "image": np.random.default_rng().permuted(batch["image"])}}
    assert run(**{"augment": jt.data.augment.random_crop(2)}).timing == {}
    one, other = folder / "class0" / "1.png", folder / "class2" / "4.png"
    one.rename(folder / "aside")
    other.rename(one)
    (folder / "aside").rename(other)
    with pytest.raises(jt.InputError, match=r"\(images\)"):
        run()
    for _ in range(2):  # no seed says what it draws, so nothing can be compared
        jt.fit(
            jt.classification(model),
            optax.sgd(0.1),
            jt.data.pipeline(jt.data.load(f"folder:{folder}", "all"), 6, **drawn_anew),
            steps=2,
            out=tmp_path / "anew",
        )


@pytest.mark.slow
def test_draws_inside_the_step(tmp_path):
    data = {name: jnp.concatenate([one[name] for one in BATCHES]) for name in ("image", "label")}

    def sampler(rows):
        def sample(key, data):
            chosen = jax.random.randint(key, (rows,), 0, data["label"].shape[0])
            return jax.tree.map(lambda column: column[chosen], data)

        return sample

    def run(data=data, sample=sampler(6)):  # noqa: B008
        return fit(tmp_path, data=data, sample=sample, log_every=4)

    run()
    assert run(jax.tree.map(np.asarray, data), sampler(6)).timing == {}
    with pytest.raises(jt.InputError, match=r"\(batch size: 6 there, 8 now\)"):
        run(sample=sampler(8))
    with pytest.raises(jt.InputError, match=r"\(data\)"):
        run({**data, "label": data["label"][::-1]})
    with pytest.raises(jt.InputError, match=r"\(sample\)"):
        run(sample=lambda key, data: sampler(6)(jax.random.fold_in(key, 1), data))


@pytest.mark.slow
def test_notes_cost_no_further_trace_of_the_step(tmp_path):
    traces = []

    def apply(variables, inputs, *, train, key):
        traces.append(train)
        return {"logits": inputs @ variables["params"]["w"]}, {}

    model = jt.Model(lambda key, inputs: {"params": {"w": jnp.zeros((4, 3))}}, apply)
    fit(None, objective=jt.classification(model))
    plain = len(traces)
    traces.clear()
    fit(tmp_path, objective=jt.classification(model))
    assert len(traces) == plain + 1  # of the loss alone


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(), (1,), (7, 5), (4096,), (3, 4097), (0, 2)])
def test_sketches_of_arrays(dtype, shape):
    rng = np.random.default_rng(0)
    x = np.asarray(rng.normal(size=shape), jnp.dtype(dtype))
    of = fingerprint.of_array
    assert fingerprint.same(of(x), json.loads(json.dumps(of(jnp.asarray(x)))) if dtype != "float64" else of(x.copy()))
    if x.size:
        norm = np.linalg.norm(x.astype(np.float64))
        assert of(x)[1] == pytest.approx(norm, rel=1e-5)
        assert not fingerprint.same(of(x), of((x * 1.05).astype(x.dtype)))
        assert not fingerprint.same(of(x), of(-x))
        assert not fingerprint.same(of(x), of(x.reshape(1, *shape)))
    if x.size > 1:
        assert not fingerprint.same(of(x), of(np.ascontiguousarray(x[::-1]) if x.shape[0] > 1 else x[:, ::-1]))
        swapped = x.reshape(-1).copy()
        swapped[[0, -1]] = swapped[[-1, 0]]
        if x.size < 100:
            assert not fingerprint.same(of(x), of(swapped.reshape(shape)))
