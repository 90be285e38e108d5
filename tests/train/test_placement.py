"""Where states may lie: what would go wrong in silence is refused."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxtransfer as jt

MODEL = jt.models.mlp(8, hidden=(16,))
OBJECTIVE = jt.classification(MODEL)
OPTIMIZER = optax.sgd(0.1)
BATCH = {"image": np.ones((8, 4), np.float32), "label": np.arange(8, dtype=np.int32)}


def state():
    return jt.init(OBJECTIVE, OPTIMIZER, jax.random.key(0), BATCH)


def split(tree, axis_type=AxisType.Auto):
    """The tree with its matrices split by columns over eight devices, the rest whole on each."""
    mesh = jax.make_mesh((8,), ("model",), axis_types=(axis_type,))
    return jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*((None, "model") if x.ndim == 2 else ())))),
        jax.tree.map(jnp.copy, tree),
    )


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_weights_that_are_split_over_devices_are_refused_by_name(mesh_of, mode, axis_type):
    where = {"mesh": mesh_of(4), "mode": mode}
    weights = split(state().params, axis_type)
    bad = state()._replace(params=weights)
    message = "leaf '{}' is split over 8 devices.*jax.device_get"
    whole_state = "state: " + message.format("params/model/head/kernel")
    with pytest.raises(jt.InputError, match=whole_state):
        jt.train_step(OBJECTIVE, OPTIMIZER, **where)(bad, BATCH)
    with pytest.raises(jt.InputError, match=whole_state):
        jt.evaluate(OBJECTIVE, bad, [BATCH], **where)
    with pytest.raises(jt.InputError, match="frozen weights: " + message.format("model/head/kernel")):
        jt.train_step(OBJECTIVE + jt.l2_sp(weights), OPTIMIZER, **where)(state(), BATCH)
    for options in ({"params": weights}, {"params": weights, **where}):  # a copy of them would be whole
        with pytest.raises(jt.InputError, match="params: " + message.format("model/head/kernel")):
            jt.fit(OBJECTIVE, OPTIMIZER, [BATCH], steps=1, **options)
    momentum = optax.sgd(0.1, momentum=0.9)
    start = jt.init(OBJECTIVE, momentum, jax.random.key(0), BATCH)
    step = jt.train_step(OBJECTIVE, momentum, **where)
    with pytest.raises(jt.InputError, match=r"state: leaf 'opt_state/.*kernel' is split"):
        step(start._replace(opt_state=split(start.opt_state, axis_type)), BATCH)


def test_weights_that_are_whole_wherever_they_lie_are_taken(mesh_of):
    want, _ = jt.train_step(OBJECTIVE, OPTIMIZER)(state(), BATCH)
    step = jt.train_step(OBJECTIVE, OPTIMIZER, mesh=mesh_of(4))
    on_eight = NamedSharding(jax.make_mesh((8,), ("x",)), PartitionSpec())
    for place in (jax.devices()[3], on_eight):
        got, _ = step(jax.device_put(state(), place), BATCH)
        chex.assert_trees_all_close(want.params, got.params, rtol=1e-5)
