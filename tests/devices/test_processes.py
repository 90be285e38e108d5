"""Several processes train the model that one would: each row of data once, one writer, one step at which all stop."""

import json
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

import jaxtransfer as jt
from jaxtransfer.cli.together import LOST
from jaxtransfer.devices import processes
from jaxtransfer.devices.placement import Placement
from jaxtransfer.runs import checkpoints

sys.path.insert(0, str(Path(__file__).parent))
import commands
from jobs import assert_alike, ended, start, until

STEPS = 4
PROGRAM = Path(commands.__file__)


@pytest.mark.slow
def test_two_processes_train_the_model_of_one(tmp_path):
    jobs = start(PROGRAM, tmp_path / "two", "two-tasks")
    commands.two_tasks(tmp_path / "one")
    assert ended(jobs)[0] == [0, 0]
    two = tmp_path / "two" / "two-tasks"
    assert_alike(tmp_path / "one", two)
    assert (
        json.loads((two / "identity.json").read_text())["parts"]
        == (json.loads((tmp_path / "one" / "identity.json").read_text())["parts"])
    )
    assert len(list((two / "tensorboard").iterdir())) == 1  # one writer


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one(tmp_path):
    assert ended(start(PROGRAM, tmp_path, "two-tasks"))[0] == [0, 0]
    commands.two_tasks(tmp_path / "two-tasks", steps=STEPS + 3)
    commands.two_tasks(tmp_path / "one", steps=STEPS + 3)
    assert_alike(tmp_path / "one", tmp_path / "two-tasks")


ENDLESS = PROGRAM.with_name("endless.py")


def begun(out, steps):
    jobs = start(ENDLESS, out, steps)
    until((Path(out).parent / "began").exists, jobs)
    return jobs


@pytest.mark.slow
@pytest.mark.parametrize("whom", [[0], [1]])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_stops_all_at_one_step(tmp_path, whom, number):
    jobs = begun(tmp_path / "run", 100_000)
    for one in whom:
        jobs[one].send_signal(number)
    codes, told = ended(jobs, timeout=60)
    assert codes == [128 + number] * 2, told
    assert f"stopped by {number.name} after step" in told[0]
    saved = checkpoints.steps(tmp_path / "run" / "checkpoints")[-1]
    assert f"after step {saved}, " in told[0]
    for name in ("run", "whole"):
        codes, told = ended(start(ENDLESS, tmp_path / name, saved + 3))
        assert codes == [0, 0], told
    assert f"resumes from step {saved} of {saved + 3}" not in told[0]
    assert_alike(tmp_path / "whole", tmp_path / "run", tolerance=0)


@pytest.mark.slow
@pytest.mark.parametrize("whom", [0, 1])
def test_a_process_that_is_lost_ends_the_others_soon_with_one_line(tmp_path, whom):
    jobs = begun(tmp_path / "run", 100_000)
    jobs[whom].kill()
    since = time.monotonic()
    codes, told = ended(jobs, timeout=60)
    assert time.monotonic() - since < 60
    assert codes[whom] == -signal.SIGKILL
    if whom == 0:  # it hosts the service that all listen to: JAX itself ends the others, at once, and says why
        assert codes[1] == LOST or (codes[1] == -signal.SIGABRT and "another task died" in told[1]), told
        return
    assert codes[0] == LOST, told
    lines = [line for line in told[0].splitlines() if "jaxtransfer: " in line]
    assert len(lines) == 1, told
    assert "process 0 of 2 lost " in lines[0]
    assert "Traceback" not in told[0]


@pytest.mark.slow
def test_an_error_of_the_first_ends_all_and_is_told_once(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "something").touch()
    codes, told = ended(start(ENDLESS, out, 4), timeout=120)
    assert codes == [2, 2]
    assert "is no run directory" in told[0]
    assert told[1] == ""


def test_alone_is_one_process():
    assert (processes.count(), processes.index()) == (1, 0)
    with processes.alone():
        assert (processes.count(), processes.index()) == (1, 0)
    assert processes.first_does(lambda: (1, object))[0] == 1
    assert processes.first_tells(lambda: {"a": 1}) == {"a": 1}
    with pytest.raises(KeyError):
        processes.first_does(lambda: {}["missing"])


class Device:
    def __init__(self, number, process):
        self.id, self.process_index = number, process


def test_devices_of_a_process_lie_together(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda *_: 2)
    mixed = np.array([[Device(0, 1), Device(1, 0)], [Device(2, 1), Device(3, 0)]])
    assert [device.id for device in processes.in_order(mixed)] == [1, 3, 0, 2]
    for bad in (mixed[0, :1], mixed.ravel()[:3]):
        with pytest.raises(jt.InputError, match="as many devices of each"):
            processes.in_order(bad)


def test_pmap_is_of_one_process(monkeypatch, mesh_of):
    monkeypatch.setattr(jax, "process_count", lambda *_: 2)
    with pytest.raises(jt.InputError, match=r"'pmap' runs in one process.*one of 2"):
        Placement(mesh_of(4), "pmap")
    with pytest.raises(jt.InputError, match="as many devices of each"):
        Placement(mesh_of(4), "jit")
    with processes.alone():
        assert Placement(None, "jit").devices is None


def test_what_is_no_loss_of_a_process_stays_as_it_is(monkeypatch):
    error = jax.errors.JaxRuntimeError("Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:4")
    with pytest.raises(jax.errors.JaxRuntimeError), processes.loss_told():
        raise error
    monkeypatch.setattr(jax, "process_count", lambda *_: 2)
    with pytest.raises(jt.LostProcessError, match="process 0 of 2 lost another one"), processes.loss_told():
        raise error
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE"), processes.loss_told():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")


def test_a_tree_is_put_whole_on_every_device(mesh_of):
    line = Mesh(np.array(jax.devices()[:4]), ("x",), axis_types=(AxisType.Auto,))
    where = jax.sharding.NamedSharding(line, jax.sharding.PartitionSpec())
    tree = {"key": jax.random.key(3), "w": np.arange(6.0, dtype=np.float32).reshape(2, 3), "n": jax.numpy.int32(4)}
    placed = processes.put(tree, where)
    assert {leaf.sharding for leaf in jax.tree.leaves(placed)} == {where}
    np.testing.assert_array_equal(placed["w"], tree["w"])
    assert int(placed["n"]) == 4
    assert jax.random.key_data(placed["key"]).tolist() == jax.random.key_data(tree["key"]).tolist()
    assert processes.put(placed, where)["w"] is placed["w"]


@pytest.mark.parametrize("told", [{processes.COUNT: "2"}, {processes.COUNT: "2", processes.INDEX: "x"}])
def test_half_told_is_refused(monkeypatch, told):
    for name in (processes.ADDRESS, processes.COUNT, processes.INDEX):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(jt.InputError, match="JAX_COORDINATOR_ADDRESS=host:port"):
        processes.start()
