"""In which numbers weights are stored and products are made, on the command line."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.cli.precision import multiplied
from jaxtransfer.cli.recipe import RecipeOptions
from jaxtransfer.cli.registry.fewshot import METHODS as FEWSHOT
from jaxtransfer.narrow_weights import MasterWeights, StochasticRounding
from jaxtransfer.runs import checkpoints

NOISY = ("--data", "digits/noisy", "--split", "train[:64]", "--eval-split", "test[:32]", "--batch-size", "16")
SHORT = ("--steps", "4", "--eval-every", "2")


def precision_of(**options):
    with multiplied(SimpleNamespace(**options)):
        return jax.config.jax_default_matmul_precision


def test_products_are_made_as_a_training_asks_and_as_its_run_did(tmp_path):
    before = jax.config.jax_default_matmul_precision
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"matmul_precision": "highest"}))
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text("{}")
    assert precision_of(training=SimpleNamespace(matmul_precision="high")) == "high"
    assert precision_of(training=SimpleNamespace(matmul_precision=None), directory=run) == before
    assert precision_of(matmul_precision=None, directory=run) == "highest"
    assert precision_of(matmul_precision="default", directory=run) == "default"
    for directory in (old, tmp_path / "none"):
        assert precision_of(matmul_precision=None, directory=directory) == before
    assert precision_of(directory=run) == before  # a command without the option
    assert jax.config.jax_default_matmul_precision == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--matmul-precision hihg", "unknown --matmul-precision 'hihg' (did you mean 'high'?)"),
        ("--param-dtype float16", "unknown --param-dtype 'float16'"),
        ("--stochastic-rounding", "--stochastic-rounding is for weights in bfloat16: add --param-dtype bfloat16"),
        ("--param-dtype bfloat16 --delta lora", "--delta lora keeps the source's weights as they are"),
    ],
)
def test_what_can_not_be(refused, source, tmp_path, words, told):
    out = tmp_path / "out"
    assert told in refused("finetune", "--from", source, *NOISY, *SHORT, "--out", out, *words.split())
    assert not (out / "config.json").exists()


def test_optimisers_of_all_phases_keep_copies_or_round(rng):
    net = jt.models.mlp(3, hidden=(4,), param_dtype=jnp.bfloat16)
    params = {"model": net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]}
    config = {"model_options": {"param_dtype": "bfloat16"}, "seed": 3}
    phases = jt.methods.lp_ft(net, optax.sgd(0.1))

    def states(options, config):
        return [phase.optimizer.init(params) for phase in options.applied(phases, net, config)[0]]

    assert [type(state) for state in states(RecipeOptions(), config)] == [MasterWeights] * 2  # as the source's
    rounding = RecipeOptions(param_dtype="bfloat16", stochastic_rounding=True)
    assert [type(state) for state in states(rounding, config)] == [StochasticRounding] * 2
    keys = [np.asarray(states(rounding, {**config, "seed": seed})[0].key) for seed in (3, 4)]
    assert not np.array_equal(*keys)
    assert not np.array_equal(keys[0], jax.random.key_data(jax.random.key(3)))  # the run's own
    narrow = {"model_options": {"param_dtype": "bfloat16", "dtype": "float16"}, "seed": 3}
    assert [type(state.inner_state) for state in states(RecipeOptions(), narrow)] == [MasterWeights] * 2
    assert rounding.entries({})["model_options"] == {"param_dtype": "bfloat16"}
    assert RecipeOptions(param_dtype="float32").entries(config)["model_options"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["distill", "contrast"])
def test_students_and_encoders_are_stored_in_bfloat16_and_move(run, refused, source, tmp_path, command):
    words = (*NOISY, *SHORT, "--model", "mlp", "--lr", "1e-4", "--optimizer", "sgd")
    words = (command, *(("--teacher", source) if command == "distill" else ()), *words)
    told = refused(*words, "--out", tmp_path / "none", "--stochastic-rounding")
    assert "--stochastic-rounding is for weights in bfloat16: add --param-dtype bfloat16" in told
    assert "unknown --param-dtype 'float16'" in refused(*words, "--out", tmp_path / "none", "--param-dtype", "float16")
    out = tmp_path / "out"
    run(*words, "--param-dtype", "bfloat16", "--out", out)
    assert json.loads((out / "config.json").read_text())["model_options"] == {"param_dtype": "bfloat16"}
    kept = checkpoints.read(out / "checkpoints", 4).leaves
    net = (
        "params/model/encoder/" if command == "contrast" else "params/model/"
    )  # beside it are a projection and a probe
    stored = {path: leaf for path, leaf in kept.items() if path.startswith(net)}
    assert {leaf.dtype.name for leaf in stored.values()} == {"bfloat16"}
    copies = {path.partition("/master/")[2]: leaf for path, leaf in kept.items() if "/master/" in path}
    for path, leaf in stored.items():  # what was rounded off is kept, of steps that bfloat16 alone would have lost
        copy = copies[path.removeprefix("params/")]
        np.testing.assert_array_equal(copy.astype(leaf.dtype), leaf, err_msg=path)
    assert any(np.any(copy != copy.astype(jnp.bfloat16).astype(np.float32)) for copy in copies.values())


FLAT = ("--model", "mlp", "--lr", "1e-4", "--optimizer", "sgd", "--steps", "2", "--eval-every", "2")
DOMAINS = ("--source", "digits/upright", "--target", "digits/noisy", "--compare", "none", "--batch-size", "16")
EPISODES = ("--data", "digits/upright", "--split-classes", "6", "2", "2", "--ways", "2", "--queries", "3")
FEW = ("--tasks", "8", "--inner-steps", "2", "--inner-lr", "1e-4", "--test-episodes", "10")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["adapt", "meta"])
def test_adaptation_and_few_shot_learning_refuse_other_types(refused, tmp_path, command):
    words = (command, *(DOMAINS if command == "adapt" else (*EPISODES, *FEW)), *FLAT, "--out", tmp_path / "out")
    told = refused(*words, "--stochastic-rounding")
    assert "--stochastic-rounding is for weights in bfloat16: add --param-dtype bfloat16" in told
    assert "unknown --param-dtype 'float16'" in refused(*words, "--param-dtype", "float16")
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cdan", "mcd", "prototypical", "maml", "imaml", "reptile"])
def test_domains_and_episodes_move_weights_that_are_stored_in_bfloat16(run, tmp_path, method):
    few = method in FEWSHOT
    words = (("meta", *EPISODES, *FEW) if few else ("adapt", *DOMAINS)) + ("--method", method, *FLAT)
    out, rounded = tmp_path / "out", tmp_path / "rounded"
    run(*words, "--param-dtype", "bfloat16", "--out", out)
    assert json.loads((out / "config.json").read_text())["model_options"] == {"param_dtype": "bfloat16"}
    kept = checkpoints.read(out / "checkpoints", 2).leaves
    stored = {path: leaf for path, leaf in kept.items() if path.startswith("params/model/")}
    assert {leaf.dtype.name for leaf in stored.values()} == {"bfloat16"}
    copies = {path: leaf for path, leaf in kept.items() if "/master/model/" in path}
    assert {path.partition("/master/")[2] for path in copies} == {path.removeprefix("params/") for path in stored}
    assert any(np.any(copy != copy.astype(jnp.bfloat16).astype(np.float32)) for copy in copies.values())
    run(*words, "--param-dtype", "bfloat16", "--stochastic-rounding", "--out", rounded)
    assert not any("/master/" in path for path in checkpoints.read(rounded / "checkpoints", 2).leaves)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["shot", "dann"])
def test_adaptation_goes_on_in_the_type_of_the_run_it_starts_from(run, tmp_path, method):
    first, out, wide = (tmp_path / name for name in ("first", "out", "wide"))
    data = ("--data", "digits/upright", "--batch-size", "16")
    run("pretrain", *data, *FLAT, "--param-dtype", "bfloat16", "--out", first)
    words = ("adapt", *DOMAINS, *FLAT[4:], "--from", first, "--method", method)
    run(*words, "--out", out)
    assert json.loads((out / "config.json").read_text())["model_options"] == {"param_dtype": "bfloat16"}
    assert any("/master/model/" in path for path in checkpoints.read(out / "checkpoints", 2).leaves)
    run(*words, "--param-dtype", "float32", "--out", wide)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(jt.load_run(wide).params["model"])} == {"float32"}


@pytest.mark.slow
@pytest.mark.parametrize("rounding", [(), ("--stochastic-rounding",)])
def test_a_run_stored_in_bfloat16_is_read_evaluated_and_passed_on(run, refused, source, tmp_path, rounding):
    out, words = tmp_path / "out", ("--param-dtype", "bfloat16", "--dtype", "bfloat16", *rounding)
    words = ("finetune", "--from", source, *NOISY, *SHORT, *words, "--matmul-precision", "highest", "--ema", "0.9")
    run(*words, "--out", out)
    config = json.loads((out / "config.json").read_text())
    assert config["model_options"] == {"dtype": "bfloat16", "param_dtype": "bfloat16"}
    assert config["matmul_precision"] == "highest"
    own = jt.load_run(out, average=False, checkpoint="last")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(own.params)} == {"bfloat16"}
    beside = {leaf.dtype for leaf in jax.tree.leaves(own.state) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    assert beside == {np.dtype("float32")}
    begun = jt.tree.leaves_by_path(jt.load_run(source).params)
    moved = jt.tree.leaves_by_path(own.params)
    assert all(np.any(np.asarray(moved[path]).astype(np.float32) != begun[path]) for path in moved)
    scores = json.loads(run("evaluate", out, "--split", "test[:32]")[0][0])
    assert 0 <= scores["accuracy"] <= 1
    told = refused(*words, "--out", out, "--matmul-precision", "high")
    assert "matmul_precision: 'highest' there, 'high' now" in told
    onwards = tmp_path / "onwards"
    run("finetune", "--from", out, *NOISY, *SHORT, "--out", onwards)
    assert json.loads((onwards / "config.json").read_text())["model_options"] == config["model_options"]
