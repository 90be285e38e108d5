"""Weights that are split over devices: the same numbers, a part of the memory, and nothing moved that needn't be."""

import collections
import logging
import re
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxtransfer as jt
from jaxtransfer.devices.sharding import Shards
from jaxtransfer.representation.inference import Inference

MODEL = jt.models.mlp(8, hidden=(64, 128))
OBJECTIVE = jt.classification(MODEL)
ADAM = optax.adam(1e-2)
FSDP = {".*": jt.devices.fsdp("data", smallest=64)}
SIZES = {"stage1": (16, 64), "stage2": (64, 128), "head": (128, 8)}


def batch(seed, rows=8, shape=(16,)):
    draw = np.random.default_rng(seed)
    return {
        "image": draw.normal(size=(rows, *shape)).astype(np.float32),
        "label": draw.integers(0, 8, rows).astype(np.int32),
    }


def begun(mesh=None, shard=None, objective=OBJECTIVE, **more):
    return jt.init(objective, ADAM, 0, batch(0), mesh=mesh, shard=shard, **more)


def trained(mesh, shard):
    state, step = begun(mesh, shard), jt.train_step(OBJECTIVE, ADAM, mesh=mesh, shard=shard)
    for number in range(3):
        state, metrics = step(state, batch(number))
    return state, metrics, step


@pytest.fixture(scope="module")
def whole():
    return trained(None, None)


def specs(tree):
    return {path: tuple(leaf.sharding.spec) for path, leaf in jt.tree.leaves_by_path(tree).items()}


def collectives(text):
    names = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
    return collections.Counter(re.findall(rf" = [^\n]*? ({names})(?:-start)?\(", text))


def close(got, want, **tolerance):
    chex.assert_trees_all_close(jax.device_get(got), jax.device_get(want), **tolerance)


@pytest.mark.slow
def test_a_split_run_is_the_whole_one(mesh_of, whole, caplog):
    mesh, (want, told, _) = mesh_of(4), whole
    state, step = begun(mesh, FSDP), jt.train_step(OBJECTIVE, ADAM, mesh=mesh, shard=FSDP)
    lies, at_first = specs(state), state
    state, _ = step(state, batch(0))
    assert specs(state) == lies
    assert lies["params/model/stage2/kernel"] == (None, "data")
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(at_first.params))  # donated
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for number in (1, 2):
            state, metrics = step(state, batch(number))
    assert not re.search("Compiling (jit[(_])?update", caplog.text)
    close(state.params, want.params, rtol=0, atol=1e-5)
    close(state.opt_state, want.opt_state, rtol=0, atol=1e-5)
    close(metrics, told, rtol=1e-5)


def test_a_device_holds_its_part_alone_and_weights_are_gathered(mesh_of):
    mesh, programs = mesh_of(4), {}
    for name, shard in (("whole", None), ("split", FSDP)):
        step = jt.train_step(OBJECTIVE, ADAM, mesh=mesh, shard=shard)
        programs[name] = step.lower(begun(mesh, shard), batch(0)).compile()
    moved = collectives(programs["split"].as_text())
    assert set(moved) <= {"all-gather", "all-reduce", "reduce-scatter"}, moved
    assert moved["all-gather"] >= 5, moved
    memory = {name: program.memory_analysis() for name, program in programs.items()}
    rows = 2 * (16 + 1) * 4  # of a batch, on each device
    scalars = 4 + 8 + 4  # the step, the key, Adam's count
    biases = 3 * 8 * 4  # of the head, below the smallest size, with their moments
    numbers = 3 * 4 * sum(a * b + b for a, b in SIZES.values())
    assert memory["whole"].argument_size_in_bytes == numbers + scalars + rows
    assert memory["split"].argument_size_in_bytes == (numbers - biases) // 4 + biases + scalars + rows
    assert memory["split"].alias_size_in_bytes == memory["split"].argument_size_in_bytes - rows


