"""`multitask` learns several labels at once, counts those that are missing, and is read back by other commands."""

import io
import itertools
import json
import shutil
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest

import jaxtransfer as jt
from jaxtransfer.cli.registry.multitask import ARCHITECTURES, METHODS
from jaxtransfer.cli.registry.row import listed
from jaxtransfer.cli.task_data import TaskOptions, load_tasks, name_of
from jaxtransfer.cli.task_report import Fight, draw, fights_of, weights_of
from jaxtransfer.runs import checkpoints
from tests.cli.test_cli_registry import help_of

SIZES = {"train": 24, "test": 10}
SMALL = ("--steps", "2", "--batch-size", "8", "--model", "mlp", "--eval-every", "2")


@pytest.fixture(scope="session")
def faces(tmp_path_factory):
    """A tfds folder with a set of several labels; of `smile` every third training example has none."""
    from jaxtransfer.data.quiet import quiet_tfds

    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("tfds") / "faces" / "1.0.0"
    folder.mkdir(parents=True)
    with quiet_tfds() as tfds:
        from tensorflow_datasets.core.dataset_info import DatasetIdentity

        of = tfds.features
        features = {
            "image": of.Image(shape=(8, 8, 1)),
            "who": of.ClassLabel(names=["ann", "bob", "eve"]),
            "smile": of.ClassLabel(names=["no", "yes"]),
            "kind": of.ClassLabel(names=["face"]),
            "still": of.ClassLabel(names=["calm", "moved"]),
            "age": np.int64,
            "note": of.Text(),
        }
        identity = DatasetIdentity("faces", tfds.core.Version("1.0.0"), str(folder), __name__)
        info = tfds.core.DatasetInfo(
            builder=identity, description="", features=of.FeaturesDict(features), disable_shuffling=True
        )
        writer = tfds.core.SequentialWriter(info, 100, file_format="array_record")
        writer.initialize_splits(list(SIZES))
        for split, size in SIZES.items():
            for i in range(size):
                image = cv2.imencode(".png", rng.integers(0, 256, (8, 8, 1)).astype(np.uint8))[1].tobytes()
                smile = -1 if split == "train" and i % 3 == 0 else i % 2
                example = {"image": io.BytesIO(image), "who": i % 3, "smile": smile, "kind": 0, "still": 0}
                writer.add_examples({split: [{**example, "age": i, "note": "a"}]})
        writer.close_all()
    return folder.parent.parent


@pytest.fixture(scope="session")
def two(faces, tmp_path_factory):
    """A run on two labels by pcgrad, with a network of its own for each beside, and the words that made it."""
    from jaxtransfer.cli import main

    out = tmp_path_factory.mktemp("runs") / "two"
    words = ("multitask", "--data", "faces", "--data-dir", str(faces), "--labels", "who", "smile", *SMALL)
    words = (*words, "--method", "pcgrad", "--compare", "single", "--out", str(out))
    assert main(words) == 0
    return out, words


def test_the_report_tells_each_task_its_weight_and_who_fights(two):
    out, _ = two
    report = (out / "report.md").read_text()
    assert "# 2 tasks of faces, shared-bottom by pcgrad (Yu 2020)" in report
    assert "smile: 8 of 24 training examples have no label; they don't count for it." in report
    lines = report[report.index("## Tasks") :].splitlines()  # the first table with a row of each
    rows = {line.split(" | ")[0]: line.split(" | ") for line in reversed(lines) if line.startswith("| ")}
    result = json.loads((out / "result.json").read_text())
    test = result["test"]
    for task, classes, labelled in (("who", "3", "24"), ("smile", "2", "16")):
        assert rows[f"| {task}"][1:3] == [classes, labelled]
        assert float(rows[f"| {task}"][4]) == pytest.approx(test[f"{task}/accuracy"], abs=1e-3)
        alone = json.loads((out / "single" / task / "config.json").read_text())
        assert (alone["method"], list(alone["task_classes"])) == ("equal", [task])
        single = jt.load_run(out / "single" / task).result["accuracy"]
        assert test[f"single: {task}/accuracy"] == pytest.approx(single)
        assert float(rows[f"| {task}"][5]) == pytest.approx(single, abs=1e-3)
    assert test["accuracy"] == pytest.approx((test["who/accuracy"] + test["smile/accuracy"]) / 2)
    assert "Do the tasks fight?" in report
    assert "| who and smile |" in report
    assert cv2.imread(str(out / "tasks.png")) is not None
    history = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    (fight,) = fights_of(history, ["who", "smile"], "balance")
    assert all(-1 <= cosine <= 1 for cosine in fight.cosines)
    assert fight.against == np.mean([cosine < 0 for cosine in fight.cosines])
    assert set(weights_of(history, ["who", "smile"], "balance")) == {"who", "smile"}


