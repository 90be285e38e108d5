"""Checkpoints are whole or not there; what is damaged is found, set aside and written again."""

import errno
import json
import os
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import jaxtransfer as jt
from jaxtransfer.runs import checkpoints
from jaxtransfer.runs.checkpoints import Checkpoints, DamagedCheckpointError, fill, read


def a_state(seed=0, step=3):
    """A state with every kind of leaf: bfloat16, float16, integers, flags, scalars, an empty one, keys, Adam's."""
    rng = np.random.default_rng(seed)
    params = {
        "model": {
            "bf16": jnp.asarray(rng.normal(size=(3, 2)), jnp.bfloat16),
            "f16": jnp.asarray(rng.normal(size=4), jnp.float16),
            "f32": jnp.asarray(rng.normal(size=(2, 2, 2)), jnp.float32),
            "scalar": jnp.asarray(rng.normal(), jnp.float32),
            "empty": jnp.zeros((0, 3)),
        }
    }
    state = {"model": {"count": jnp.int32(seed), "flag": jnp.array([True, False]), "key": jax.random.key(seed + 9)}}
    opt_state = optax.adam(0.1).init(params)
    opt_state = jax.tree.map(lambda x: x + jnp.asarray(seed + 1, x.dtype), opt_state)
    return jt.TrainState(jnp.int32(step), jax.random.key(seed), params, state, opt_state)


def raw(leaf):
    return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for path, leaf in jt.tree.leaves_by_path(want).items():
        other = jt.tree.leaves_by_path(got)[path]
        assert other.dtype == leaf.dtype, path
        assert raw(other).tobytes() == raw(leaf).tobytes(), path
        assert raw(other).shape == raw(leaf).shape, path


def saved(folder, steps, **options):
    """Checkpoints of the states of those seeds."""
    store = Checkpoints(folder, **{"keep": 10, **options})
    for step in steps:
        store.save(step, a_state(step, step), {"note": f"step {step}"})
    store.wait()
    return store


def test_round_trip(tmp_path):
    store = saved(tmp_path / "c", [3])
    want = a_state(3, 3)
    found = store.restore()
    assert found.step == 3
    assert found.meta == {"step": 3, "note": "step 3"}
    assert found.leaves["params/model/bf16"].dtype == ml_dtypes.bfloat16
    assert_same(fill(a_state(0, 0), found.leaves), want)
    store.close()
    assert not list((tmp_path / "c").glob(".*"))


def test_what_is_restored_draws_and_trains_on_as_before(tmp_path, rng):
    model = jt.models.mlp(3, hidden=(4,))
    batch = {"image": rng.normal(size=(6, 2)).astype(np.float32), "label": np.arange(6) % 3}
    objective, optimizer = jt.classification(model), optax.adamw(0.1)
    step = jt.train_step(objective, optimizer)
    state, _ = step(jt.init(objective, optimizer, jax.random.key(0), batch), batch)
    store = Checkpoints(tmp_path)
    store.save(1, state, {})
    state, _ = step(state, batch)  # donates the saved one's buffers while it is being written
    store.close()
    like = jt.init(objective, optimizer, jax.random.key(99), batch)
    again, _ = step(fill(like, read(tmp_path).leaves), batch)
    assert_same(again, state)


def test_other_kinds_of_keys(tmp_path):
    store = Checkpoints(tmp_path)
    state = {"key": jax.random.key(1, impl="rbg"), "keys": jax.random.split(jax.random.key(2), 3)}
    store.save(1, state, {})
    store.close()
    like = {"key": jax.random.key(0, impl="rbg"), "keys": jax.random.split(jax.random.key(0), 3)}
    restored = fill(like, read(tmp_path).leaves)
    assert_same(restored, state)
    assert jax.random.key_impl(restored["key"]) == jax.random.key_impl(state["key"])


@pytest.mark.parametrize(("keep", "scores", "kept"), [
    (1, {}, [6]),
    (2, {}, [5, 6]),
    (10, {}, [1, 2, 3, 4, 5, 6]),
    (2, {1: 0.5, 2: 0.9, 3: 0.1}, [2, 5, 6]),
    (2, {2: 0.9, 4: 0.9, 6: 0.9}, [2, 5, 6]),  # of equals the earliest
    (1, {1: -3.0, 3: -2.0, 6: -2.5}, [3, 6]),
    (2, {1: 0.1, 6: 0.7}, [5, 6]),
])  # fmt: skip
def test_the_newest_and_the_best_are_kept(tmp_path, keep, scores, kept):
    score = lambda meta: meta.get("score")  # noqa: E731
    store = Checkpoints(tmp_path, keep=keep, score=score)
    for step in range(1, 7):
        meta = {"score": scores[step]} if step in scores else {}
        store.save(step, {"w": jnp.full(2, float(step))}, meta)
    store.close()
    assert store.steps() == checkpoints.steps(tmp_path) == kept
    for step in kept:
        assert read(tmp_path, step).leaves["w"].tolist() == [step, step]
    best = max(scores, key=lambda s: (scores[s], -s)) if scores else None
    assert checkpoints.best(tmp_path, score) == best


