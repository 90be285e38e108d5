"""What the command line's optimisers do: decay of kernels alone, warm-up, clipping, LARS, the head's rate, epochs."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.cli import main
from jaxtransfer.cli.options import OPTIMIZERS, RunOptions
from jaxtransfer.cli.registry.finetuning import METHODS
from jaxtransfer.cli.runs import load_run
from jaxtransfer.runs import checkpoints

DIGITS = ("--data", "digits/upright", "--eval-split", "test[:16]", "--batch-size", "16")
TINY = ("pretrain", *DIGITS, "--split", "train[:40]", "--model", "linear")


def a_tree(rng):
    make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {
        "net": {
            "stem_conv": {"kernel": make(3, 3, 2, 4)},
            "stem_norm": {"scale": make(4), "bias": make(4)},
            "attention": {"query": {"kernel": make(4, 2, 2), "bias": make(2, 2)}},
            "stem_token": make(1, 1, 4),
            "stem_position": make(1, 5, 4),
            "head": {"kernel": make(4, 3), "bias": make(3)},
        },
        "net_siglip": {"log_scale": make(), "bias": make()},
        "net_prototypes": {"vectors": make(4, 8)},
        "rates": {"net": {"head": {"kernel": make(1, 4, 3)}}},
    }


def first_updates(optimizer, grads, params):
    """One program, not one an operation."""
    return jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])(grads, params)


KERNELS = {"net/stem_conv/kernel", "net/attention/query/kernel", "net/head/kernel"}


def test_kernels_are_what_layers_multiply_by(rng):
    mask = jt.tree.leaves_by_path(jt.optim.kernels(a_tree(rng)))
    assert {path for path, decays in mask.items() if decays} == KERNELS
    others = {"dense": {"weight": jnp.ones((2, 3))}, "linear": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}}
    assert jt.optim.kernels(others) == {"dense": {"weight": True}, "linear": {"w": True, "b": False}}
    assert jt.optim.kernels({"mix": jnp.ones((2, 2))}, patterns="mix") == {"mix": True}
    assert jt.optim.kernels({"norm": {"weight": jnp.ones(3)}}) == {"norm": {"weight": False}}


@pytest.mark.parametrize("name", ["mlp", "small-cnn", "conv4", "resnet20", "vgg11-bn", "wrn-10-2", "vit-ti-4"])
def test_each_network_decays_its_layers(name):
    """Everything that multiplies its input, and nothing that is added to it or scales a norm."""
    model, shape = jt.models.create(name, 3), jt.models.ZOO[name].image
    variables = jax.eval_shape(
        lambda x: model.init(jax.random.key(0), x), jax.ShapeDtypeStruct((1, *shape), np.float32)
    )
    mask = jt.tree.leaves_by_path(jt.optim.kernels(variables["params"]))
    added = ("bias", "scale", "stem_token", "stem_position")
    assert {path for path, decays in mask.items() if not decays} == {p for p in mask if p.split("/")[-1] in added}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_moves_kernels_alone(rng, name):
    """Three updates without a gradient, against each rule written out in NumPy."""
    params = a_tree(rng)
    start = {path: np.asarray(leaf, np.float64) for path, leaf in jt.tree.leaves_by_path(params).items()}
    optimizer = OPTIMIZERS[name](optax.constant_schedule(0.1), 0.5)
    state, zero = jax.jit(optimizer.init)(params), jax.tree.map(np.zeros_like, params)

    @jax.jit
    def updated(params, state):
        updates, state = optimizer.update(zero, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = updated(params, state)
    for path, leaf in jt.tree.leaves_by_path(params).items():
        w, momentum = start[path].copy(), np.zeros_like(start[path])
        for _ in range(3 * (path in KERNELS)):
            if name == "adam":
                w = w - 0.1 * 0.5 * w
            elif name == "sgd":
                momentum = 0.9 * momentum + 0.5 * w
                w = w - 0.1 * (0.5 * w + 0.9 * momentum)
            else:
                ratio = 0.001 * np.linalg.norm(w) / np.linalg.norm(0.5 * w)
                momentum = 0.9 * momentum + 0.1 * ratio * 0.5 * w
                w = w - momentum
        np.testing.assert_allclose(leaf, w, rtol=1e-5, atol=1e-7, err_msg=path)
        assert (path in KERNELS) == bool(np.any(leaf != start[path].astype(np.float32)))


def test_lars_adapts_kernels_alone(rng):
    """You et al. 2017 (arXiv:1708.03888): rate · 0.001 ‖w‖ / ‖g‖ for kernels, the plain rate for the rest."""
    params, grads = a_tree(rng), a_tree(rng)
    optimizer = OPTIMIZERS["lars"](optax.constant_schedule(0.1), 0.0)
    updates = first_updates(optimizer, grads, params)
    w, g = jt.tree.leaves_by_path(params), jt.tree.leaves_by_path(grads)
    for path, update in jt.tree.leaves_by_path(updates).items():
        ratio = 0.001 * np.linalg.norm(w[path]) / np.linalg.norm(g[path]) if path in KERNELS else 1.0
        np.testing.assert_allclose(update, -0.1 * ratio * np.asarray(g[path]), rtol=1e-5, err_msg=path)


def options(**given):
    return RunOptions(out=Path("nowhere"), optimizer="lars", **given)


def test_warm_up_then_cosine():
    """The rate of each of twelve steps, read off a scalar, which LARS moves by rate · momentum."""
    optimizer = options(lr=0.5, warmup=4).optimizer_for(12)
    params = {"bias": jnp.zeros(())}
    state, rates, momentum = optimizer.init(params), [], 0.0
    update = jax.jit(optimizer.update)
    for _ in range(12):
        updates, state = update({"bias": jnp.ones(())}, state, params)
        now = -float(updates["bias"])
        rates.append(now - 0.9 * momentum)
        momentum = now
    steps = np.arange(12)
    want = np.where(steps < 4, 0.5 * (steps + 1) / 5, 0.25 * (1 + np.cos(np.pi * (steps - 4) / 8)))
    np.testing.assert_allclose(rates, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_clipping_by_the_norm_of_all(rng, factor):
    params, grads = a_tree(rng), a_tree(rng)
    norm = np.sqrt(sum(float(np.sum(np.square(leaf))) for leaf in jax.tree.leaves(grads)))
    optimizer = options(lr=1.0, clip=factor * norm).optimizer_for(5)
    plain = options(lr=1.0).optimizer_for(5)
    got = first_updates(optimizer, grads, params)
    want = first_updates(
        plain, jax.tree.map(lambda leaf: np.float32(min(1.0, factor)) * np.asarray(leaf), grads), params
    )
    for path, update in jt.tree.leaves_by_path(got).items():
        np.testing.assert_allclose(update, jt.tree.leaves_by_path(want)[path], rtol=1e-5, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("inner", [optax.adamw(0.1, weight_decay=0.1), optax.sgd(0.1, momentum=0.9)])
def test_a_rate_of_its_own(rng, inner):
    params, grads = {"model": a_tree(rng)["net"]}, {"model": a_tree(rng)["net"]}
    stages = ("stem_.*|attention", "head")
    for wrap in (
        lambda opt: opt,
        lambda opt: jt.optim.only(opt, "head"),
        lambda opt: jt.optim.gradual_unfreeze(opt, stages, every=1),
    ):
        fast, plain = wrap(jt.optim.scale_rate(inner, 4.0, "model/(?:head)")), wrap(inner)
        got, want = (first_updates(opt, grads, params) for opt in (fast, plain))
        for path, update in jt.tree.leaves_by_path(got).items():
            factor = 4.0 if "head" in path else 1.0
            np.testing.assert_allclose(update, factor * np.asarray(jt.tree.leaves_by_path(want)[path]), rtol=1e-6)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--warmup", "-1"), "--warmup must be at least 0; got -1"),
        (("--warmup", "4"), "--warmup must be shorter than the 4 steps that it is a part of; got 4"),
        (("--clip", "0"), "--clip must be positive and finite; got 0.0"),
        (("--clip", "nan"), "--clip must be positive and finite; got nan"),
        (("--epochs", "2"), "--steps and --epochs both say how long to train; give one of them"),
    ],
)
def test_refused(refused, tmp_path, words, expected):
    assert expected in refused(*TINY, "--steps", "4", "--out", tmp_path / "out", *words)
    assert not (tmp_path / "out" / "config.json").exists()


def test_refused_elsewhere(refused, source, tmp_path):
    out = ("--out", tmp_path / "out")
    for epochs in ("0", "-1", "inf"):
        assert "--epochs must be positive and finite" in refused(*TINY, *out, "--epochs", epochs)
    assert "--warmup must be shorter than the 5 steps" in refused(*TINY, *out, "--epochs", "2", "--warmup", "5")
    tune = ("finetune", "--from", source, *DIGITS, *out, "--steps", "4")
    assert "--head-rate must be positive and finite; got 0.0" in refused(*tune, "--head-rate", "0")
    assert "--warmup must be shorter than the 2 steps" in refused(*tune, "--method", "lp-ft", "--warmup", "2")
    assert not (tmp_path / "out" / "config.json").exists()
    episodes = ("meta", "--method", "prototypical", "--data", "digits/upright", "--split-classes", "5", "3", "2", *out)
    assert "--epochs: prototypical learns from episodes" in refused(*episodes, "--epochs", "2")
    views = ("contrast", *DIGITS, *out, "--steps", "4")
    assert "--warmup must be shorter than the 4 steps" in refused(*views, "--warmup", "9")
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.slow
def test_epochs_are_steps(run, refused, tmp_path):
    """Forty examples in batches of sixteen, twice: five steps; the same run as --steps 5."""
    out = tmp_path / "out"
    _, err = run(*TINY, "--epochs", "2", "--warmup", "2", "--clip", "0.5", "--optimizer", "lars", "--out", out)
    assert err[0] == "--epochs 2: 5 steps"
    assert json.loads((out / "config.json").read_text())["steps"] == 5
    assert checkpoints.steps(out / "checkpoints")[-1] == 5
    same = (*TINY, "--out", out, "--steps", "5", "--optimizer", "lars")
    lines, _ = run(*same, "--warmup", "2", "--clip", "0.5")
    assert lines[0].startswith("already done: ")
    assert "warmup: 2 there, 1 now" in refused(*same, "--warmup", "1", "--clip", "0.5")
    assert "clip: 0.5 there, None now" in refused(*same, "--warmup", "2")
    decayed = (*same, "--warmup", "2", "--clip", "0.5", "--weight-decay", "0.1")
    assert "weight_decay: 0.0 there, 0.1 now" in refused(*decayed)


@pytest.mark.slow
def test_epochs_of_other_commands(run, source, tmp_path):
    few = (*DIGITS, "--split", "train[:40]", "--epochs", "1.5")
    for name, words in {
        "finetune": ("finetune", "--from", source),
        "distill": ("distill", "--teacher", source, "--model", "linear"),
        "contrast": ("contrast", "--no-flip"),
    }.items():
        _, err = run(*words, *few, "--out", tmp_path / name)
        assert "--epochs 1.5: 4 steps" in err
        assert checkpoints.steps(tmp_path / name / "checkpoints")[-1] == 4
    words = ("meta", "--method", "linear-head", "--data", "digits/upright", "--split-classes", "5", "3", "2")
    words = (*words, "--ways", "2", "--model", "linear", "--tasks", "8", "--test-episodes", "8")
    _, err = run(*words, "--epochs", "0.1", "--batch-size", "64", "--out", tmp_path / "meta")
    assert any(line.startswith("--epochs 0.1: ") for line in err)


@pytest.mark.slow
def test_the_head_has_its_own_rate(run, source, tmp_path, refused):
    """One step of SGD: the head moves five times as far, the body as far as without."""
    words = ("finetune", "--from", source, *DIGITS, "--steps", "1", "--optimizer", "sgd", "--lr", "0.01")
    words = (*words, "--keep-head")
    run(*words, "--out", tmp_path / "plain")
    run(*words, "--head-rate", "0.05", "--out", tmp_path / "fast")
    plain, fast = (checkpoints.read(tmp_path / name / "checkpoints").leaves for name in ("plain", "fast"))
    start = jt.tree.leaves_by_path({"params": load_run(source).params})
    for path in (path for path in plain if path.startswith("params/")):
        factor = 5 if "/head/" in path else 1
        moved = np.asarray(fast[path], np.float64) - start[path], np.asarray(plain[path], np.float64) - start[path]
        np.testing.assert_allclose(moved[0], factor * moved[1], rtol=1e-2, atol=2e-7, err_msg=path)
        assert np.abs(moved[1]).max() > 1e-5
    assert "head_rate: 0.05 there, 0.06 now" in refused(*words, "--head-rate", "0.06", "--out", tmp_path / "fast")


def test_help_explains(capsys):
    assert main(["finetune", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("--warmup", "--clip", "--head-rate", "--epochs", "lars", "inference mode"):
        assert words in text
    assert "of kernels alone" in text.replace("│ ", "").replace(" │", "")
    assert set(METHODS) >= {"gradual-unfreeze"}
