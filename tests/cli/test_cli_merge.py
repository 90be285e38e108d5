"""`merge` fuses runs as `jt.fusion` does, says what became of batch statistics, and refuses what can't be fused."""

import json
import shutil

import cv2
import jax
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.cli.registry.merging import CONSENSUS, METHODS
from jaxtransfer.cli.registry.row import listed
from tests.cli.test_cli_registry import help_of

NAMES = tuple("0123456789")
DATA = ("--data", "digits/noisy", "digits/inverted", "--split", "train[:60]", "--eval-split", "test[:40]")
FEW = ("--steps", "2", "--batch-size", "16")
GIVEN = {  # options besides, and what `jt.fusion` makes of the base and the runs
    "average": (("--weights", "1", "3"), lambda b, m: jt.fusion.average(m, weights=(1, 3))),
    "wise-ft": (("--t", "0.3"), lambda b, m: jt.fusion.wise_ft(b, m[0], alpha=0.3)),
    "slerp": (("--t", "0.3"), lambda b, m: jt.fusion.slerp(*m, t=0.3)),
    "task-arithmetic": (("--scale", "0.4", "--consensus", "mean"), lambda b, m: jt.fusion.task_arithmetic(
        b, m, scale=0.4, consensus=jt.fusion.weighted_mean)),
    "ties": (("--density", "0.3", "--consensus", "weighted-disjoint-mean", "--weights", "1", "2"), lambda b, m:
        jt.fusion.ties(b, m, density=0.3, weights=(1, 2), consensus=jt.fusion.weighted_disjoint_mean)),
    "dare": (("--seed", "3", "--density", "0.6"), lambda b, m: jt.fusion.dare(b, m, key=3, density=0.6)),
    "della": (("--epsilon", "0.1"), lambda b, m: jt.fusion.della(b, m, key=0, epsilon=0.1)),
    "breadcrumbs": (("--gamma", "0.05"), lambda b, m: jt.fusion.breadcrumbs(b, m, gamma=0.05)),
    "knots": ((), jt.fusion.knots),
    "model-stock": ((), jt.fusion.model_stock),
    "rebasin": ((), lambda b, m: jt.fusion.average(
        [m[0], jt.fusion.rebasin(m[0], m[1], jt.fusion.specification(m[0]))])),
}  # fmt: skip


def variables_of(model, seed, near=None):
    rng = np.random.default_rng(seed)
    start = jax.device_get(jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8, 8, 1), np.uint8)))
    moved = jax.tree.map(lambda leaf: np.float32(leaf + 0.1 * rng.normal(size=leaf.shape)), (near or start)["params"])
    return {**start, "params": moved}


def write(out, model, variables, names=NAMES, data="digits/noisy"):
    """Writes a run that nobody trained."""
    loaded = jt.load_pretrained(variables, model, inputs=jax.ShapeDtypeStruct((1, 8, 8, 1), np.uint8))
    return jt.pretrained.write_run(loaded, out, class_names=names, image_shape=(8, 8, 1), data=data)


@pytest.fixture(scope="module")
def runs(own_cache, tmp_path_factory):
    """A base and two runs near it, without batch norm."""
    folder = tmp_path_factory.mktemp("merge")
    model = jt.models.normalize(jt.models.mlp(10, hidden=(6,)), 0.3, 0.37)
    base = variables_of(model, 0)
    trees = {"base": base, "one": variables_of(model, 1, base), "two": variables_of(model, 2, base)}
    for name, tree in trees.items():
        write(folder / name, model, tree, data="digits/inverted" if name == "two" else "digits/noisy")
    return folder, model, trees


def assert_same(one, other, atol=1e-6):
    flat = [jt.tree.leaves_by_path(tree) for tree in (one, other)]
    assert flat[0].keys() == flat[1].keys()
    for path, leaf in flat[0].items():
        np.testing.assert_allclose(leaf, flat[1][path], atol=atol, err_msg=path)


def words_of(folder, method):
    names = ("one",) if METHODS[method].facts.most == 1 else ("one", "two")
    base = ("--base", folder / "base") if METHODS[method].facts.base else ()
    return ("merge", *(folder / name for name in names), *base, "--method", method)