@pytest.mark.slow
def test_a_split_transformer_is_the_whole_one(mesh_of, x64):
    model = jt.models.vit(16, 1, 2, 8, patch=4, dtype=jnp.float64, param_dtype=jnp.float64)
    objective, mesh, states = jt.classification(model), mesh_of(4), []
    for shard in (None, FSDP):
        state = jt.init(objective, ADAM, 0, batch(0, shape=(8, 8, 3)), mesh=mesh, shard=shard)
        step = jt.train_step(objective, ADAM, mesh=mesh, shard=shard)
        if shard:
            moved = collectives(step.lower(state, batch(0, shape=(8, 8, 3))).compile().as_text())
            assert set(moved) <= {"all-gather", "all-reduce", "reduce-scatter"}, moved
        for number in range(2):
            state, _ = step(state, batch(number, shape=(8, 8, 3)))
        states.append(state.params)
    close(*states, rtol=0, atol=1e-9)


def test_axes_of_partition_specs_alone_hold_parts_of_layers(mesh_of, whole):
    mesh, (want, told, _) = mesh_of(2, 2), whole
    rules = {"stage2/kernel": P(None, "model"), "stage2/bias": ("model",), "head/kernel": ("model", None), ".*": None}
    state, metrics, step = trained(mesh, rules)
    assert step.placement.split.spec == P(("data",))
    assert specs(state)["params/model/stage2/kernel"] == (None, "model")
    assert specs(state)["opt_state/0/mu/model/head/kernel"] == ("model",)
    assert specs(state)["params/model/stage1/kernel"] == ()
    close(state.params, want.params, rtol=0, atol=1e-5)
    close(metrics, told, rtol=1e-5)
    with pytest.raises(jt.InputError, match="3 rows for 2 devices"):
        step(state, batch(0, rows=3))


def test_what_is_drawn_and_what_is_given_begin_in_parts(mesh_of):
    mesh, whole = mesh_of(4), begun()
    state = begun(mesh, FSDP)
    close(state.params, whole.params, rtol=1e-6, atol=1e-7)
    for path, leaf in jt.tree.leaves_by_path(state).items():
        parts = {shard.data.shape for shard in leaf.addressable_shards}
        assert parts == {leaf.sharding.shard_shape(leaf.shape)}, path
        assert len(leaf.addressable_shards) == 4, path
    assert state.opt_state[0].nu["model"]["stage2"]["kernel"].addressable_shards[0].data.shape == (64, 32)
    from_host = begun(mesh, FSDP, params=jax.device_get(whole.params))
    from_parts = begun(mesh, FSDP, params=from_host.params)
    for got in (from_host, from_parts):
        chex.assert_trees_all_equal(jax.device_get(got.params), jax.device_get(whole.params))
        assert specs(got) == specs(state)
    jt.train_step(OBJECTIVE, ADAM, mesh=mesh, shard=FSDP)(from_parts, batch(0))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(from_host))  # of which it was a copy


@pytest.mark.slow
def test_averages_and_frozen_trees_lie_as_the_parameters_do_and_queues_are_whole(mesh_of):
    mesh = mesh_of(4)
    teacher = jt.frozen(jt.models.mlp(8, hidden=(256,), name="teacher"), {"params": teacher_weights()})
    anchor = jax.device_get(begun().params)
    objective = jt.distillation(MODEL, teacher) + jt.l2_sp(anchor) + jt.averaged(jt.ema(MODEL, 0.9))
    states = []
    for shard in (None, FSDP):
        state = begun(mesh, shard, objective)
        step = jt.train_step(objective, ADAM, mesh=mesh, shard=shard)
        for number in range(2):
            state, _ = step(state, batch(number))
        states.append(state)
        if shard:
            split = step.placement.frozen(objective.frozen, state.params)
            moved = collectives(step.lower(state, batch(0)).compile().as_text())
            assert set(moved) <= {"all-gather", "all-reduce", "reduce-scatter"}, moved
    lies = specs(states[1].state)
    assert [spec for path, spec in lies.items() if path.endswith("params/stage2/kernel")] == [(None, "data")]
    lies = [spec for tree in split for path, spec in specs(tree).items() if path.endswith("stage1/kernel")]
    assert lies == [(None, "data"), (None, "data")]  # the teacher's by the pattern, the anchor's as the parameter
    close(states[1].params, states[0].params, rtol=0, atol=1e-5)
    close(states[1].state, states[0].state, rtol=0, atol=1e-5)


