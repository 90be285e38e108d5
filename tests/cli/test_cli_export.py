"""Commands that show weights and bring them out."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtransfer as jt
from jaxtransfer.cli import main
from jaxtransfer.formats import read_tensors
from jaxtransfer.pretrained import LIBRARIES, PLATFORMS


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a CIFAR ResNet-20 with three classes, which nobody has trained."""
    model = jt.models.normalize(jt.models.resnet20(3), 0.5, 0.25)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), image)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda one: rng.normal(size=one.shape).astype(one.dtype) ** 2, dict(shapes))
    folder = tmp_path_factory.mktemp("runs") / "a"
    loaded = jt.load_pretrained(variables, model, inputs=image)
    jt.pretrained.write_run(loaded, folder, class_names=["ant", "bee", "wasp"])
    return folder


def test_a_run_is_shown(run, capsys):
    assert main(["inspect", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["params/stem_conv/kernel", "3×3×3×16", "float32", "432"] in [line.split() for line in lines]
    # 269,722 parameters at 10 classes, here 3, and statistics of 688 maps
    assert "97 tensors, 270,643 values, 1,082,572 bytes, float32" in lines
    assert "3 classes: ant, bee, wasp" in lines
    assert main(["inspect", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total"] == {"tensors": 97, "count": 270_643, "bytes": 1_082_572}
    assert {"path": "params/head/bias", "shape": [3], "dtype": "float32", "count": 3, "bytes": 12} in found["tensors"]
    assert (found["class_names"], found["preprocessing"]["mean"]) == (["ant", "bee", "wasp"], [0.5])


@pytest.mark.slow
def test_a_run_leaves_and_comes_back(run, tmp_path, capsys):
    file = str(tmp_path / "a.safetensors")
    assert main(["export", str(run), "--scheme", "cifar", "--out", file]) == 0
    assert "97 tensors" in capsys.readouterr().out
    assert main(["inspect", file]) == 0
    assert "layer1.0.conv1.weight" in capsys.readouterr().out
    assert main(["convert", file, "--model", "resnet20", "--out", str(tmp_path / "again")]) == 0
    first, again = jt.load_run(run), jt.load_run(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, first.variables, again.variables)
    assert again.class_names == ("ant", "bee", "wasp")
    assert again.preprocessing == first.preprocessing
    assert main(["export", str(run), "--dtype", "bfloat16", "--out", file]) == 0
    assert {value.dtype.name for value in read_tensors(file).values()} == {"bfloat16"}


@pytest.mark.slow
def test_a_run_becomes_a_program(run, tmp_path, capsys):
    pytest.importorskip("flatbuffers")
    words = ["export", str(run), "--out", str(tmp_path / "net.jax")]
    assert main([*words, "--platforms", "cpu", "--outputs", "probabilities", "features"]) == 0
    said = capsys.readouterr().out
    assert "uint8[batch,32,32,3] to features float32[batch,64], probabilities float32[batch,3] on cpu, " in said
    about = json.loads((tmp_path / "net.jax" / "about.json").read_text())
    assert about["class_names"] == ["ant", "bee", "wasp"]
    assert about["preprocessing"]["size"] == [32, 32]
    assert main([*words, "--platforms", "cpu", "--normalized"]) == 0  # again, in its place
    assert "float32[batch,32,32,3] to probabilities" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--format", "tf"], "unknown format 'tf'"),
        (["--scheme", "tim"], "did you mean 'timm'"),
        (["--scheme", "big_vision"], "big_vision has no names for it"),
        (["--dtype", "float61"], "did you mean 'float16'"),
        (["--platforms", "cpu"], "--platforms goes with --format jax"),
        (["--normalized"], "--normalized goes with --format jax"),
        (["--format", "jax", "--scheme", "timm"], "--scheme goes with --format safetensors"),
        (["--format", "jax", "--platforms", "cdua"], "did you mean 'cuda'"),
        (["--format", "jax", "--outputs", "logit"], "did you mean 'logits'"),
        (["--out", "a.jax", "--scheme", "timm"], "--scheme goes with --format safetensors"),
        (["--out", "a.jax", "--format", "safetensors"], "--format safetensors, and --out a.jax ends as jax does"),
        (["--out", "a.safetensors", "--platforms", "cpu"], "--platforms goes with --format jax"),
        (["--out", "a.safetensors", "--format", "jax"], "and --out a.safetensors ends as safetensors does"),
    ],
)
def test_what_does_not_fit_is_one_line(run, words, told, tmp_path, capsys, monkeypatch):
    if "logit" in words:
        pytest.importorskip("flatbuffers")
    monkeypatch.chdir(tmp_path)
    out = [] if "--out" in words else ["--out", "x"]
    assert main(["export", str(run), *out, *words]) == 2
    message = capsys.readouterr().err
    assert told in message
    assert message.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_is_not_there_is_one_line(tmp_path, capsys):
    for words in (["inspect", str(tmp_path / "x")], ["export", str(tmp_path / "x"), "--out", str(tmp_path / "y")]):
        assert main(words) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_help_names_what_there_is(capsys):
    for command, names in (("export", (*LIBRARIES, *PLATFORMS)), ("inspect", ("--json",))):
        assert main([command, "--help"]) == 0
        text = capsys.readouterr().out
        assert all(len(line) <= 80 for line in text.splitlines())
        assert all(name in text for name in names)
