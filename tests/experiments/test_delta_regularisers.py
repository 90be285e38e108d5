"""Every regulariser makes an objective over weights that start at the pretrained ones; all train in the tiny form."""

import jax
import numpy as np
import pytest

import jaxtransfer as jt
from experiments import delta_regularisers, finetune_cifar100
from experiments.delta_regularisers import METHODS, Regularisers
from experiments.finetune_cifar100 import Bench, Kit, settled

pytestmark = pytest.mark.usefixtures("offline")
OWN = ("ewc", "delta", "delta-attention", "bss", "co-tuning", "bi-tuning", "stoch-norm")


@pytest.mark.slow
def test_all_of_them_train(tmp_path, monkeypatch):
    monkeypatch.setattr(finetune_cifar100, "device_mesh", lambda: None)  # to compile for eight devices takes long
    results = delta_regularisers.main(Regularisers(out=tmp_path, tiny=True, methods=OWN))
    assert list(results["accuracy"]["5"]) == list(OWN)
    assert all(0 <= one <= 100 for by_seed in results["accuracy"]["5"].values() for one in by_seed.values())
    assert "| co-tuning |" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["delta", "bss", "co-tuning", "bi-tuning", "stoch-norm"])
def test_each_begins_at_the_pretrained_weights(tmp_path, method):
    """Its terms fit the model and the batch, which shapes alone tell."""
    bench = Bench(settled(Regularisers(out=tmp_path, tiny=True, methods=(method,)), METHODS), METHODS)
    rows = bench.rows(5, 0)
    kit = Kit(bench.model, bench.pretrained, bench.experiment, 3, bench=bench, rows=rows)
    objective, optimizer, start, model, _ = METHODS[method](kit)
    name = bench.model.name
    assert model is None or model.name == name
    body = start["params"].get("encoder", start["params"])
    for path, leaf in jt.tree.leaves_by_path(body).items():
        if not path.startswith("head"):
            np.testing.assert_array_equal(leaf, jt.tree.leaves_by_path(bench.pretrained["params"])[path])
    batch = bench.train_data.read(rows[:4])
    batch["image2"] = batch["image"]

    def loss(params, state):
        ctx = jt.Context(0, jax.random.key(0), {handle: handle.tree for handle in objective.frozen})
        return objective(params, state, batch, ctx)[0]

    params = {name: start["params"]}
    state = {name: {kind: value for kind, value in start.items() if kind != "params"}}
    _, own = objective.init(jax.random.key(0), batch)
    state = {**own, **state}
    value, slope = jax.eval_shape(jax.value_and_grad(loss), params, state)
    assert value.shape == ()
    assert jax.tree.structure(slope) == jax.tree.structure(params)
    jax.eval_shape(optimizer.init, params)
