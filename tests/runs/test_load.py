"""A run is a thing of the library: what Python trains the command line uses, and the other way round."""

import dataclasses
import json
import shutil

import cv2
import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.cli import main
from jaxtransfer.models.description import describe, rebuild

SHAPE = (8, 8, 1)
pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two domains of the embedded digits; they are prepared outside of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXTRANSFER_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("TFDS_DATA_DIR", raising=False)
        yield {
            "train": jt.data.load("digits/upright", "train").take(200),
            "test": jt.data.load("digits/upright", "test").take(60),
        }


def trained(data, out, net, **options):
    """Trains four steps in Python."""
    batches = jt.data.pipeline(data["train"], 16, seed=1)
    evals = {"eval_data": jt.data.eval_batches(data["test"], 60), "eval_every": 2}
    options = {"steps": 4, "model": net, **evals, **options}
    objective = options.pop("objective", None) or jt.classification(net)
    return jt.fit(objective, optax.sgd(0.1), batches, out=out, **options)


@pytest.fixture(scope="module")
def own(data, tmp_path_factory):
    """A run of Python: a network of the zoo with another width, normalised, under a name of its own."""
    out = tmp_path_factory.mktemp("python") / "own"
    net = jt.models.mlp(10, hidden=(12,), name="digits")
    model = jt.models.normalize(net, *jt.data.statistics(data["train"]))
    return out, model, trained(data, out, model)


def kernel(params):
    return params["head"]["kernel"]


def logits(run, images):
    return np.asarray(run.model.apply(run.variables, images, train=False, key=None)[0]["logits"])


