"""Somebody's weights become a run that commands read."""

import json

import jax
import numpy as np
import pytest

import jaxtransfer as jt
from jaxtransfer import tree
from jaxtransfer.cli import main


@pytest.fixture
def weights(tmp_path):
    """A perceptron's weights, by our own paths: class k's logit is the mean of column k's pixels, less 0.5."""
    kernel = np.zeros((64, 10), np.float32)
    for number in range(8):
        kernel[number::8, number] = 1.0
    np.savez(tmp_path / "w.npz", **{"params/head/kernel": kernel, "params/head/bias": np.zeros(10, np.float32)})
    return tmp_path / "w.npz"


def test_a_run_of_them_is_evaluated(weights, tmp_path, capsys):
    out = str(tmp_path / "run")
    words = ["convert", str(weights), "--model", "linear", "--mean", "0.5", "--std", "0.25", "--out", out]
    assert main([*words, "--data", "digits/upright"]) == 0
    assert "jaxtransfer; 2 leaves from 2 tensors" in capsys.readouterr().out
    run = jt.load_run(out)
    assert run.class_names == tuple(map(str, range(10)))
    assert (run.preprocessing.mean, run.step) == ((0.5,), 0)
    assert main(["evaluate", out]) == 0
    found = json.loads(capsys.readouterr().out)
    test = jt.data.load("digits/upright", "test")
    batch = next(iter(jt.data.eval_batches(test, len(test))))
    columns = (np.asarray(batch["image"])[..., 0] / 255 - 0.5).mean(1) / 0.25
    scores = np.concatenate([columns, np.zeros((len(columns), 2))], 1)
    assert found["accuracy"] == pytest.approx((scores.argmax(1) == np.asarray(batch["label"])).mean(), abs=0.002)
    assert main([*words, "--data", "digits/noisy"]) == 2
    assert "holds a run of another configuration" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ([], "nothing says how the images of"),
        (["--mean", "0.5"], "--mean and --std go together"),
        (["--model", "resnet20"], "the closest scheme is jaxtransfer, by which"),
        (["--model", "lineer"], "did you mean 'linear'"),
        (["--ignore", "x"], "ignore: the pattern 'x' selects no"),
        (["--part", "teacher"], "the weights have no part 'teacher'"),
    ],
)
def test_what_does_not_fit_is_one_line(more, told, weights, tmp_path, capsys):
    out = str(tmp_path / "run")
    assert main(["convert", str(weights), "--model", "linear", "--out", out, *more]) == 2
    message = capsys.readouterr().err
    assert told in message
    assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.fixture
def transformer(tmp_path):
    """A transformer's weights for images of 48x48, which say so; in the zoo it is of 32x32."""
    model = jt.models.create("vit-ti-4", 2)
    image = jax.ShapeDtypeStruct((1, 48, 48, 3), np.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), image)
    arrays = {path: np.ones(leaf.shape, leaf.dtype) for path, leaf in tree.leaves_by_path(dict(shapes)).items()}
    np.savez(tmp_path / "w.npz", **arrays)
    said = {"pretrained_cfg": {"input_size": [3, 48, 48], "mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / "config.json").write_text(json.dumps(said))
    return tmp_path / "w.npz"


@pytest.mark.slow
def test_a_transformer_keeps_the_size_that_it_was_trained_on(transformer, tmp_path):
    out = tmp_path / "run"
    assert main(["convert", str(transformer), "--model", "vit-ti-4", "--out", str(out)]) == 0
    run = jt.load_run(out)
    assert run.preprocessing.image_shape == (48, 48, 3)
    assert run.variables["params"]["stem_position"].shape == (1, 1 + 12 * 12, 192)  # not interpolated


@pytest.mark.slow
def test_a_run_is_of_images_that_its_weights_are_laid_out_for(transformer, tmp_path):
    loaded = jt.load_pretrained(transformer, jt.models.create("vit-ti-4", 2))  # for the zoo's images
    with pytest.raises(jt.InputError, match=r"not laid out for images of \[48, 48, 3\]: pass the image_shape="):
        jt.pretrained.write_run(loaded, tmp_path / "wrong", image_shape=(48, 48, 3))
    jt.pretrained.write_run(loaded, tmp_path / "small")
    assert jt.load_run(tmp_path / "small").preprocessing.image_shape == (32, 32, 3)