@pytest.mark.slow
def test_a_run_is_read_back(two, faces, run, refused, tmp_path):
    out, words = two
    loaded = jt.load_run(out)
    assert loaded.knows == ("tasks",)
    assert loaded.tasks == {"who": ("ann", "bob", "eve"), "smile": ("no", "yes")}
    assert "tasks who, smile" in repr(loaded)
    test = jt.data.load("faces", "test", data_dir=faces, label=("who", "smile"))
    outputs, _ = loaded.model.apply(loaded.variables, test.column("image"), train=False, key=None)
    result = json.loads((out / "result.json").read_text())["test"]
    for task in ("who", "smile"):
        right = np.asarray(outputs[task]).argmax(-1) == test.column(task)
        assert result[f"{task}/accuracy"] == pytest.approx(right.mean())
    evaluated = json.loads(run("evaluate", out, "--data-dir", faces)[0][0])
    assert evaluated["who/accuracy"] == pytest.approx(result["who/accuracy"])
    assert (evaluated["examples"], "smile/examples" in evaluated) == (10, False)
    trained = json.loads(run("evaluate", out, "--data-dir", faces, "--split", "train")[0][0])
    assert trained["smile/examples"] == 16
    assert "--worst is not for runs of several tasks" in refused("evaluate", out, "--worst", "2")

    photo = tmp_path / "photo.png"
    cv2.imwrite(str(photo), test.column("image")[0])
    told = json.loads(run("predict", out, photo)[0][0])["tasks"]
    assert told["who"]["class"] == ("ann", "bob", "eve")[int(np.asarray(outputs["who"])[0].argmax())]
    assert [len(told[task]["top"]) for task in ("who", "smile")] == [3, 2]
    run("predict", out, photo, "--out", tmp_path / "all.csv")
    header = (tmp_path / "all.csv").read_text().splitlines()[0]
    assert header == "image,class_who,probability_who,class_smile,probability_smile,error"
    # its encoder goes on by itself
    fine = tmp_path / "fine"
    run("finetune", "--from", out, "--data", "digits/upright", *SMALL[:4], "--eval-split", "test[:16]", "--out", fine)
    assert json.loads((fine / "config.json").read_text())["class_names"] == [str(digit) for digit in range(10)]
    assert run(*words)[0][0].startswith("already done: ")