def said(capsys, *words):
    """Runs a command; returns its lines on stdout."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out.splitlines()


def refused(capsys, *words):
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err


def test_what_python_trained_is_read_back(own, data):
    out, model, fitted = own
    run = jt.load_run(out)
    images = data["test"].read(np.arange(9))["image"]
    assert run.step == fitted.best["step"]
    assert run.result == {k[5:]: v for k, v in fitted.best.items() if k.startswith("eval/")}
    assert (run.knows, run.class_names, run.finished) == (("classes",), data["train"].class_names, True)
    assert run.preprocessing == (SHAPE, *map(tuple, jt.data.statistics(data["train"])))
    last = jt.load_run(out, checkpoint="last")
    assert last.step == 4
    state = fitted.state
    expected = model.apply({"params": state.params["digits"]}, images, train=False, key=None)[0]["logits"]
    np.testing.assert_array_equal(logits(last, images), expected)
    assert jt.load_run(out, checkpoint=2).step == 2
    assert repr(last).startswith(f"Run({out}: mlp, 10 classes, step 4; ")
    again = jt.fit(  # it goes on where it was read
        jt.classification(last.model), optax.sgd(0.1), [{"image": images, "label": np.arange(9)}], steps=1,
        params=last.params, state=last.state,
    )  # fmt: skip
    assert int(again.state.step) == 1


@pytest.mark.slow
def test_commands_use_what_python_trained(own, data, capsys, tmp_path):
    out, _, _ = own
    run = jt.load_run(out)
    (line,) = said(capsys, "evaluate", out, "--split", "test[:60]")
    facts = json.loads(line)
    assert (facts["data"], facts["examples"]) == ("digits/upright", 60)
    assert facts["accuracy"] == pytest.approx(run.result["accuracy"], abs=1e-6)
    assert facts["loss"] == pytest.approx(run.result["loss"], rel=1e-5)
    for number in range(3):
        assert cv2.imwrite(str(tmp_path / f"{number}.png"), data["test"][number]["image"])
    rows = [json.loads(row) for row in said(capsys, "predict", out, *(tmp_path / f"{n}.png" for n in range(3)))]
    scores = np.asarray(jax.nn.softmax(logits(run, data["test"].read(np.arange(3))["image"])))
    assert [row["class"] for row in rows] == [run.class_names[k] for k in scores.argmax(1)]
    assert [row["probability"] for row in rows] == pytest.approx(scores.max(1).tolist(), abs=2e-6)
    short = ("--split", "train[:64]", "--eval-split", "test[:32]", "--steps", "2", "--batch-size", "16", "--out")
    said(capsys, "finetune", "--from", out, "--data", "digits/noisy", "--keep-head", *short, tmp_path / "tuned")
    said(capsys, "distill", "--teacher", out, "--data", "digits/upright", "--model", "linear", *short, tmp_path / "s")
    tuned = jt.load_run(tmp_path / "tuned")
    assert (tuned.model.name, tuned.config["model_options"]) == ("digits", {"hidden": [12]})
    assert tuned.params["digits"]["stage1"]["kernel"].shape == (64, 12)


@pytest.mark.slow
def test_what_a_command_trained_is_read_in_python(data, capsys, tmp_path):
    words = ("pretrain", "--data", "digits/upright", "--split", "train[:64]", "--eval-split", "test[:32]")
    said(capsys, *words, "--model", "small-cnn", "--steps", "2", "--batch-size", "16", "--out", tmp_path / "a")
    run = jt.load_run(tmp_path / "a")
    assert {"params", "batch_stats"} == set(run.variables)
    assert cv2.imwrite(str(tmp_path / "one.png"), data["test"][0]["image"])
    (line,) = said(capsys, "predict", tmp_path / "a", tmp_path / "one.png", "--top", "10")
    told = {row["class"]: row["probability"] for row in json.loads(line)["top"]}
    scores = np.asarray(jax.nn.softmax(logits(run, data["test"].read([0])["image"])))[0]
    assert [told[name] for name in run.class_names] == pytest.approx(scores.tolist(), abs=2e-6)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        return {"logits": nn.Dense(10, name="head")(x.reshape(len(x), -1) / 255.0)}


@pytest.mark.slow
def test_a_model_of_the_users_own(data, capsys, tmp_path):
    model = jt.models.linen(Net())
    fitted = trained(data, tmp_path / "run", model)
    for refusal in ("evaluate", "predict"):
        told = refused(capsys, refusal, tmp_path / "run", *([tmp_path / "x.png"] if refusal == "predict" else []))
        assert "doesn't say how its model is made" in told
        assert "jt.load_run(directory, model=...)" in told
    with pytest.raises(jt.InputError, match="pass it: "):
        jt.load_run(tmp_path / "run")
    run = jt.load_run(tmp_path / "run", model=model, checkpoint="last")
    np.testing.assert_array_equal(kernel(run.variables["params"]), kernel(fitted.state.params["model"]))
    assert run.class_names == data["train"].class_names
    with pytest.raises(jt.InputError, match="are not of the model that its configuration describes"):
        jt.load_run(tmp_path / "run", model=jt.models.mlp(10))
    with pytest.raises(jt.InputError, match=r"has trained \['model'\] and no model 'other'"):
        jt.load_run(tmp_path / "run", model=model.named("other"))


@pytest.mark.slow
def test_a_run_that_is_its_average(data, tmp_path, capsys):
    model = jt.models.mlp(10, hidden=())
    average = jt.ema(model, 0.5)
    objective = jt.classification(model) + 0.0 * jt.classification(average).named("slow")
    options = {"model": average, "eval_objective": jt.classification(average)}
    fitted = trained(data, tmp_path / "run", model, objective=objective, **options)
    run, plain = (jt.load_run(tmp_path / "run", checkpoint="last", average=one) for one in (None, False))
    np.testing.assert_array_equal(kernel(run.variables["params"]), kernel(fitted.state.state["model_ema"]["params"]))
    np.testing.assert_array_equal(kernel(plain.variables["params"]), kernel(fitted.state.params["model"]))
    asked = jt.load_run(tmp_path / "run", checkpoint="last", model=average)
    np.testing.assert_array_equal(kernel(asked.variables["params"]), kernel(run.variables["params"]))
    with pytest.raises(jt.InputError, match=r"a jt\.Model; got a dict"):
        jt.load_run(tmp_path / "run", model={})
    facts = json.loads(said(capsys, "evaluate", tmp_path / "run", "--split", "test[:60]")[0])
    assert facts["accuracy"] == pytest.approx(jt.load_run(tmp_path / "run").result["accuracy"], abs=1e-6)
    assert facts["step"] == fitted.best["step"]
    raw, test = jt.load_run(tmp_path / "run", average=False), data["test"].read(np.arange(60))
    scores = jt.measures.class_scores(logits(raw, test["image"]), test["label"])
    assert facts["raw"]["nll"] == pytest.approx(scores.nll, rel=1e-5)
    assert facts["raw"]["nll"] != facts["nll"]


@pytest.mark.slow
@pytest.mark.parametrize("own", ["head", (), ".*"])
def test_a_run_that_is_the_average_of_a_twin(data, tmp_path, own):
    """Its weights are the average's, those that it shares with its model as well as its own."""
    model = jt.models.mlp(10, hidden=(5,))
    twin = model.twin("target", own)
    average = jt.ema(twin, 0.5)
    objective = (
        jt.classification(model) + jt.classification(twin).named("b") + 0.0 * jt.classification(average).named("c")
    )
    fitted = trained(data, tmp_path / "run", twin, objective=objective, model=average)
    run = jt.load_run(tmp_path / "run", checkpoint="last", model=average)
    wanted = fitted.state.state["target_ema"]["params"]
    jax.tree.map(np.testing.assert_array_equal, run.variables["params"], jax.device_get(wanted))
    assert not np.array_equal(kernel(wanted), kernel(twin.whole(fitted.state.params)))
    images = data["test"].column("image")[:3]
    assert logits(run, images).shape == (3, 10)


