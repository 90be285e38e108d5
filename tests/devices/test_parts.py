"""What several processes hold in parts, as far as one process can play them."""

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxtransfer as jt
from jaxtransfer.devices import parts, processes
from jaxtransfer.devices.placement_table import state_table
from jaxtransfer.runs import arrays, checkpoints, collective
from jaxtransfer.runs.checkpoints import Checkpoints, DamagedCheckpointError, fill, read
from jaxtransfer.train import fingerprint


def a_state(mesh, seed=0, step=2):
    """A state with split leaves, whole ones, keys, and types that files know less of."""
    draw = np.random.default_rng(seed)

    def put(shape, *spec, dtype=np.float32):
        return jax.device_put(draw.normal(size=shape).astype(dtype), NamedSharding(mesh, P(*spec)))

    def some():
        split = {"rows": put((8, 3), "data"), "columns": put((3, 8), None, "data", dtype=jax.numpy.bfloat16)}
        return {"model": {**split, "whole": put((5,))}}

    whole = NamedSharding(mesh, P())
    return jt.TrainState(*jax.device_put((np.int32(step), jax.random.key(seed)), whole), some(), {}, {"mu": some()})


def same_bits(got, want):
    for path, leaf in jt.tree.leaves_by_path(want).items():
        other = jt.tree.leaves_by_path(got)[path]
        one, two = (jax.random.key_data(x) if processes.is_key(x) else x for x in (leaf, other))
        assert (two.dtype, two.shape) == (one.dtype, one.shape), path
        assert np.asarray(two).tobytes() == np.asarray(one).tobytes(), path


@pytest.fixture
def in_parts(monkeypatch):
    """Takes what is split for what is split over processes, so that it is saved as theirs is."""

    def is_split(leaf):
        return isinstance(leaf, jax.Array) and not leaf.is_fully_replicated

    for module in (arrays, checkpoints, fingerprint):
        monkeypatch.setattr(module, "is_split", is_split)


def saved(folder, mesh, steps=(1, 2)):
    store = Checkpoints(folder, keep=10)
    for step in steps:
        store.save(step, a_state(mesh, step, step), {"note": step})
    store.close()
    return folder


def test_what_is_saved_in_parts_is_read_in_any_parts_bit_by_bit(mesh_of, in_parts, tmp_path):
    mesh, want = mesh_of(4), a_state(mesh_of(4), 2, 2)
    found = read(saved(tmp_path, mesh))
    assert (found.step, found.meta) == (2, {"step": 2, "note": 2})
    assert all(type(leaf) is np.ndarray for leaf in found.leaves.values())
    same_bits(fill(jax.device_get(a_state(mesh)), found.leaves), want)
    for other in (mesh, mesh_of(2)):
        like, store = a_state(other), Checkpoints(tmp_path)
        got = fill(like, store.restore(like).leaves)
        same_bits(got, want)
        split = got.params["model"]["rows"]
        assert split.sharding == like.params["model"]["rows"].sharding
        store.close()
    assert not list(tmp_path.glob(".writing-*"))


def test_the_copies_are_of_the_moment(mesh_of, in_parts, tmp_path):
    state, store = a_state(mesh_of(4), 2, 2), Checkpoints(tmp_path)
    store.save(2, state, {})
    jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0, state), donate_argnums=0)(state.params)
    store.close()
    same_bits(fill(jax.device_get(a_state(mesh_of(4))), read(tmp_path).leaves), a_state(mesh_of(4), 2, 2))