def teacher_weights():
    draw, sizes = np.random.default_rng(3), {"stage1": (16, 256), "head": (256, 8)}
    return {
        name: {"kernel": draw.normal(size=size).astype(np.float32) / 4, "bias": np.zeros(size[1], np.float32)}
        for name, size in sizes.items()
    }


def test_what_follows_goes_by_path_and_shape(mesh_of):
    shards = Shards({"a/kernel": ("data",), "b/kernel": (None, "data"), ".*": None}, mesh_of(4))
    kernel, other = np.zeros((8, 4)), np.zeros((8, 8))
    params = {"one": {"a": {"kernel": kernel}, "b": {"kernel": kernel}}, "two": {"b": {"kernel": other}}}
    values = {
        "whole path": {"one": {"a": {"kernel": kernel}}},
        "no model": {"params": {"b": {"kernel": kernel}, "a": {"kernel": kernel}}},
        "another shape": {"one": {"a": {"kernel": np.zeros(8)}}},
        "a queue": np.zeros((8, 4)),
    }
    got = {path: tuple(one.spec) for path, one in jt.tree.leaves_by_path(shards.follow(values, params)).items()}
    assert got == {
        "whole path/one/a/kernel": ("data",),
        "no model/params/b/kernel": (None, "data"),
        "no model/params/a/kernel": ("data",),
        "another shape/one/a/kernel": (),
        "a queue": (),
    }
    frozen = shards.follow({"b": {"kernel": np.zeros((3, 12))}, "a": {"kernel": np.zeros(3)}}, params, frozen=True)
    assert (frozen["b"]["kernel"].spec, frozen["a"]["kernel"].spec) == (P(None, "data"), P())


@pytest.mark.parametrize(
    ("rule", "shape", "want"),
    [
        ("data", (8, 12), (None, "data")),
        ("data", (12, 12), ("data",)),  # the first of equals
        ("data", (9, 4), (None, "data")),  # the largest that divides
        (jt.devices.fsdp("data", smallest=1), (9, 4, 8), (None, None, "data")),
        (jt.devices.fsdp("data", smallest=1), (9, 7), ()),
        (jt.devices.fsdp("data"), (31, 32), ()),
        (jt.devices.fsdp("data"), (32, 32), ("data",)),
        (jt.devices.fsdp("data", smallest=0), (), ()),
        (P("model", "data"), (2, 4), ("model", "data")),
        ((("data", "model"), None), (16, 3), (("data", "model"),)),
        ([None, "model"], (3, 2, 5), (None, "model")),
        (None, (8, 8), ()),
    ],
)
def test_a_rule_splits_a_shape(rule, shape, want):
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    shards = Shards({".*": rule}, mesh)
    assert shards.params({"model": {"kernel": np.zeros(shape)}}) == {"model/kernel": P(*want)}


@pytest.mark.parametrize(
    ("shard", "line"),
    [
        ({".*": "data"}, "'model/head/bias', by '.\\*', has shape .6,., of which nothing divides by the 4 devices"),
        ({"head/kernel": (None, "data"), ".*": None}, "shape .128, 6., of which 6 doesn't divide by the 4 devices"),
        ({"head": (None, None, "data"), ".*": None}, "shape .6,., and the rule an entry for each of 3 dimensions"),
        ({"haed": "data", ".*": None}, "the pattern 'haed' selects no parameter; there are model/head/bias"),
        ({"kernel": "data"}, "must cover every parameter, but leave out 'model/head/bias'; add a last one"),
        ({".*": "rows"}, "the mesh has no axis 'rows'; it has data"),
        ({".*": ("data", "data")}, "splits by an axis twice"),
        ({".*": 4}, "an axis of the mesh, jt.devices.fsdp.axis., a PartitionSpec .* got 4"),
        ({}, "shard is a dict of patterns"),
        (jt.devices.fsdp("data"), "shard is a dict of patterns"),
        ({"(": "data"}, "no regular expression"),
    ],
)
def test_rules_that_can_not_be_followed_are_refused(mesh_of, shard, line):
    objective = jt.classification(jt.models.mlp(6, hidden=(128,)))
    with pytest.raises(jt.InputError, match=line) as error:
        jt.init(objective, ADAM, 0, {**batch(0), "label": np.arange(8) % 6}, mesh=mesh_of(4), shard=shard)
    assert "\n" not in str(error.value)


