"""A run and data that count the same classes otherwise: evaluate, keep a head, distil by the names."""

import json

import cv2
import jax
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.cli import main
from jaxtransfer.cli.cache_teacher import attach_cache
from jaxtransfer.cli.classes import pick_classes
from jaxtransfer.cli.distill import _sizes_of
from jaxtransfer.cli.runs import load_run

SHADES = {"ant": 20, "bee": 70, "cat": 120, "dog": 170, "eel": 220}
ORDER = ("dog", "ant", "eel", "bee", "cat")  # of the run; folders sort otherwise


def _images(names, each=6):
    labels = np.repeat(np.arange(len(names)), each)
    shades = np.array([SHADES[name] for name in names])[labels]
    noise = np.random.default_rng(0).integers(-9, 9, (len(labels), 8, 8, 1))
    return (shades[:, None, None, None] + noise).astype(np.uint8), labels.astype(np.int32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that tells five shades of grey apart, its classes in an order of its own."""
    out = tmp_path_factory.mktemp("runs") / "shades"
    images, labels = _images(ORDER)
    config = {
        "command": "pretrain",
        "data": "shades",
        "split": "train",
        "model": "mlp",
        "class_names": list(ORDER),
        "image_shape": [8, 8, 1],
        "mean": [0.47],
        "std": [0.28],
        "seed": 0,
        "shots": None,
    }
    net = jt.models.normalize(jt.models.mlp(5), [0.47], [0.28])
    batches = [{"image": images, "label": labels}]
    data = jt.data.pipeline(jt.data.Dataset.from_arrays(images, labels), 30)
    fitted = jt.fit(
        jt.classification(net), optax.adam(1e-2), data, steps=60, eval_data=batches, out=out, config=config, keep=1
    )
    assert fitted.best["eval/accuracy"] == 1
    return out


@pytest.fixture
def shades(tmp_path):
    """Makes a folder of the classes that are asked for, under names of their own where given."""

    def make(*names, called=None):
        root = tmp_path / "-".join(called or names)
        for name, folder in zip(names, called or names, strict=True):
            (root / folder).mkdir(parents=True)
            for number, image in enumerate(_images([name])[0]):
                assert cv2.imwrite(str(root / folder / f"{number}.png"), image)
        return f"folder:{root}"

    return make


def _evaluated(run, *words):
    out, err = run("evaluate", *words, "--split", "all", "--resize")
    return json.loads(out[0]), err


def test_other_orders(run, trained, shades):
    facts, err = _evaluated(run, trained, "--data", shades(*SHADES))
    assert facts["accuracy"] == 1
    assert facts["examples"] == 30
    assert err == []


@pytest.mark.filterwarnings("default")
def test_some_of_the_classes(run, trained, shades):
    facts, err = _evaluated(run, trained, "--data", shades("bee", "cat"))
    assert facts["accuracy"] == 1
    assert len(err) == 1
    assert "has 2 of the 5 classes of" in err[0]
    assert "predictions are among all 5" in err[0]


def test_other_classes_are_named(refused, trained, shades, tmp_path):
    more = shades(*SHADES, "ant", called=(*SHADES, "fly"))
    words = ("--data", more, "--resize")
    assert "has no class 'fly'" in refused("evaluate", trained, *words, "--split", "all")
    words = (*words, "--split", "all", "--eval-split", "all", "--steps", "2", "--batch-size", "8")
    words = (*words, "--out", tmp_path / "out")
    for command in (("finetune", "--from", trained, "--keep-head"), ("distill", "--teacher", trained)):
        assert "has no class 'fly'" in refused(*command, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("default")
def test_numbers_that_are_names(run, trained, shades):
    numbers = {name: str(number) for number, name in enumerate(ORDER)}
    facts, err = _evaluated(run, trained, "--data", shades(*SHADES, called=[numbers[name] for name in SHADES]))
    assert facts["accuracy"] == 1
    assert len(err) == 1
    assert "class 0 is 'dog' in" in err[0]


TINY = ("--resize", "--split", "all", "--eval-split", "all", "--steps", "1", "--batch-size", "8", "--lr", "1e-12")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("names", [pytest.param(tuple(SHADES), marks=pytest.mark.slow), ("bee", "cat", "dog")])
def test_a_kept_head_is_put_in_the_order_of_the_data(run, trained, shades, tmp_path, names):
    out = tmp_path / "out"
    words = ("finetune", "--from", trained, "--keep-head", "--data", shades(*names), "--out", out, *TINY)
    run(*words, "--method", "l2-sp")
    places = [ORDER.index(name) for name in sorted(names)]
    before, after = (jt.tree.leaves_by_path(load_run(directory).params) for directory in (trained, out))
    assert any("head" in path for path in after)
    for path, leaf in after.items():
        np.testing.assert_allclose(leaf, before[path][..., places] if "head" in path else before[path], atol=1e-9)
    facts, _ = _evaluated(run, out)
    assert facts["accuracy"] == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("names", [tuple(SHADES), pytest.param(("bee", "cat", "dog"), marks=pytest.mark.slow)])
def test_a_teacher_speaks_of_the_data_s_classes(run, trained, shades, tmp_path, names):
    out, data = tmp_path / "out", shades(*names)
    run("distill", "--teacher", trained, "--data", data, "--out", out, "--model", "linear", *TINY)
    record = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["eval/teacher/accuracy"] == 1


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("names", [pytest.param(tuple(SHADES), marks=pytest.mark.slow), ("bee", "cat", "dog")])
def test_so_does_its_cache(trained, shades, tmp_path, names):
    data, cache = shades(*names), tmp_path / "cache"
    assert (
        main(["cache-teacher", *map(str, (trained, "--data", data, "--split", "all", "--out", cache, "--resize"))]) == 0
    )
    loaded, teacher = jt.data.load(data, "all", image_shape=(8, 8, 1)), load_run(trained)
    places = [ORDER.index(name) for name in sorted(names)]
    attached = attach_cache(loaded, cache, teacher, trained, np.array(places))
    logits = attached.columns["teacher_logits"][:]
    assert logits.shape == (len(loaded), len(names))
    np.testing.assert_array_equal(logits.argmax(1), loaded.labels)
    with pytest.MonkeyPatch.context() as patch:  # as of a cache too large for the memory
        patch.setattr("jaxtransfer.data.teacher_cache._MEMORY_LIMIT", 0)
        unread = attach_cache(loaded, cache, teacher, trained, np.array(places)).select([3, 1])
    np.testing.assert_array_equal(unread.read([0, 1])["teacher_logits"], logits[[3, 1]])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_student_of_a_cache_learns_the_data_s_classes(run, trained, shades, tmp_path):
    out, data = tmp_path / "out", shades(*SHADES)
    run("cache-teacher", trained, "--data", data, "--split", "all", "--out", tmp_path / "cache", "--resize")
    words = ("distill", "--teacher", trained, "--data", data, "--out", out, "--model", "mlp", *TINY)
    run(*words, "--cache", tmp_path / "cache", "--label-weight", "0", "--steps", "200", "--lr", "0.003")
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["eval/accuracy"] > 0.9


def test_values_of_parameters_go_with_their_class(trained):
    run = load_run(trained)
    values = run.params[run.model.name]
    picked, all_of_them = (jt.tree.leaves_by_path(one) for one in (pick_classes(run.config, values, [3, 0]), values))
    model = jt.models.create("mlp", 2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 1), np.uint8))["params"]
    assert {path: leaf.shape for path, leaf in picked.items()} == {
        path: leaf.shape for path, leaf in jt.tree.leaves_by_path(shapes).items()
    }
    moved = [path for path, leaf in picked.items() if leaf.shape != all_of_them[path].shape]
    assert len(moved) == 2
    for path in moved:
        np.testing.assert_array_equal(picked[path], all_of_them[path][..., [3, 0]])


@pytest.mark.parametrize("text", ["", "7", '[["a"]]', "[null]", "\udcff"])
def test_a_table_of_sizes_that_is_not_what_was_written_is_measured_anew(tmp_path, text):
    path = tmp_path / "sizes.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert _sizes_of(path) is None
    path.write_text('[["student", "8", 3]]')
    assert _sizes_of(path) == [["student", "8", 3]]
