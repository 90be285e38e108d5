"""The step: the same numbers on one device, on any mesh and under pmap; what it holds and what it gives up."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxtransfer as jt

KEY = jax.random.key(3)
PLACES = {"jit 2": ((2,), "jit"), "jit 4": ((4,), "jit"), "jit 2x2": ((2, 2), "jit"), "pmap 4": ((4,), "pmap")}


def images(rng, rows=16, side=8, classes=4, channels=3, dtype=np.float32):
    return {
        "image": rng.normal(size=(rows, side, side, channels)).astype(dtype),
        "label": rng.integers(0, classes, rows).astype(np.int32),
    }


def trained(objective, optimizer, batches, *, params=None, **place):
    """The state and the metrics after a step on each batch."""
    state = jt.init(objective, optimizer, KEY, batches[0], params=params)
    step, metrics = jt.train_step(objective, optimizer, **place), []
    for batch in batches:
        state, values = step(state, batch)
        metrics.append({name: float(value) for name, value in values.items()})
    return state, metrics


def distance(got, want):
    """max|difference| / max|value| over the leaves; a leaf at rounding noise is measured against the whole tree."""
    whole = np.sqrt(sum(float((np.asarray(leaf, np.float64) ** 2).sum()) for leaf in jax.tree.leaves(want)))
    noise = 1e-4 * whole
    worst = {}
    for path, leaf in jt.tree.leaves_by_path(want).items():
        leaf, other = np.asarray(leaf, np.float64), np.asarray(jt.tree.leaves_by_path(got)[path], np.float64)
        scale = np.abs(leaf).max()
        worst[path] = np.abs(leaf - other).max() / (scale if scale > noise else whole)
    path = max(worst, key=worst.get)
    return worst[path], path


@pytest.fixture(scope="module")
def reference():
    """Five steps of a convolutional net with batch norm on one device."""
    rng = np.random.default_rng(0)
    batches = [images(rng) for _ in range(5)]
    objective = jt.classification(jt.models.small_cnn(4, width=4)) + 0.01 * jt.l2()
    optimizer = optax.sgd(0.1)
    state, metrics = trained(objective, optimizer, batches)
    return objective, optimizer, batches, jax.tree.map(np.array, (state.params, state.state)), metrics


@pytest.mark.parametrize("place", [pytest.param("jit 2", marks=pytest.mark.slow), "jit 4", "jit 2x2", "pmap 4"])
def test_parity(reference, mesh_of, place):
    objective, optimizer, batches, want, want_metrics = reference
    shape, mode = PLACES[place]
    state, metrics = trained(objective, optimizer, batches, mesh=mesh_of(*shape), mode=mode)
    worst, path = distance((state.params, state.state), want)
    assert worst <= 1e-5, path
    for got, expected in zip(metrics, want_metrics, strict=True):
        assert got == pytest.approx(expected, rel=1e-5)
    assert int(state.step) == 5


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["jit", "pmap"])
@pytest.mark.parametrize("shape", [pytest.param((4,), marks=pytest.mark.slow), (2, 2)])
def test_batches_placed_on_an_explicit_mesh(reference, mesh_of, shape, mode):
    objective, optimizer, batches, want, _ = reference
    mesh = mesh_of(*shape)
    assert all(kind == jax.sharding.AxisType.Explicit for kind in mesh.axis_types)
    spec = PartitionSpec(mesh.axis_names) if mode == "jit" else PartitionSpec("data")
    placed = [jax.device_put(batch, NamedSharding(mesh, spec)) for batch in batches]
    got, _ = trained(objective, optimizer, placed, mesh=mesh, mode=mode)
    worst, path = distance((got.params, got.state), want)
    assert worst <= 1e-5, path
    assert all(not leaf.is_deleted() for leaf in jax.tree.leaves(placed))


def test_parity_needs_the_global_batch(reference, mesh_of):
    """The tolerance can tell: the statistics of a quarter of the batch are another result."""
    objective, optimizer, batches, want, _ = reference
    quarter = [{k: v[:4] for k, v in batch.items()} for batch in batches]
    state, _ = trained(objective, optimizer, quarter)
    assert distance((state.params, state.state), want)[0] > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("place", ["jit 4", "pmap 4"])
def test_masks_unevenly_over_the_devices(rng, mesh_of, place):
    batch = {"image": rng.normal(size=(8, 3)).astype(np.float32), "label": np.arange(8) % 3}
    batch["mask"] = np.array([1, 1, 1, 0, 0, 0, 0, 0], np.float32)  # two devices without an example
    objective, optimizer = jt.classification(jt.models.mlp(3, hidden=(5,))) + 0.1 * jt.l2(), optax.sgd(0.5)
    shape, mode = PLACES[place]
    want, want_metrics = trained(objective, optimizer, [{k: v[:3] for k, v in batch.items()}])
    got, metrics = trained(objective, optimizer, [batch], mesh=mesh_of(*shape), mode=mode)
    assert distance(got.params, want.params)[0] <= 1e-5
    assert metrics[0] == pytest.approx(want_metrics[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "side"), [(0, 16), (0, 32), (1, 32), (2, 32)])
def test_parity_of_resnet20_single_precision(mesh_of, seed, side):
    """The forward pass has the same bits everywhere, so that no ReLU opens on one mesh and not on another."""
    objective, optimizer = jt.classification(jt.models.resnet20(4)), optax.sgd(0.1)
    batches = [images(np.random.default_rng(seed), side=side)]
    want, _ = trained(objective, optimizer, batches)
    for place in ("jit 2", "jit 4", "pmap 4"):
        shape, mode = PLACES[place]
        got, _ = trained(objective, optimizer, batches, mesh=mesh_of(*shape), mode=mode)
        worst, path = distance((got.params, got.state), (want.params, want.state))
        assert worst <= 1e-5, (place, path)
        chex.assert_trees_all_equal(got.state, want.state)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("place", ["jit 2", "jit 4", "pmap 4"])
def test_parity_of_a_smooth_resnet20_single_precision(mesh_of, place, seed, monkeypatch):
    monkeypatch.setattr("flax.linen.relu", jax.nn.softplus)
    objective, optimizer = jt.classification(jt.models.resnet20(4)), optax.sgd(0.1)
    shape, mode = PLACES[place]
    batches = [images(np.random.default_rng(seed), side=32)]
    want, _ = trained(objective, optimizer, batches)
    got, _ = trained(objective, optimizer, batches, mesh=mesh_of(*shape), mode=mode)
    worst, path = distance((got.params, got.state), (want.params, want.state))
    assert worst <= 1e-5, path


@pytest.mark.slow
@pytest.mark.parametrize("place", ["jit 2", "jit 4", "pmap 4"])
def test_parity_of_resnet20_double_precision(rng, mesh_of, place, x64):
    model = jt.models.resnet20(4, param_dtype=jnp.float64, dtype=jnp.float64)
    objective, optimizer = jt.classification(model), optax.sgd(0.1)
    shape, mode = PLACES[place]
    batches = [images(rng, side=32, dtype=np.float64) for _ in range(5)]
    want, _ = trained(objective, optimizer, batches)
    got, _ = trained(objective, optimizer, batches, mesh=mesh_of(*shape), mode=mode)
    worst, path = distance((got.params, got.state), (want.params, want.state))
    assert worst <= 1e-6, path


@pytest.mark.slow
@pytest.mark.parametrize("place", ["one", *PLACES])
def test_a_run_may_start_at_its_own_anchor(rng, mesh_of, place):
    model, optimizer = jt.models.mlp(4, hidden=(6,)), optax.adam(0.1)
    batches = [images(rng, rows=8, side=2) for _ in range(3)]
    anchor, _ = jt.classification(model).init(jax.random.key(11), batches[0])
    kept = jax.tree.map(np.array, anchor)
    shape, mode = PLACES.get(place, (None, "jit"))
    mesh = None if shape is None else mesh_of(*shape)
    objective = jt.classification(model) + jt.l2_sp(anchor)
    state, metrics = trained(objective, optimizer, batches, params=anchor, mesh=mesh, mode=mode)
    assert metrics[0]["l2_sp"] == 0
    assert metrics[1]["l2_sp"] > 0
    chex.assert_trees_all_equal(kept, anchor)
    difference = jax.tree.map(lambda a, b: np.any(a != np.asarray(b)), kept, state.params)
    assert all(jax.tree.leaves(difference))


def test_the_state_is_donated_and_nothing_else(rng):
    model, optimizer = jt.models.mlp(4, hidden=(6,)), optax.adam(0.1)
    batch = jax.device_put(images(rng, rows=8, side=2))
    key = jax.random.key(4)
    anchor, _ = jt.classification(model).init(jax.random.key(11), batch)
    stored = {"params": jax.tree.map(jnp.copy, anchor["model"])}
    own = jt.Model(lambda key, inputs: stored, model.apply, "model", model.stages)  # whose init hands out its weights
    objective = jt.classification(own) + jt.l2_sp(anchor)
    state = jt.init(objective, optimizer, key, batch)
    step = jt.train_step(objective, optimizer)
    after, _ = step(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state, state.step)))
    untouched = (anchor, stored, batch, after)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(untouched))
    assert np.asarray(jax.random.key_data(key)).shape == (2,)  # the caller's key is still his
    jt.init(objective, optimizer, key, batch)
    again, _ = step(after, batch)
    assert int(again.step) == 2


def test_a_batch_that_does_not_divide_is_an_error_before_compilation(rng, mesh_of):
    traces = []
    model = jt.Model(
        lambda key, x: {"params": {"w": jnp.ones((2, 4))}},
        lambda v, x, *, train, key: (traces.append(1), ({"logits": x @ v["params"]["w"]}, {}))[1],
    )
    objective, optimizer = jt.classification(model), optax.sgd(0.1)
    batch = {"image": rng.normal(size=(6, 2)).astype(np.float32), "label": np.arange(6) % 4}
    for shape, mode in (((4,), "jit"), ((2, 2), "jit"), ((4,), "pmap")):
        state = jt.init(objective, optimizer, KEY, batch)
        traces.clear()
        step = jt.train_step(objective, optimizer, mesh=mesh_of(*shape), mode=mode)
        with pytest.raises(jt.InputError, match="'image' has 6 rows for 4 devices"):
            step(state, batch)
        with pytest.raises(jt.InputError, match="6 rows for 4 devices"):
            jt.evaluate(objective, state, [batch], mesh=mesh_of(*shape), mode=mode)
        assert traces == []
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    with pytest.raises(jt.InputError, match="mode is 'jit' or 'pmap'; got 'map'"):
        jt.train_step(objective, optimizer, mode="map")


def test_pmap_takes_all_devices_by_default(rng):
    batch = {"image": rng.normal(size=(8, 3)).astype(np.float32), "label": np.arange(8) % 3}
    objective, optimizer = jt.classification(jt.models.mlp(3, hidden=())), optax.sgd(0.1)
    state, _ = trained(objective, optimizer, [batch], mode="pmap")
    assert len(state.params["model"]["head"]["kernel"].sharding.device_set) == 8
    want, _ = trained(objective, optimizer, [batch])
    assert distance(state.params, want.params)[0] <= 1e-5


def test_the_optimizer_may_read_the_loss(rng):
    seen = optax.GradientTransformationExtraArgs(
        lambda params: jnp.zeros(()), lambda updates, state, params=None, *, value, **_: (updates, value)
    )
    batch = {"image": rng.normal(size=(8, 3)).astype(np.float32), "label": np.arange(8) % 3}
    objective = jt.classification(jt.models.mlp(3, hidden=()))
    state, metrics = trained(objective, optax.chain(seen, optax.sgd(0.1)), [batch])
    assert float(state.opt_state[0]) == pytest.approx(metrics[0]["loss"])


CONSTANT = re.compile(r"= (\w+)\[([\d,]*)\][^ ]* constant\(")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}


def largest_constant(text):
    found = [
        (BYTES.get(t, 4) * int(np.prod([int(d) for d in dims.split(",") if d]))) for t, dims in CONSTANT.findall(text)
    ]
    return max(found, default=0), len(found)


@pytest.mark.slow
def test_the_anchor_is_no_constant_of_the_program(rng):
    model, optimizer = jt.models.mlp(10, hidden=(2400, 2400)), optax.sgd(0.1)
    batch = {"image": rng.normal(size=(4, 1800)).astype(np.float32), "label": np.arange(4)}
    anchor, _ = jt.classification(model).init(KEY, batch)
    assert jt.tree.count(anchor) >= 10_000_000
    objective = jt.classification(model) + 0.1 * jt.l2_sp(anchor)
    state = jt.init(objective, optimizer, KEY, batch, params=anchor)
    text = jt.train_step(objective, optimizer).lower(state, batch).compile().as_text()
    size, count = largest_constant(text)
    assert count > 0  # the pattern finds the constants that there are
    assert size <= 1_000_000


def test_the_search_for_constants_finds_one():
    table = np.random.default_rng(0).normal(size=(600, 500)).astype(np.float32)
    with jax.enable_x64(False):
        jax.config.update("jax_captured_constants_warn_bytes", 10_000_000)
        try:
            text = jax.jit(lambda x: x @ jnp.asarray(table)).lower(np.ones((2, 600), np.float32)).compile().as_text()
        finally:
            jax.config.update("jax_captured_constants_warn_bytes", 1_000_000)
    assert largest_constant(text)[0] == 600 * 500 * 4


@pytest.mark.slow
def test_given_weights_must_fit(rng):
    model, optimizer = jt.models.mlp(4, hidden=(6,)), optax.sgd(0.1)
    batch = images(rng, rows=8, side=2)
    objective = jt.classification(model)
    params, _ = objective.init(KEY, batch)
    with pytest.raises(jt.InputError, match="no model is named 'other'"):
        jt.init(objective, optimizer, KEY, batch, params={"other": params["model"]})
    wrong = {"model": {**params["model"], "head": {"kernel": jnp.ones((6, 9)), "bias": jnp.ones(9)}}}
    with pytest.raises(jt.InputError, match=r"does not fit the model .*head/kernel: expected \(6, 4\), got \(6, 9\)"):
        jt.init(objective, optimizer, KEY, batch, params=wrong)
    reordered = {"model": dict(reversed(params["model"].items()))}
    state = jt.init(objective, optimizer, KEY, batch, params=jax.tree.map(np.asarray, reordered))
    chex.assert_trees_all_equal(state.params, params)


@pytest.mark.parametrize("batch", [{}, {"image": np.float32(1)}])
def test_a_batch_that_is_none_is_refused(batch):
    with pytest.raises(jt.InputError, match=r"batch of arrays|leading batch dimension"):
        jt.init(jt.classification(jt.models.mlp(3)), optax.sgd(0.1), KEY, batch)


def test_an_optimizer_that_copies_parameters_sees_the_transferred_ones(rng):
    model, batch = jt.models.mlp(4, hidden=()), images(rng, rows=8, side=2)
    objective = jt.classification(model)
    params, _ = objective.init(jax.random.key(8), batch)
    copies = optax.GradientTransformation(lambda p: p, lambda u, s, p=None: (u, s))
    state = jt.init(objective, copies, KEY, batch, params=params)
    chex.assert_trees_all_equal(state.opt_state, params)
    state, _ = jt.train_step(objective, copies)(state, batch)  # no buffer is donated twice
    chex.assert_trees_all_equal(state.opt_state, params)
