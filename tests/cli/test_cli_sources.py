"""Fine-tuning straight from somebody's weights: the same numbers as from a run of them."""

import json
import shutil

import numpy as np
import pytest

import jaxtransfer as jt
from jaxtransfer.pretrained import told_network
from jaxtransfer.runs.loggers import read_jsonl

NOISY = ("--data", "digits/noisy", "--split", "train[:64]", "--eval-split", "test[:32]", "--batch-size", "16")
SHORT = ("--steps", "2", "--eval-every", "2")


@pytest.fixture
def weights(source, tmp_path):
    """The weights of a run as a file, with what their images are normalised by beside it."""
    run = jt.load_run(source)
    folder = tmp_path / "weights"
    folder.mkdir()
    np.savez(folder / "small-cnn.npz", **jt.tree.leaves_by_path(run.variables))
    said = {"input_size": [1, 8, 8], "mean": list(run.preprocessing.mean), "std": list(run.preprocessing.std)}
    (folder / "config.json").write_text(json.dumps({"pretrained_cfg": said}))
    return folder / "small-cnn.npz"


@pytest.mark.slow
def test_a_file_is_what_a_run_of_it_is(run, refused, source, weights, tmp_path):
    outs = tmp_path / "run", tmp_path / "file", tmp_path / "named"
    run("finetune", "--from", source, *NOISY, *SHORT, "--out", outs[0])
    run("finetune", "--from", weights, *NOISY, *SHORT, "--out", outs[1])
    other = shutil.copy(weights, weights.with_name("w.npz"))
    words = ("finetune", "--from", other, "--model", "small-cnn", *NOISY, *SHORT, "--out", outs[2])
    run(*words)
    records = [read_jsonl(out / "metrics.jsonl") for out in outs]
    assert records[0] == records[1] == records[2]
    configs = [json.loads((out / "config.json").read_text()) for out in outs]
    for name in ("model", "mean", "std", "image_shape", "class_names"):
        assert configs[1][name] == configs[0][name]
    assert configs[1]["source_weights"] == configs[2]["source_weights"]
    assert configs[1]["source_scheme"] == "jaxtransfer"
    assert "source_weights" not in configs[0]
    # other weights under the same name are another run
    arrays = dict(np.load(other))
    np.savez(other, **{**arrays, "params/stem_conv/kernel": arrays["params/stem_conv/kernel"] * 2})
    assert "source_weights: " in refused(*words)


@pytest.mark.slow
def test_weights_without_a_head_start_a_new_one(run, refused, weights, tmp_path):
    arrays = {path: leaf for path, leaf in np.load(weights).items() if "head" not in path}
    np.savez(weights, **arrays)
    words = ("finetune", "--from", weights, *NOISY, *SHORT)
    run(*words, "--out", tmp_path / "out")
    assert "has no head" in refused(*words, "--keep-head", "--out", tmp_path / "other")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--from {file}", "nothing says which network the weights {file} are of: --model NAME"),
        ("--from {file} --model small_cnn", "unknown model 'small_cnn' (did you mean 'small-cnn'?)"),
        ("--from {file} --model mlp", "don't fit model 'mlp'"),
        ("--from {named} --method l2-sp-fisher", "weighs by the source's own loss on its own data"),
        ("--from {named} --freeze stemm.*", "--freeze 'stemm.*' selects no layer (did you mean 'stem_"),
        ("--from nowhere.pth --model small-cnn", "nowhere.pth"),
        ("--from nowhere", "expected a run directory, with config.json in it, got 'nowhere'"),
        ("--from {run} --model small-cnn", "--model is of weights in a file"),
        ("--from hf:somebody/something", "nothing says which network the weights hf:somebody/something are of"),
        ("--from {bare} --model small-cnn", "make a run of them by jaxtransfer convert, with --mean and --std"),
    ],
)
def test_what_is_no_source(refused, source, weights, tmp_path, words, expected):
    places = {"named": weights, "file": weights.with_name("w.npz"), "run": source, "bare": tmp_path / "w.npz"}
    for name in ("file", "bare"):
        shutil.copy(weights, places[name])
    message = refused("finetune", *words.format(**places).split(), *NOISY, *SHORT, "--out", tmp_path / "out")
    assert expected.format(**places) in message
    assert not (tmp_path / "out" / "config.json").exists()


def test_what_is_no_run_is_called_by_its_name(refused, source, weights, tmp_path):
    assert f"{weights} is a file; of weights `jaxtransfer convert FILE" in refused("evaluate", weights)
    served = tmp_path / "served"
    served.mkdir()
    (served / "program.jax").write_bytes(b"")
    assert f"{served} is a program that was exported" in refused("evaluate", served)
    (tmp_path / "list.txt").write_text("photo.jpg\n")
    told = "no image photo.jpg; paths of --list are relative to the working directory, "
    assert told in refused("predict", source, "--list", tmp_path / "list.txt")
    run = shutil.copytree(source, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "data": "columns"}))
    words = ("finetune", "--from", run, *NOISY, *SHORT, "--method", "l2-sp-fisher", "--out", tmp_path / "out")
    message = refused(*words)
    assert f"on the data that {run} was trained on, and those can't be loaded: unknown data set 'columns'" in message
    assert "--method l2-sp, or" in message


def test_names_tell_networks():
    told = {
        "timm:resnet18.a1_in1k": "resnet18-imagenet",
        "hf:timm/vit_tiny_patch16_224.augreg_in21k@abc": "vit-ti-16",
        "hf:google/vit-base-patch16-224": "vit-b-16",
        "hf:microsoft/resnet-50": "resnet50-imagenet",
        "a/b/resnet50-0676ba61.pth": "resnet50-imagenet",
        "resnet56-4bfd9763.th": "resnet56",
        "vgg16_bn-6c64b313.pth": "vgg16-bn-imagenet",
        "vgg11-8a719046.pth": "vgg11-imagenet",
        "vit_b_16-c867db91.pth": "vit-b-16",
        "deit_small_patch16_224.safetensors": "vit-s-16",
        "tf_efficientnet_lite0.in1k": "efficientnet-lite0",
        "mobilenetv2_100.ra_in1k": "mobilenet-v2",
        "mobilenetv2_140.ra_in1k": None,
        "wide_resnet50_2-32ee1156.pth": "wide-resnet50-2",
        "small-cnn.npz": "small-cnn",
        "resnet180.pth": None,
        "model.safetensors": None,
    }
    assert {name: told_network(name) for name in told} == told
