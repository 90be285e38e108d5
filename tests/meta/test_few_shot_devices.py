"""Few-shot learners over devices: the same parameters, statistics and metrics, masks that differ between devices."""

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from tests.meta import few_shot_tasks as tasks
from tests.meta.few_shot_tasks import WAYS

KEY = jax.random.key(0)


class PairNet(nn.Module):
    """A linear layer with batch norm on a pair of maps, and a score."""

    axis: str | None = None

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        x = nn.Dense(3)(x.reshape(x.shape[0], -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, axis_name=self.axis)(x))
        return {"logits": nn.Dense(1)(x)}


@pytest.mark.slow
def test_tasks_split_over_devices_give_the_same_numbers(rng):
    batch, optimizer = tasks.images(rng), optax.sgd(0.1)
    model, pairs = jt.models.linen(tasks.Net()), jt.models.linen(PairNet(), name="relation")
    learners = {
        "prototypical": jt.meta.prototypical(model, ways=WAYS),
        "matching": jt.meta.matching(model, ways=WAYS),
        "relation": jt.meta.relation(model, pairs, ways=WAYS, output="maps"),
        "r2d2": jt.meta.r2d2(model, ways=WAYS),
        "linear_head": jt.meta.linear_head(model, ways=WAYS, optimizer=optax.sgd(0.1), steps=3),
    }
    objective = tasks.total(learners)
    mesh = jax.make_mesh((4,), ("tasks",), devices=jax.devices()[:4])

    def run(**kwargs):
        state = jt.init(objective, optimizer, KEY, batch)
        step, seen = jt.train_step(objective, optimizer, **kwargs), []
        for _ in range(3):
            state, metrics = step(state, batch)
            seen.append(metrics)
        return jax.device_get((state.params, state.state, seen))

    one = run()
    assert one[2][-1]["loss"] < one[2][0]["loss"]
    for mode in ("jit", "pmap"):
        for a, b in zip(*map(jax.tree.leaves, (one, run(mesh=mesh, mode=mode))), strict=True):
            assert np.max(np.abs(a - b)) <= 1e-5 * max(np.max(np.abs(a)), 1e-1)