@pytest.mark.parametrize("method", GIVEN)
def test_methods_are_those_of_the_library(run, runs, tmp_path, method):
    folder, _, trees = runs
    more, expected = GIVEN[method]
    run(*words_of(folder, method), *more, "--out", tmp_path / "out")
    merged = jt.load_run(tmp_path / "out")
    assert_same(merged.variables, expected(trees["base"], [trees["one"], trees["two"]]))
    assert merged.config["method"] == method
    assert json.loads((tmp_path / "out" / "config.json").read_text())["merged"] == [
        str(word) for word in words_of(folder, method)[1 : 2 + (METHODS[method].facts.most != 1)]
    ]


LOOKING = [method for method, row in METHODS.items() if row.facts.data]


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=pytest.mark.slow) if name == "ada-merging-pp" else name for name in LOOKING]
)
def test_methods_that_look_at_examples(run, runs, tmp_path, method):
    folder, model, trees = runs
    more = ("--val-split", "0.2") if METHODS[method].facts.validation else ()
    more += FEW if "steps" in METHODS[method].facts.options else ()
    lines, err = run(*words_of(folder, method), *DATA, *more, "--out", tmp_path / "out")
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert set(result["test"]) == {"digits/noisy", "digits/inverted", "mean"}
    assert {"one", "two", "uniform average"} <= set(result["beside"])
    assert lines[-2].startswith("accuracy of the merged run: digits/noisy ")
    told = "\n".join(err)
    assert "Test examples are looked at once" in told
    if METHODS[method].facts.validation:
        assert "Chosen by digits/noisy (0.2 of train[:60])" in told
        assert "one was trained on train of digits/noisy" in told
        assert result["chosen on"].startswith("digits/noisy (0.2 of train[:60])")
    else:
        assert result["chosen on"] is None
    if method == "fisher":
        data = {name: jt.data.load(f"digits/{name}", "train[:60]") for name in ("noisy", "inverted")}
        own = [
            jt.fisher_diagonal(
                jt.classification(model), {"model": trees[name]["params"]}, {"model": {}},
                jt.data.eval_batches(data[where], 60),
            )["model"]
            for name, where in (("one", "noisy"), ("two", "inverted"))
        ]  # fmt: skip
        assert_same(jt.load_run(tmp_path / "out").variables, jt.fusion.fisher([trees["one"], trees["two"]], own), 1e-5)


def test_every_method_is_tried():
    assert set(GIVEN) | set(LOOKING) | {"delta"} == set(METHODS)  # delta: test_cli_deltas.py


def test_the_merged_run_is_a_run(run, runs, tmp_path):
    """Tested as it says, already done the second time, predicted with, fine-tuned, read from and as safetensors."""
    folder, model, trees = runs
    out, file = tmp_path / "out", tmp_path / "mlp.safetensors"
    words = (*words_of(folder, "average"), *DATA, "--safetensors", file, "--out", out)
    run(*words)
    accuracy = json.loads((out / "result.json").read_text())["test"]
    evaluated = json.loads(run("evaluate", out, "--data", "digits/noisy", "--split", "test[:40]")[0][0])
    assert evaluated["accuracy"] == pytest.approx(accuracy["digits/noisy"])
    merged = jt.fusion.average([trees["one"], trees["two"]])
    test = jt.data.load("digits/noisy", "test[:40]").read(np.arange(40))
    logits = model.apply(merged, test["image"], train=False, key=None)[0]["logits"]
    assert accuracy["digits/noisy"] == pytest.approx(float(np.mean(np.argmax(logits, -1) == test["label"])))
    report = (out / "report.md").read_text()
    assert "| one |" in report
    assert "| merged: average |" in report
    assert "uniform average" not in report  # it is that itself
    assert "jaxtransfer merge /" in report
    assert cv2.imread(str(out / "merged.png")) is not None
    assert jt.load_run(out).result["accuracy"] == pytest.approx(accuracy["mean"])
    assert run(*words)[0][0] == f"already done: {out}"
    cv2.imwrite(str(tmp_path / "a.png"), test["image"][0])
    assert json.loads(run("predict", out, tmp_path / "a.png")[0][0])["class"] == NAMES[int(np.argmax(logits[0]))]
    again = jt.load_pretrained(file, model, inputs=jax.ShapeDtypeStruct((1, 8, 8, 1), np.uint8))
    assert_same(again.variables, merged)