def test_damage_of_any_file_is_named_and_the_one_before_is_used(mesh_of, in_parts, tmp_path):
    saved(tmp_path / "c", mesh_of(4))
    newest = tmp_path / "c" / "step_000000002"
    names = json.loads((newest / "digests.json").read_text())
    assert sum("ocdbt.process_0/d/" in name for name in names) > 1
    for number, name in enumerate(names):
        folder = shutil.copytree(tmp_path / "c", tmp_path / "copy")
        file = folder / "step_000000002" / name
        content = bytearray(file.read_bytes())
        if number % 3 == 0:
            file.unlink()
        elif number % 3 == 1:
            file.write_bytes(content[: len(content) // 2])
        else:
            content[len(content) // 2] ^= 4
            file.write_bytes(content)
        with pytest.raises(DamagedCheckpointError, match=name):
            read(folder)
        store = Checkpoints(folder)
        with pytest.warns(UserWarning, match="set aside as .*damaged-1"):
            assert store.restore(a_state(mesh_of(4))).step == 1
        store.close()
        shutil.rmtree(folder)


@pytest.mark.parametrize("place", ["begin", "own_part", "finish", "commit"])
def test_a_part_that_can_not_be_written_leaves_what_was_there(mesh_of, in_parts, tmp_path, monkeypatch, place):
    saved(tmp_path, mesh_of(4))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(*_):
        raise OSError(28, os.strerror(28))

    store = Checkpoints(tmp_path, keep=10)
    with monkeypatch.context() as patched:
        patched.setattr(collective if place == "commit" else arrays, place, full)
        store.save(3, a_state(mesh_of(4), 3, 3), {})
        with pytest.raises(jt.InputError, match=r"could not save step 3 .*No space left on device; earlier check"):
            store.wait()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    store.save(3, a_state(mesh_of(4), 3, 3), {})
    store.close()
    assert store.steps() == [1, 2, 3]


def test_a_part_that_is_not_finite_is_not_saved(mesh_of, in_parts, tmp_path):
    state, store = a_state(mesh_of(4)), Checkpoints(tmp_path)
    bad = np.where(np.arange(24).reshape(8, 3) == 16, np.nan, 1).astype(np.float32)
    bad = jax.device_put(bad, state.params["model"]["rows"].sharding)
    with pytest.raises(jt.NonFiniteLossError, match="params/model/rows is not finite after step 7"):
        store.save(7, state._replace(params={"model": {**state.params["model"], "rows": bad}}), {})
    store.close()
    assert store.steps() == []


def test_parts_have_the_fingerprint_of_the_whole(mesh_of, in_parts):
    state = a_state(mesh_of(4))
    grid = NamedSharding(mesh_of(2, 2), P("model", "data"))
    values = {**state.params["model"], "large": jax.device_put(np.arange(48.0 * 40).reshape(48, 40), grid)}
    values["counts"] = jax.device_put(np.arange(8), NamedSharding(mesh_of(4), P("data")))
    got, want = fingerprint.of_tree(values), {name: fingerprint.of_array(leaf) for name, leaf in values.items()}
    assert got.keys() == want.keys()
    assert fingerprint.same(got, want)
    moved = {**values, "large": jax.device_put(np.arange(48.0 * 40)[::-1].reshape(48, 40), grid)}
    assert not fingerprint.same(fingerprint.of_tree(moved), want)
    large = np.arange(1030.0 * 4100).reshape(1030, 4100)  # more than a block of the directions
    places = [
        (rows, columns) for rows in (slice(0, 515), slice(515, 1030)) for columns in (slice(0, 7), slice(7, 4100))
    ]
    sums = np.sum([fingerprint._squares_and_projection(large[at], at, large.shape) for at in places], axis=0)
    norm, projection = fingerprint.of_array(large)[1:]
    assert np.sqrt(sums[0]) == pytest.approx(norm, rel=1e-9)
    assert sums[1] == pytest.approx(projection, abs=1e-9 * norm)


@dataclasses.dataclass(frozen=True)
class Device:
    process_index: int
    number: int


@pytest.mark.parametrize(
    ("held", "own"),
    [
        ([(0, 0, 1), (0, 1, 2), (1, 2, 3), (1, 3, 4)], True),
        ([(0, 0, 2), (0, 0, 2), (1, 2, 4), (1, 2, 4)], True),  # layers within a process
        ([(0, 0, 1), (1, 1, 2), (0, 2, 3), (1, 3, 4)], False),  # rows in another order
        ([(0, 0, 2), (0, 2, 4), (1, 0, 2), (1, 2, 4)], False),  # layers over processes
        ([(1, 0, 1), (1, 1, 2), (0, 2, 3), (0, 3, 4)], False),
    ],
)
def test_whether_a_process_makes_the_rows_that_its_devices_hold(monkeypatch, held, own):
    class Split:
        def devices_indices_map(self, shape):
            assert shape == (4,)
            return {Device(who, number): (slice(*rows),) for number, (who, *rows) in enumerate(held)}

    monkeypatch.setattr(processes, "count", lambda: 2)
    assert parts.own_rows(Split(), 4) is own


def test_the_table_of_a_state_has_a_row_for_each_of_its_parts(mesh_of):
    state = a_state(mesh_of(4))
    lines = [line.split() for line in state_table(state).splitlines()]
    assert lines[1] == ["model/columns", "bfloat16[3,", "8]", "-,", "data", "12", "48"]
    assert [line[-2:] for line in lines[-2:]] == [["56", "164"], ["56", "164"]]
    assert " ".join(lines[-1][:4]) == "state of the optimiser"