def test_where_nothing_can_be_split_it_says_so(mesh_of):
    with pytest.raises(jt.InputError, match="shard names axes of a mesh: give mesh="):
        jt.train_step(OBJECTIVE, ADAM, shard=FSDP)
    with pytest.raises(jt.InputError, match=r"shard splits weights in one program.*'jit'"):
        jt.train_step(OBJECTIVE, ADAM, mesh=mesh_of(4), mode="pmap", shard=FSDP)
    with pytest.raises(jt.InputError, match=r"without rules.*shard=\{pattern: axis\}"):
        jt.train_step(OBJECTIVE, ADAM, mesh=mesh_of(4))(begun(mesh_of(4), FSDP), batch(0))


@pytest.mark.slow
def test_evaluation_of_split_weights_is_that_of_whole_ones(mesh_of):
    state, several = begun(), [batch(1), batch(2)]
    want = jt.evaluate(OBJECTIVE, state, several)
    for where in ({}, {"mesh": mesh_of(4), "shard": FSDP}):
        got = jt.evaluate(OBJECTIVE, begun(mesh_of(4), FSDP), several, **where)
        assert got == pytest.approx(want, rel=1e-5)
    got = jt.evaluate(OBJECTIVE, jt.TrainState.of(state.params), several, mesh=mesh_of(4), shard=FSDP)
    assert got == pytest.approx(want, rel=1e-5)


def test_a_scaled_loss_keeps_its_optimiser_split(mesh_of):
    optimizer, states = jt.optim.loss_scaled(ADAM), []
    for mesh, shard in ((None, None), (mesh_of(4), FSDP)):
        state = jt.init(OBJECTIVE, optimizer, 0, batch(0), mesh=mesh, shard=shard)
        state, metrics = jt.train_step(OBJECTIVE, optimizer, mesh=mesh, shard=shard)(state, batch(0))
        states.append((state.params, state.opt_state, metrics))
    moments = [spec for path, spec in specs(states[1][1]).items() if path.endswith("u/model/stage2/kernel")]
    assert moments == [(None, "data")] * 2
    close(states[1], states[0], rtol=1e-5, atol=1e-5)