@pytest.mark.slow
def test_an_encoder_without_classes(data, tmp_path, capsys):
    encoder = jt.models.mlp(3, hidden=(12,))  # its outputs are of no use, and as many as anybody likes
    net = jt.models.with_heads(encoder, projection=jt.models.head(4, batch_norm=False))
    both = {"image": data["train"].read(np.arange(16))["image"]}
    batch = {**both, "image2": both["image"][:, ::-1]}
    jt.fit(jt.simclr(net), optax.sgd(0.1), [batch] * 2, steps=2, out=tmp_path / "run", model=net, dataset=data["train"])
    run = jt.load_run(tmp_path / "run")
    assert (run.knows, run.variables["params"].keys()) == (("features",), {"stage1", "head"})
    assert run.model.apply(run.variables, both["image"], train=False, key=None)[0]["features"].shape == (16, 12)
    assert "learned without classes" in refused(capsys, "predict", tmp_path / "run", tmp_path / "x.png")
    short = ("--split", "train[:64]", "--eval-split", "test[:32]", "--steps", "2", "--batch-size", "16", "--out")
    said(capsys, "finetune", "--from", tmp_path / "run", "--data", "digits/noisy", *short, tmp_path / "tuned")
    facts = json.loads(said(capsys, "evaluate", tmp_path / "run", "--split", "test[:60]")[0])
    assert {"knn", "linear_probe", "uniformity"} <= facts.keys()


@pytest.mark.slow
def test_a_table_of_numbers(tmp_path, rng):
    """A run needn't be of images: what it knows is read in Python."""
    values, label = rng.normal(size=(40, 5)).astype(np.float32), rng.integers(0, 3, 40).astype(np.int32)
    table = jt.data.Dataset.from_columns(x=values, label=label, class_names={"label": list("abc")})
    model = jt.models.mlp(3, hidden=(4,))
    objective = jt.classification(model, view="x")
    fitted = jt.fit(objective, optax.sgd(0.1), jt.data.pipeline(table, 10), steps=2, out=tmp_path / "run", model=model)
    run = jt.load_run(tmp_path / "run")
    assert (run.class_names, run.preprocessing.image_shape) == (("a", "b", "c"), None)
    expected = model.apply({"params": fitted.state.params["model"]}, values, train=False, key=None)[0]["logits"]
    np.testing.assert_array_equal(logits(run, values), expected)


@pytest.mark.slow
def test_the_metric_that_chooses_is_noted(data, tmp_path):
    model = jt.models.mlp(10, hidden=())
    fitted = trained(data, tmp_path / "run", model, monitor="accuracy", maximize=False, eval_every=1, keep=4)
    assert jt.load_run(tmp_path / "run").step == fitted.best["step"]
    scores = {r["step"]: r["eval/accuracy"] for r in fitted.history if "eval/accuracy" in r}
    assert scores[fitted.best["step"]] == min(scores.values()) < max(scores.values())