def test_a_merge_that_was_cut_off_is_made_again(run, refused, runs, tmp_path):
    """What is there without its result is no merged run, and a file that is asked for later is written all the same."""
    folder, _, trees = runs
    out, file = tmp_path / "out", tmp_path / "mlp.safetensors"
    words = (*words_of(folder, "average"), "--out", out)
    assert "--safetensors: expected a file to write" in refused(*words, "--safetensors", folder / "one")
    assert not out.exists()
    run(*words)
    (out / "result.json").unlink()
    (out / "report.md").unlink()
    assert run(*words)[0][0] == f"merged: {out}"
    assert (out / "report.md").exists()
    shutil.rmtree(out / "checkpoints" / "step_000000000")
    (out / "result.json").unlink()
    (out / "checkpoints" / ".writing-0").mkdir()
    run(*words)
    merged = jt.fusion.average([trees["one"], trees["two"]])
    assert_same(jt.load_run(out).variables, merged)
    lines = run(*words, "--safetensors", file)[0]
    assert lines[0].startswith(f"{file}: 4 tensors")
    assert lines[1] == f"already done: {out}"
    assert len(run(*words, "--safetensors", file)[0]) == 2
    (tmp_path / "taken").touch()  # no folder can be made there: the run stays one
    late = ("--safetensors", tmp_path / "taken" / "mlp.safetensors")
    assert "cannot write" in refused(*words_of(folder, "average"), "--out", tmp_path / "more", *late)
    assert_same(jt.load_run(tmp_path / "more").variables, merged)


@pytest.mark.slow
def test_statistics_are_renewed_or_it_is_refused(run, refused, tmp_path):
    model = jt.models.normalize(jt.models.small_cnn(10, width=2), 0.3, 0.37)
    trees = [variables_of(model, seed) for seed in (1, 2)]
    one, two = (write(tmp_path / f"r{number}", model, tree) for number, tree in enumerate(trees))
    words = ("merge", one, two, "--out", tmp_path / "out")
    assert "r0 has batch norm" in refused(*words)
    assert not (tmp_path / "out").exists()
    _, err = run(*words[:-1], tmp_path / "kept", "--keep-statistics")
    assert "which belong to other weights" in err[0]
    _, err = run(*words, "--data", "digits/noisy", "--split", "train[:64]", "--eval-split", "test[:40]")
    assert err[0].startswith("Batch statistics were renewed on 64 examples of digits/noisy (train[:64])")
    found = jt.load_run(tmp_path / "out").variables
    images = jt.data.load("digits/noisy", "train[:64]").read(np.arange(64))["image"]
    expected = jt.recompute_statistics(model, jt.fusion.average(trees), [{"image": images}])
    assert_same(found, expected, 2e-5)
    _, err = run("merge", two, "--base", one, "--method", "wise-ft", "--t", "1", *DATA, "--out", tmp_path / "end")
    assert "It is a run as it was" in err[0]
    assert_same(jt.load_run(tmp_path / "end").variables, trees[1], 0)


