"""`jaxtransfer cache-teacher`: what it writes is what the teacher gives, and it is refused where it would be wrong."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxtransfer as jt
from jaxtransfer.cli import cache_teacher, main
from jaxtransfer.cli.cache_teacher import attach_cache, check_cache_is_of, teacher_identity
from jaxtransfer.cli.runs import load_run
from jaxtransfer.errors import InputError


@pytest.fixture(scope="session")
def cache(source, tmp_path_factory):
    """The shared run's logits and features on its training data."""
    out = tmp_path_factory.mktemp("caches") / "cache"
    assert main(("cache-teacher", str(source), "--outputs", "logits", "features", "--out", str(out))) == 0
    return out


def live(run, dataset, size=256):
    """The outputs of the run in batches of `size`."""

    @jax.jit
    def compute(images):
        variables = {"params": run.params[run.model.name], **run.state[run.model.name]}
        return run.model.apply(variables, images, train=False, key=None)[0]

    parts = [(compute(batch["image"]), batch["mask"] == 1) for batch in jt.data.eval_batches(dataset, size)]
    return {name: np.concatenate([np.asarray(out[name])[real] for out, real in parts]) for name in parts[0][0]}


@pytest.mark.slow
def test_the_cache_is_the_teacher(source, cache):
    run, train = load_run(source), jt.data.load("digits/upright", "train")
    attached = attach_cache(train, cache, run, source)
    same, other = live(run, train), live(run, train, 100)
    for name in ("logits", "features"):
        column = attached.columns[f"teacher_{name}"]
        assert column.dtype == np.float32
        np.testing.assert_allclose(column, same[name], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(column, other[name], rtol=1e-4, atol=1e-5)
    batch = jt.data.pipeline(attached.subset(per_class=5), 16, seed=3).batch(2)
    variables = {"params": run.params["model"], **run.state["model"]}
    again = jax.jit(lambda images: run.model.apply(variables, images, train=False, key=None)[0]["logits"])(
        batch["image"]
    )
    np.testing.assert_allclose(batch["teacher_logits"], again, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"column 'teacher_features' was computed on unaugmented images"):
        jt.data.pipeline(attached, 16, augment=jt.data.augment.random_flip())


@pytest.mark.slow
def test_already_done_and_what_is_printed(run, refused, source, cache, tmp_path):
    words = ("cache-teacher", source, "--outputs", "logits", "features")
    before = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    out, err = run(*words, "--out", cache)
    features = jt.data.open_outputs(cache).note["outputs"]["features"]["shape"]
    facts = f"{cache}: logits [10], features {features} float32 of 1201 examples"
    assert (out, err) == ([f"already done: {facts}"], [])
    assert before == {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    assert "holds another teacher cache (outputs logits" in refused("cache-teacher", source, "--out", cache)
    assert "split train there, examples 596," in refused(*words, "--split", "test", "--out", cache)
    assert before == {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    out, err = run(*words[:2], "--split", "test[:100]", "--half", "--out", tmp_path / "half")
    assert (out, err) == ([f"wrote {tmp_path / 'half'}: logits [10] float16 of 100 examples"], [])
    test = jt.data.load("digits/upright", "test[:100]")
    column = attach_cache(test, tmp_path / "half", load_run(source), source).columns["teacher_logits"]
    assert column.dtype == np.float16
    np.testing.assert_allclose(column, live(load_run(source), test)["logits"], rtol=1e-3, atol=1e-4)


def test_images_of_another_shape_are_resized(run, refused, source, folder, tmp_path):
    images, out = folder(), tmp_path / "cache"
    words = ("cache-teacher", source, "--data", f"folder:{images}", "--split", "all", "--out", out)
    assert "add --resize" in refused(*words)
    run(*words, "--resize")
    dataset = jt.data.load(f"folder:{images}", "all", image_shape=(8, 8, 1))
    assert set(attach_cache(dataset, out, load_run(source), source).columns) == {"teacher_logits"}
    for image in images.glob("*/*.png"):
        shutil.copy(image, image.with_stem(image.stem + "copy"))
    grown = jt.data.load(f"folder:{images}", "all", image_shape=(8, 8, 1))
    with pytest.raises(InputError, match=r"30 images \(8, 8, 1\); got folder:.*60 images.* write it anew"):
        attach_cache(grown, out, load_run(source), source)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--outputs", "logit"), " 'logit' (did you mean 'logits'?); known: features, logits"),
        (("--outputs",), "--outputs: expected names of outputs, got none; known: features, logits"),
        (("--data", "digits/uprite"), "unknown data set 'digits/uprite' (did you mean 'digits/upright'?)"),
        (("--split", "trian"), "unknown split of digits/upright 'trian' (did you mean 'train'?); known: test, train"),
        (("--batch-size", "0"), "--batch-size must be at least 1; got 0"),
        (("--data-dir", "/no/such"), "there is no folder /no/such"),
        (("--out", "/proc/caches/a"), "cannot write the teacher cache /proc/caches/a: No such file or directory"),
        (("--out", Path(__file__)), "is there and is no teacher cache; choose another folder"),
    ],
)
def test_what_cannot_be_is_refused(refused, source, tmp_path, words, expected):
    assert expected in refused("cache-teacher", source, "--out", tmp_path / "out", *words)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_none(refused, tmp_path):
    assert "expected a run directory" in refused("cache-teacher", tmp_path / "none", "--out", tmp_path / "out")


def test_another_teacher_is_refused(source, cache, tmp_path):
    run, train = load_run(source), jt.data.load("digits/upright", "train")
    check_cache_is_of(jt.data.open_outputs(cache), run, source)
    moved = tmp_path / "moved"
    shutil.copytree(source, moved)
    assert teacher_identity(load_run(moved)) == teacher_identity(run)
    others = {
        "other weights": run._replace(params=jax.tree.map(lambda x: np.nextafter(x, np.float32(9)), run.params)),
        "other config": run._replace(config={**run.config, "mean": [0.5]}),
        "step 20 there, 18 now": run._replace(step=18),
    }
    for says, other in others.items():
        with pytest.raises(InputError, match=rf"another teacher than \S+ \({says}\); write one of it: jaxtransfer"):
            attach_cache(train, cache, other, source)
    with pytest.raises(InputError, match=r"was written for digits/upright \(train\).* got digits/noisy \(train\)"):
        attach_cache(jt.data.load("digits/noisy", "train"), cache, run, source)


def test_a_truncated_cache_is_told_and_mended(run, source, cache, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(cache, damaged)
    (shard,) = damaged.glob("*array_record*")
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(InputError, match=r"is damaged: .*; the same cache-teacher command writes it anew"):
        jt.data.open_outputs(damaged)
    assert run("cache-teacher", source, "--outputs", "logits", "features", "--out", damaged)[0][0].startswith("wrote ")
    before, after = (jt.data.open_outputs(place).read("logits", np.arange(1201)) for place in (cache, damaged))
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    ("factor", "words", "says"),
    [
        (np.nan, (), "logits for example 0 that are not finite, train the teacher anew"),
        (1e6, ("--half",), "logits for example 0 that are beyond 65504, which float16 can't hold; leave out --half"),
    ],
)
def test_outputs_that_cannot_be_stored(refused, source, tmp_path, monkeypatch, factor, words, says):
    apply = cache_teacher._apply

    def scaled(*arguments):
        return {name: factor * (1 + abs(values)) for name, values in apply(*arguments).items()}

    monkeypatch.setattr(cache_teacher, "_apply", scaled)
    assert says in refused("cache-teacher", source, *words, "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_identity_is_plain_json(source):
    identity = teacher_identity(load_run(source))
    assert json.loads(json.dumps(identity)) == identity
    assert (identity["data"], identity["model"], identity["step"]) == ("digits/upright", "small-cnn", 20)