@pytest.mark.slow
def test_the_picture_of_eight_tasks_has_room_for_its_curves(tmp_path):
    tasks = [f"a_long_name_of_a_task_{number}" for number in range(8)]
    fights = [Fight(pair, [1, 2], [0.1, -0.1]) for pair in itertools.combinations(tasks, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of Matplotlib, where the names of 28 pairs leave none
        assert draw(tmp_path / "tasks.png", {task: ([1, 2], [1.0, 0.5]) for task in tasks}, fights)


@pytest.mark.slow
def test_runs_of_several_tasks_are_merged_head_by_head(two, faces, run, refused, tmp_path):
    """The classes of one task stand in another order in the second run; the merged one is a run of several tasks."""
    one, other, out = two[0], tmp_path / "other", tmp_path / "out"
    config = json.loads((one / "config.json").read_text())
    shutil.copytree(one, other)
    tasks = {"smile": config["task_classes"]["smile"], "who": ["eve", "ann", "bob"]}
    (other / "config.json").write_text(json.dumps({**config, "task_classes": tasks}))
    data = ("--data", "faces", "--data-dir", faces)
    lines, _ = run("merge", one, other, *data, "--out", out)
    assert lines[-2].startswith("accuracy of the merged run: faces/who 0.")
    before, merged = jt.load_run(one), jt.load_run(out)
    assert merged.tasks == before.tasks
    heads = [found.variables["params"]["who"]["dense1"]["kernel"] for found in (before, merged)]
    np.testing.assert_allclose(heads[1], (heads[0] + np.asarray(heads[0])[:, [1, 2, 0]]) / 2, atol=1e-6)
    same = [found.variables["params"]["smile"]["dense1"]["kernel"] for found in (before, merged)]
    np.testing.assert_allclose(same[0], same[1], atol=1e-6)
    scores, result = json.loads(run("evaluate", out, *data[2:])[0][0]), json.loads((out / "result.json").read_text())
    for task in merged.tasks:
        assert result["test"][f"faces/{task}"] == pytest.approx(scores[f"{task}/accuracy"])
    assert result["beside"]["two"]["faces/who"] == pytest.approx(before.result["who/accuracy"])
    (other / "config.json").write_text(json.dumps({**config, "task_classes": {**tasks, "who": ["eve", "ann", "zoe"]}}))
    assert "in task 'who'" in refused("merge", one, other, "--out", tmp_path / "no")
    words = ("--base", one, "--method", "ada-merging", *data, "--out", tmp_path / "no")
    assert "--method ada-merging reads probabilities of classes; two knows tasks" in refused("merge", one, out, *words)


@pytest.mark.slow
def test_other_tasks_of_several_data_sets(run, folder, refused, tmp_path):
    """Of other sizes, grey and colour; one is seen more often than its size; a share chooses the step."""
    small, out = f"folder:{folder('small', classes=2, each=6, shape=(8, 8, 3))}", tmp_path / "out"
    words = ("multitask", "--data", "digits/upright", small, "--temperature", "inf", "--val-split", "0.2", *SMALL)
    _, err = run(*words, "--method", "uncertainty", "--out", out)
    told = "\n".join(err)
    assert "are brought to 8×8×3" in told
    assert "50.0 % of those that are seen" in told
    loaded = jt.load_run(out)
    assert list(loaded.tasks) == ["digits_upright", "small"]
    result = json.loads((out / "result.json").read_text())
    assert result["chosen on"] != result["test on"]
    both = json.loads(run("evaluate", out)[0][0])
    for task in loaded.tasks:
        assert both[f"{task}/accuracy"] == pytest.approx(result["test"][f"{task}/accuracy"])
    one = json.loads(run("evaluate", out, "--data", "digits/upright")[0][0])
    assert one["digits_upright/accuracy"] == pytest.approx(both["digits_upright/accuracy"])
    assert "none for digits/noisy" in refused("evaluate", out, "--data", "digits/noisy")
    shutil.copytree(out, tmp_path / "same")
    again = f"{small}/../{Path(small).name}"  # its folder, written otherwise
    lines, err = run("merge", out, tmp_path / "same", "--data", again, "digits/noisy", "--out", tmp_path / "merged")
    assert "nothing is tested on digits/noisy" in err[0]
    assert float(lines[0].split()[-1]) == pytest.approx(both["small/accuracy"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_methods_run(run, faces, tmp_path, method):
    words = ("--data", "faces", "--data-dir", faces, "--labels", "who", "smile", *SMALL, "--method", method)
    lines, _ = run("multitask", *words, "--out", tmp_path / "out")
    assert lines[-1 if method == "uncertainty" else -2].startswith("test accuracy: who ")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "shared-bottom"])
def test_architectures_run_and_are_read_back(run, refused, faces, tmp_path, architecture):
    out, data = tmp_path / "out", ("--data", "faces", "--data-dir", faces, "--labels", "who", "smile")
    small = [word if word != "mlp" else "small-cnn" for word in SMALL]
    run("multitask", *data, *small, "--architecture", architecture, "--method", "mgda", "--out", out)
    found = json.loads(run("evaluate", out, "--data-dir", faces)[0][0])
    result = json.loads((out / "result.json").read_text())["test"]
    assert found["who/accuracy"] == pytest.approx(result["who/accuracy"])
    words = ("finetune", "--from", out, "--data", "digits/upright", "--out", tmp_path / "fine")
    if not jt.models.NETWORKS[architecture].encoder:
        assert "no single encoder to go on with" in refused(*words)


@pytest.mark.slow
def test_encoders_compute_and_are_stored_in_bfloat16(run, refused, faces, tmp_path):
    """Weights move by copies in float32; the heads, the losses and the cosines of the gradients stay whole."""
    words = ("multitask", "--data", "faces", "--data-dir", faces, "--labels", "who", "smile", *SMALL, "--lr", "1e-4")
    words = (*words, "--method", "pcgrad", "--compare", "single", "--out", tmp_path / "out")
    run(*words, "--dtype", "bfloat16", "--param-dtype", "bfloat16")
    for out in (tmp_path / "out", tmp_path / "out" / "single" / "who"):
        config = json.loads((out / "config.json").read_text())
        assert config["model_options"] == {"dtype": "bfloat16", "param_dtype": "bfloat16"}
        kept = checkpoints.read(out / "checkpoints", 2).leaves
        stored = {path: leaf for path, leaf in kept.items() if path.startswith("params/model/encoder/")}
        assert {leaf.dtype.name for leaf in stored.values()} == {"bfloat16"}
        assert {leaf.dtype.name for path, leaf in kept.items() if path.startswith("params/model/who")} == {"float32"}
        copies = {path.partition("/master/")[2]: leaf for path, leaf in kept.items() if "/master/" in path}
        for path, leaf in stored.items():
            np.testing.assert_array_equal(copies[path.removeprefix("params/")].astype(leaf.dtype), leaf, err_msg=path)
        loaded = jt.load_run(out)
        outputs, _ = loaded.model.apply(loaded.variables, np.zeros((1, 8, 8, 1), np.uint8), train=False, key=None)
        assert outputs["features"].dtype == "bfloat16"
    history = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    cosines = [row["train/balance/cosine/who/smile"] for row in history if "train/balance/cosine/who/smile" in row]
    assert all(-1 <= cosine <= 1 for cosine in cosines)
    assert cosines
    found = json.loads(run("evaluate", tmp_path / "out", "--data-dir", faces)[0][0])
    assert found["who/accuracy"] == json.loads((tmp_path / "out" / "result.json").read_text())["test"]["who/accuracy"]
    assert "model_options" in refused(*words)


@pytest.mark.slow
def test_several_seeds_make_a_mean(run, faces, tmp_path):
    words = ("--data", "faces", "--data-dir", faces, "--labels", "who", "smile", *SMALL, "--seeds", "0", "1")
    run("multitask", *words, "--out", tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(summary["test"]["who/accuracy"]["values"]) == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--labels", "who"), "--labels names two columns of classes or more, each a task; got one, 'who'"),
        ((), "each a task; got none"),
        (("--labels", "who", "smyle"), "unknown feature of faces 'smyle' (did you mean 'smile'?)"),
        (("--labels", "who", "note"), "--labels: faces: 'note' is text; a task is a column of one class per example"),
        (("--labels", "who", "age"), "a task is one class per example"),
        (("--labels", "who", "kind"), "'kind' has one class, 'face'"),
        (("--labels", "who", "still"), "'still' has one class, 'calm'"),
        (("--labels", "who", "who"), "'who' is there twice"),
        (("--labels", "who", "weight"), "a task can't be called 'weight', which is what batches call how much"),
        (("--labels", "who", "smile", "--method", "pcgrd"), "unknown method 'pcgrd' (did you mean 'pcgrad'?)"),
        (("--labels", "who", "smile", "--architecture", "mmoo"), "unknown architecture 'mmoo' (did you mean 'mmoe'?)"),
        (("--labels", "who", "smile", "--architecture", "attention"), "Choose a convolutional network, or another"),
        (("--labels", "who", "smile", "--model", "linear"), "tasks would share nothing"),
        (("--labels", "who", "smile", "--experts", "2"), "--experts: shared-bottom has none"),
        (("--labels", "who", "smile", "--compare", "singel"), "did you mean 'single'?"),
        (("--labels", "who", "smile", "--balance", "classes"), "--balance draws the classes of one task"),
        (("--labels", "who", "smile", "--augment", "mixup"), "--augment mixup mixes the labels of one task"),
        (("--labels", "who", "smile", "--temperature", "2"), "--temperature is of tasks of several data sets"),
        (("--labels", "who", "smile", "--val-split", "test"), "--eval-split test and --val-split test have examples"),
        (("--labels", "who", "smile", "--split", "trian"), "unknown split of faces 'trian'"),
        (("--labels", "who", "smile", "--crop", "0.9"), "add --image-shape"),
        (("--labels", "who", "smile", "--dtype", "float16"), "unknown --dtype 'float16' (did you mean 'bfloat16'?)"),
        (("--labels", "who", "smile", "--param-dtype", "bf16"), "unknown --param-dtype 'bf16'"),
        (("--labels", "who", "smile", "--stochastic-rounding"), "is for weights in bfloat16: add --param-dtype"),
    ],
)
def test_what_it_refuses(refused, faces, tmp_path, words, expected):
    whole = ("multitask", "--data", "faces", "--data-dir", faces, "--model", "mlp", *words, "--out", tmp_path / "x")
    assert expected in refused(*whole)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "words", "expected"),
    [
        (("table:a.csv",), (), "multitask takes images"),
        (
            ("folder:a/accuracy", "folder:b"),
            (),
            "can't be called 'accuracy', which is the metric of all tasks together",
        ),
        (("folder:a/loss", "folder:b"), (), "can't be called 'loss', which is the metric of all tasks together"),
        (("folder:a/weight", "folder:b"), (), "can't be called 'weight', which is what batches call how much"),
        (("folder:a",), ("--labels", "a", "b"), "folder:a has one label for each image"),
        (("digits/upright", "digits/upright"), (), "'digits/upright' is there twice"),
        (("folder:a/pets", "folder:b/pets"), (), "two tasks would be called 'pets'; rename a folder"),
        (("digits/upright", "digits/noisy"), ("--temperature", "0"), "--temperature must be positive; got 0.0"),
        (("digits/upright", "digits/noisy"), ("--labels", "label"), "the column of each, 2 names, or none; got 1"),
        (("digits/upright", "folder:a"), ("--labels", "label", "x"), "its folder: 'label'; got 'x'"),
        (("digits/upright", "digits/nosy"), (), "unknown data set 'digits/nosy' (did you mean"),
    ],
)
def test_what_data_it_refuses(refused, tmp_path, data, words, expected):
    assert expected in refused("multitask", "--data", *data, *words, "--out", tmp_path / "x")


def test_every_rule_and_network_has_a_row(capsys):
    words = help_of(capsys, "multitask")
    assert " ".join(listed(METHODS).split()) in words
    assert " ".join(listed(ARCHITECTURES).split()) in words
    rules = set(jt.multitask.__all__) - {"averages", "balance", "masked", "of_values", "remembers", "random_weights"}
    assert {name.replace("-", "_") for name in METHODS} == rules | {"random"}
    assert set(ARCHITECTURES) == set(jt.models.NETWORKS)


def test_a_share_for_choosing_is_drawn_by_the_first_task(faces):
    options = TaskOptions(("faces",), ("who", "smile"), data_dir=faces)

    def load(data, split, label):
        return jt.data.load(data, split, data_dir=faces, label=label)

    sets = load_tasks(options, load, "0.25", seed=0)
    assert sets.val is not None
    assert np.bincount(sets.val.column("who")).tolist() == [2, 2, 2]
    assert len(sets.train) == 18
    alone = sets.alone("smile")
    assert np.all(alone.train.column("has_smile") == 1)
    assert len(alone.train) == int(sets.train.column("has_smile").sum())
    assert name_of("folder:/a/b c/") == "b_c"
    assert name_of("emoji/one:1.0.0") == "emoji_one_1.0.0"