def test_classes_are_matched_by_name(run, refused, runs, tmp_path):
    _, model, trees = runs
    order = np.random.default_rng(0).permutation(10)
    head = {name: leaf[..., order] for name, leaf in trees["one"]["params"]["head"].items()}
    turned = {"params": {**trees["one"]["params"], "head": head}}
    words = [chr(ord("a") + n) for n in range(10)]
    for name, tree, names in (("named", trees["one"], words), ("turned", turned, [words[n] for n in order])):
        write(tmp_path / name, model, tree, names)
    run("merge", tmp_path / "named", tmp_path / "turned", "--out", tmp_path / "out")
    assert_same(jt.load_run(tmp_path / "out").variables, trees["one"])
    write(tmp_path / "others", model, trees["two"], [*words[:9], "z"])
    message = refused("merge", tmp_path / "named", tmp_path / "others", "--out", tmp_path / "no")
    assert "others and named have other classes" in message
    assert "lacks 'j'" in message
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_what_can_not_be_fused_is_one_clear_line(refused, runs, tmp_path):
    folder, _, trees = runs
    out = ("--out", tmp_path / "out")
    wide = jt.models.normalize(jt.models.mlp(10, hidden=(7,)), 0.3, 0.37)
    write(tmp_path / "wide", wide, variables_of(wide, 1))
    assert "one and wide differ at 'params/" in refused("merge", folder / "one", tmp_path / "wide", *out)
    bright = jt.models.normalize(jt.models.mlp(10, hidden=(6,)), 0.5, 0.37)
    write(tmp_path / "bright", bright, trees["two"])
    message = refused("merge", folder / "one", tmp_path / "bright", *out)
    assert "bright takes images normalised by another mean than one ([0.5] against [0.3])" in message
    linear = jt.models.normalize(jt.models.mlp(10, hidden=()), 0.3, 0.37)
    write(tmp_path / "linear", linear, variables_of(linear, 1))
    assert "differ at" in refused("merge", folder / "one", tmp_path / "linear", *out)
    assert "expected each run once" in refused("merge", folder / "one", folder / "one", *out)
    assert "expected each run once" in refused("merge", folder / "one", folder / "two" / ".." / "one", *out)
    assert "expected a run directory" in refused("merge", folder / "one", folder / "none", *out)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--method", "tie"), "unknown method 'tie' (did you mean 'ties'?)"),
        (("--method", "ties"), "say from what: --base RUN"),
        (("--base", "x"), "--base: average has no use for it"),
        (("--density", "0.5"), "--density: average has none"),
        (("--weights", "1"), "--weights are 2 finite numbers, one a run; got 1"),
        (("--weights", "1", "nan"), "--weights are 2 finite numbers"),
        (("--method", "slerp", "--weights", "1", "1"), "--weights: slerp has none"),
        (("--method", "wise-ft", "--base", "x"), "--method wise-ft takes 1 runs; got 2"),
        (("--method", "fisher"), "--method fisher looks at examples; say at which: --data NAME"),
        (("--method", "greedy-soup", "--data", "digits/noisy"), "chooses by validation examples"),
        (("--val-split", "0.1"), "--val-split: average chooses nothing"),
        (("--method", "greedy-soup", "--data", "digits/noisy", "--val-split", "test"), "so that the test would choose"),
        (("--data", "digits/nosy"), "unknown data set 'digits/nosy'"),
        (("--data", "digits/noisy", "digits/noisy"), "expected each data set once"),
        (("--data", "digits/noisy", "--split", "test"), "is to test on"),
        (
            ("--method", "fisher", "--data", "digits/noisy", "--eval-split", "train[:50]"),
            "can't share examples with train",
        ),
        (("--data", "digits/noisy@train[:60]", "--eval-split", "train[50:70]"), "can't share examples with train[:60]"),
        (("--data", "table:rows.csv"), "one takes images, and a table has rows of columns"),
        (("--data", "digits/noisy", "--keep-statistics"), "leave one of the two out"),
        (("--method", "slerp", "--t", "1.5"), "t must be in [0, 1]; got 1.5"),
    ],
)
def test_what_it_refuses(refused, runs, tmp_path, words, expected):
    folder, _, _ = runs
    assert expected in refused("merge", folder / "one", folder / "two", "--out", tmp_path / "out", *words)
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.slow
def test_runs_on_a_table(run, refused, tmp_path):
    """Columns as the first run makes them; of another table's statistics they are refused."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        x = rng.normal(size=(60, 3)) + (name == "b")
        rows = [f"{p:.3f},{q:.3f},{r:.3f},{'ill' if p + q > 0.5 else 'well'}" for p, q, r in x]
        (tmp_path / f"{name}.csv").write_text("p,q,r,state\n" + "\n".join(rows) + "\n")
    table = f"table:{tmp_path / 'a.csv'}"
    data = jt.data.load(table, "train", label="state")
    other = jt.data.load(f"table:{tmp_path / 'b.csv'}", "train", label="state")
    net = jt.models.mlp(2, hidden=(3,))
    objective = jt.classification(net, view="features")
    for name, own in (("one", data), ("two", data), ("other", other)):
        jt.fit(
            objective, optax.sgd(0.1), jt.data.pipeline(own, 16), steps=2, key=len(name), out=tmp_path / name,
            model=net, dataset=own, progress=False,
        )  # fmt: skip
    run("merge", tmp_path / "one", tmp_path / "two", "--data", table, "--method", "regmean", "--out", tmp_path / "out")
    merged = jt.load_run(tmp_path / "out")
    assert merged.table == jt.load_run(tmp_path / "one").table
    new = jt.data.load(table, "test", like=merged)
    logits = merged.model.apply(merged.variables, new.column("features"), train=False, key=None)[0]["logits"]
    accuracy = float(np.mean(np.argmax(logits, -1) == new.labels))
    assert json.loads((tmp_path / "out" / "result.json").read_text())["test"][table] == pytest.approx(accuracy)
    message = refused("merge", tmp_path / "one", tmp_path / "other", "--out", tmp_path / "no")
    assert "columns that another table's rows were made into" in message


def test_the_lists_of_help_are_the_registries(capsys):
    text = help_of(capsys, "merge")
    for registry in (METHODS, CONSENSUS):
        assert " ".join(listed(registry).split()) in text