def damage_all(folder):
    """Yields, for each file, a copy of the folder in which it is truncated, flipped, emptied or gone."""
    newest = folder / "step_000000002"
    names = [str(p.relative_to(newest)) for p in sorted(newest.rglob("*")) if p.is_file()]
    assert {"meta.json", "digests.json"} < set(names)
    assert len(names) > 3
    rng = np.random.default_rng(0)
    for name in names:
        for kind in ("truncated", "flipped", "missing"):
            copy = folder.parent / f"{kind}-{name.replace('/', '-')}"
            shutil.copytree(folder, copy)
            file = copy / "step_000000002" / name
            content = bytearray(file.read_bytes())
            if kind == "missing":
                file.unlink()
            elif not content:
                file.write_bytes(b"x")
            elif kind == "truncated":
                file.write_bytes(content[: len(content) // 2])
            else:
                content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
                file.write_bytes(content)
            yield f"{kind} {name}", copy


def test_damage_of_any_file_is_found_and_the_one_before_is_used(tmp_path):
    saved(tmp_path / "c", [1, 2]).close()
    cases = 0
    for name, folder in damage_all(tmp_path / "c"):
        cases += 1
        with pytest.raises(DamagedCheckpointError, match="step_000000002 is damaged"):
            read(folder)
        store = Checkpoints(folder)
        with pytest.warns(UserWarning, match=r"step_000000002 is damaged.*set aside as .*damaged-1"):
            found = store.restore()
        assert found.step == 1, name
        assert store.steps() == [1], name
        assert (folder / "step_000000002.damaged-1").is_dir()
        store.close()
        shutil.rmtree(folder)
    assert cases >= 15


@pytest.mark.slow
def test_a_damaged_step_is_written_again(tmp_path):
    saved(tmp_path, [1, 2]).close()
    for attempt in (1, 2):
        (tmp_path / "step_000000002" / "meta.json").write_text("{}")
        store = Checkpoints(tmp_path)
        with pytest.warns(UserWarning, match=f"damaged-{attempt}"):
            assert store.restore().step == 1
        store.save(2, a_state(7, 2), {"note": "again"})
        store.wait()
        assert read(tmp_path).step == 2
        assert read(tmp_path).meta["note"] == "again"
        assert_same(fill(a_state(), read(tmp_path).leaves), a_state(7, 2))
        store.close()


def test_all_damaged(tmp_path):
    saved(tmp_path, [1, 2]).close()
    for step in (1, 2):
        shutil.rmtree(tmp_path / f"step_{step:09d}" / "state")
    store = Checkpoints(tmp_path)
    with pytest.warns(UserWarning, match="set aside"):
        assert store.restore() is None
    assert store.steps() == []
    store.close()


def test_nothing_there(tmp_path):
    store = Checkpoints(tmp_path / "none")
    assert store.restore() is None
    assert store.steps() == []
    store.close()
    with pytest.raises(jt.InputError, match=r"expected a checkpoint in .*none; found none"):
        read(tmp_path / "none")
    saved(tmp_path / "c", [1, 4]).close()
    with pytest.raises(jt.InputError, match=r"checkpoint of step 3 .*found \[1, 4\]"):
        read(tmp_path / "c", 3)
    assert read(tmp_path / "c", 1).step == 1
    assert read(tmp_path / "c").step == 4


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def fail_in_orbax(monkeypatch):
    def save(self, directory, *args, **kwargs):
        Path(directory).mkdir(parents=True)
        (Path(directory) / "half").write_bytes(b"half of it")
        no_space()

    monkeypatch.setattr(ocp.Checkpointer, "save", save)


def fail_in_sync(monkeypatch):
    monkeypatch.setattr(os, "fsync", no_space)


def fail_in_meta(monkeypatch):
    write = Path.write_text
    monkeypatch.setattr(
        Path, "write_text", lambda self, *a: no_space() if self.name == "meta.json" else write(self, *a)
    )


def fail_in_rename(monkeypatch):
    monkeypatch.setattr(Path, "rename", no_space)


@pytest.mark.parametrize("fail", [fail_in_orbax, fail_in_sync, fail_in_meta, fail_in_rename])
def test_a_full_disk(tmp_path, monkeypatch, fail):
    store = saved(tmp_path, [1, 2])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with monkeypatch.context() as patched:
        fail(patched)
        store.save(3, a_state(3, 3), {})
        with pytest.raises(jt.InputError, match=r"could not save step 3 .*No space left.*earlier checkpoints"):
            store.wait()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert not list(tmp_path.glob(".writing-*"))
    assert store.steps() == [1, 2]
    store.save(3, a_state(3, 3), {})  # there is space again
    store.close()
    assert_same(fill(a_state(), read(tmp_path).leaves), a_state(3, 3))


def test_a_failed_save_is_reported_by_the_next(tmp_path, monkeypatch):
    store = saved(tmp_path, [1])
    with monkeypatch.context() as patched:
        fail_in_orbax(patched)
        store.save(2, a_state(2, 2), {})
        with pytest.raises(jt.InputError, match="could not save step 2"):
            store.save(3, a_state(3, 3), {})
    store.close()
    assert store.steps() == [1]


def test_leftovers_of_a_killed_process_are_cleaned(tmp_path):
    store = saved(tmp_path, [1, 2])
    for name in (".writing-3", ".writing-pruned-1"):
        shutil.copytree(tmp_path / "step_000000001", tmp_path / name)
    (tmp_path / ".writing-3" / "meta.json").unlink()
    assert store.steps() == [1, 2]
    assert store.restore().step == 2
    assert not list(tmp_path.glob(".writing-*"))
    (tmp_path / ".writing-3").mkdir()  # one that appears later is no obstacle
    (tmp_path / ".writing-3" / "state").mkdir()
    store.save(3, a_state(3, 3), {})
    store.close()
    assert read(tmp_path).step == 3


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_not_finite_is_not_saved(tmp_path, bad, dtype):
    store = saved(tmp_path, [1])
    for where in ("params", "state"):
        state = a_state(2, 2)
        poisoned = {"model": {**getattr(state, where)["model"], "w": jnp.asarray([1.0, bad], dtype)}}
        with pytest.raises(jt.NonFiniteLossError, match=f"{where}/model/w is not finite after step 2"):
            store.save(2, state._replace(**{where: poisoned}), {})
    store.close()
    assert store.steps() == [1]


def test_an_optimizer_may_hold_infinity(tmp_path):
    """`optax.contrib.reduce_on_plateau` starts from an infinite best value."""
    store = Checkpoints(tmp_path)
    state = a_state()._replace(opt_state={"best": jnp.asarray(jnp.inf)})
    store.save(1, state, {})
    store.close()
    assert np.isposinf(fill(state, read(tmp_path).leaves).opt_state["best"])


def test_large_doubles_are_finite(tmp_path, x64):
    store = Checkpoints(tmp_path)
    store.save(1, {"params": {"w": jnp.array([1e300])}}, {})
    store.close()
    assert read(tmp_path).leaves["params/w"].tolist() == [1e300]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    saved(tmp_path, [1]).close()
    leaves, state = read(tmp_path).leaves, a_state()
    other = {"model": {**state.params["model"], "f16": jnp.zeros(5, jnp.float16)}}
    with pytest.raises(jt.InputError, match=r"of another run .*params/model/f16: expected \(5,\), got \(4,\)"):
        fill(state._replace(params=other), leaves)
    other["model"]["f16"] = jnp.zeros(4, jnp.float32)
    with pytest.raises(jt.InputError, match=r"params/model/f16 is float16, not float32"):
        fill(state._replace(params=other), leaves)
    with pytest.raises(jt.InputError, match=r"\+ opt_state/0/count"):
        fill(state._replace(opt_state=()), leaves)


def test_nested_gives_the_weights_alone(tmp_path):
    saved(tmp_path, [1]).close()
    weights = checkpoints.nested(read(tmp_path).leaves, "params")
    want = {k: v for k, v in a_state(1).params["model"].items() if k != "empty"}
    assert weights.keys() == {"model"}
    chex.assert_trees_all_equal(weights["model"], want)


def test_meta_is_json(tmp_path):
    saved(tmp_path, [1]).close()
    assert json.loads((tmp_path / "step_000000001" / "meta.json").read_text()) == {"step": 1, "note": "step 1"}