def test_a_run_that_was_begun_without_a_model_goes_on_with_one(data, tmp_path):
    model = jt.models.mlp(10, hidden=())
    trained(data, tmp_path / "run", None, objective=jt.classification(model))
    with pytest.raises(jt.InputError, match="doesn't say how its model is made"):
        jt.load_run(tmp_path / "run")
    trained(data, tmp_path / "run", model)
    assert jt.load_run(tmp_path / "run").step
    with pytest.raises(jt.InputError, match=r"another configuration \(class_names: "):
        trained(data, tmp_path / "run", model, config={"class_names": list("abcdefghij")})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: shutil.rmtree(run), "expected a run directory"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "has no checkpoint yet"),
        (lambda run: (run / "config.json").write_text("{"), "cannot read the configuration"),
        (lambda run: change(run, class_names=7), "'class_names' should be a list of names, and is 7"),
        (lambda run: change(run, format=99), "was written by a later version of jaxtransfer"),
        (lambda run: change(run, model_options={"width": 3}), "mlp: 'width'|option of mlp 'width'"),
        (lambda run: change(run, model_options={"hidden": "x"}), "can't be made with them|are not of the"),
        (lambda run: change(run, mean=None), "'mean' should be"),
        (lambda run: change(run, average="model_ema"), "keeps no moving average 'model_ema'"),
        (lambda run: change(run, model_name="m"), "and no model 'm'"),
        (lambda run: cut(run), "no checkpoint of .* is whole"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_run_is_told(own, tmp_path, damage, message):
    run = tmp_path / "run"
    shutil.copytree(own[0], run)
    damage(run)
    with pytest.raises(jt.InputError, match=message):
        jt.load_run(run)


def change(run, **entries):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, **entries}))


def cut(run):
    for file in run.glob("checkpoints/*/digests.json"):
        file.write_text(file.read_text()[:-20])


@pytest.mark.parametrize("checkpoint", ["newest", 3, 2.0, True])
def test_a_checkpoint_that_is_none(own, checkpoint):
    with pytest.raises(jt.InputError, match="checkpoint"):
        jt.load_run(own[0], checkpoint=checkpoint)


def test_what_fit_refuses(data):
    model, other = jt.models.mlp(10, hidden=()), jt.models.mlp(10, hidden=(), name="other")
    batches = jt.data.pipeline(data["train"], 16)

    def fit(**options):
        return jt.fit(jt.classification(model), optax.sgd(0.1), batches, steps=1, **options)

    with pytest.raises(jt.InputError, match=r"those that the objective trains: \['model'\]"):
        fit(model=other)
    with pytest.raises(jt.InputError, match="another model 'model' than model="):
        fit(model=jt.models.normalize(model, 0.0, 1.0))
    with pytest.raises(jt.InputError, match="pass both"):
        fit(dataset=data["train"])
    few = data["train"].subset(per_class=2)
    with pytest.raises(jt.InputError, match="has 10 outputs, and dataset= 2 classes"):
        fit(model=model, dataset=few.as_classes(few.class_names) if few.classes == 2 else two_classes(data["train"]))
    turned = data["train"].as_classes(data["train"].class_names[::-1])
    with pytest.raises(
        jt.InputError, match=r"classes of dataset= are 9, 8, 7 \.\.\., and those .* 0, 1, 2 \.\.\.; pass"
    ):
        fit(model=model, dataset=turned)
    with pytest.raises(jt.InputError, match="average 'model_ema', which no term keeps"):
        fit(model=jt.ema(model))
    with pytest.raises(jt.InputError, match="'knows' should be a list"):
        fit(model=model, config={"knows": "features"})


def two_classes(dataset):
    return jt.data.Dataset.from_arrays(dataset.read(np.arange(4))["image"], np.array([0, 1, 0, 1]))


def test_what_describes_a_model():
    zoo = [
        jt.models.small_cnn(10, width=8),
        jt.models.resnet20(4, preactivation=True),
        jt.models.vit_ti(3, patch=8),
        jt.models.mlp(5, hidden=()),
        jt.models.normalize(jt.models.conv4(5, dtype=jax.numpy.bfloat16), 0.3, [0.4]),
        jt.micro_batched(jt.models.small_cnn(3), 4).inference(),
        jt.models.create("wrn-16-4", 7, dtype="bfloat16").named("wide"),
    ]
    for model in zoo:
        entries = describe(model)
        again = rebuild(json.loads(json.dumps(entries)))
        assert describe(again) == entries
        assert again.name == model.name
    image = np.zeros((1, 32, 32, 3), np.uint8)
    pair = [jax.eval_shape(one.init, jax.random.key(0), image) for one in (zoo[0], rebuild(describe(zoo[0])))]
    assert jax.tree.all(jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), *pair))
    plain = zoo[0]
    assert describe(jt.Model(plain.init, plain.apply)) is None
    assert describe(jt.models.cifar_resnet(26, 10)) is None
    assert describe(jt.models.normalize(zoo[4], 0.1, 1.0)) is None
    other = dataclasses.replace(plain, apply=lambda variables, x, *, train, key, axis=None, still=None: ({}, {}))
    assert describe(other) is None