def test_weights_that_are_split_embed_where_they_lie(mesh_of):
    split, whole = begun(mesh_of(4), FSDP), begun()
    several = [batch(1), batch(2)]
    got, want = (jt.representation.embed(MODEL, {"params": state.params["model"]}, several) for state in (split, whole))
    np.testing.assert_allclose(got.features, want.features, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(got.labels, want.labels)


class Stop(Exception):
    pass


def test_a_split_run_goes_on_to_the_same_bits_and_on_other_devices(mesh_of, tmp_path):
    def fit(out, mesh, shard, log=None):
        data = [batch(number) for number in range(4)]
        options = {"steps": 4, "log_every": 1, "save_every": 2, "mesh": mesh, "shard": shard, "log": log}
        return jt.fit(OBJECTIVE, ADAM, data, key=1, out=out, progress=False, **options).state

    def stop(record):
        if record["step"] == 3:
            raise Stop

    want = fit(tmp_path / "unbroken", mesh_of(4), FSDP)
    with pytest.raises(Stop):
        fit(tmp_path / "stopped", mesh_of(4), FSDP, log=stop)
    other_rules = {"kernel": ("data",), ".*": None}
    for number, (mesh, shard) in enumerate([(mesh_of(4), FSDP), (mesh_of(2), other_rules), (None, None)]):
        out = shutil.copytree(tmp_path / "stopped", tmp_path / str(number))
        got = fit(out, mesh, shard)
        assert int(got.step) == 4
        if number == 0:
            assert specs(got) == specs(want)
            chex.assert_trees_all_equal(jax.device_get(got.params), jax.device_get(want.params))
            chex.assert_trees_all_equal(jax.device_get(got.opt_state), jax.device_get(want.opt_state))
        elif number == 1:
            kernel = got.params["model"]["stage2"]["kernel"]
            assert kernel.sharding.shard_shape(kernel.shape) == (32, 128)
        close(got.params, want.params, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "shard", "stored"),
    [((4,), FSDP, 32), ((2, 2), {"stage./kernel": (None, "model"), ".*": None}, 64), ((4,), None, 128)],
    ids=["fsdp", "layers", "whole"],
)
def test_features_of_a_split_model_are_those_of_the_whole(mesh_of, whole, sizes, shard, stored):
    params = jax.device_get(whole[0].params["model"])
    batches = [{**batch(number), "mask": np.float32(np.arange(8) < 8 - number)} for number in range(3)]
    deep = np.concatenate([one["image"] for one in batches])[np.concatenate([one["mask"] for one in batches]) > 0]
    for stage in ("stage1", "stage2"):
        deep = np.maximum(deep @ params[stage]["kernel"] + params[stage]["bias"], 0)
    place = {"mesh": mesh_of(*sizes), "shard": shard}
    kernel = Inference(MODEL, **place).variables({"params": params})["params"]["model"]["stage2"]["kernel"]
    part = kernel.sharding.shard_shape(kernel.shape)
    assert part == (64, stored)
    got = jt.representation.embed(MODEL, {"params": params}, batches, **place)
    np.testing.assert_allclose(got.features, deep, rtol=1e-4, atol=1e-5)
    data = jt.data.Dataset.from_columns({"features": deep[:, :16].astype(np.float32)})
    want = jt.features(MODEL, {"params": params}, data, {"scores": "logits"}, batch_size=8)
    split = jt.features(MODEL, {"params": params}, data, {"scores": "logits"}, batch_size=8, **place)
    np.testing.assert_allclose(split.column("scores"), want.column("scores"), rtol=1e-4, atol=1e-5)
    with pytest.raises(jt.InputError, match="a batch must divide by the devices"):
        jt.features(MODEL, {"params": params}, data, {"scores": "logits"}, batch_size=7, **place)


@pytest.mark.slow
def test_steps_in_one_call_stay_split(mesh_of):
    data, mesh = batch(5, rows=32), mesh_of(4)

    def sample(key, data):
        return jax.tree.map(lambda rows: rows[jax.random.permutation(key, 32)[:8]], data)

    options = {"sample": sample, "steps_per_call": 3, "mesh": mesh}
    want, _ = jt.train_step(OBJECTIVE, ADAM, **options)(begun(), data)
    got, _ = jt.train_step(OBJECTIVE, ADAM, shard=FSDP, **options)(begun(mesh, FSDP), data)
    assert specs(got) == specs(begun(mesh, FSDP))
    close(got.params, want.params, rtol=0, atol=1e-5)


def test_the_table_tells_who_lives_where(mesh_of):
    mesh = mesh_of(2, 2)
    put = lambda shape, *spec: jax.device_put(np.zeros(shape, np.float32), NamedSharding(mesh, P(*spec)))  # noqa: E731
    tree = {"a": put((4, 6), None, "model"), "b": put((8,), ("data", "model")), "c": np.zeros(3, np.int64)}
    assert [line.split() for line in jt.devices.placement_table(tree).splitlines()] == [
        ["leaf", "type", "split", "per", "device", "whole"],
        ["a", "float32[4,", "6]", "-,", "model", "48", "96"],
        ["b", "float32[8]", "data", "x", "model", "8", "32"],
        ["c", "int64[3]", "whole", "24", "24"],
        ["in", "all,", "4", "devices", "80", "152"],
    ]
