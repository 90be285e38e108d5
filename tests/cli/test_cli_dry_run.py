"""`--dry-run` prints what a step takes and leaves nothing; the first line; what a report tells of the time."""

import re
import time

import jax
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer import cli
from jaxtransfer.devices import peak
from jaxtransfer.devices.ahead import Cost
from jaxtransfer.runs.report import timing_rows
from jaxtransfer.train.clock import Clock

PRETRAIN = ["pretrain", "--data", "digits/upright", "--model", "mlp", "--steps", "6", "--batch-size", "16"]


def row(text, name):
    (number,) = re.findall(rf"\| {name}[^|]*\| ([\d.,]+)", text)
    return float(number.replace(",", ""))


def test_it_prints_the_memory_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main([*PRETRAIN, "--out", str(out), "--dry-run"]) == 0
    assert not out.exists()
    told, errors = capsys.readouterr()
    weights = 85_002 * 4 / 2**20  # and Adam's two averages of them
    batch = 16 * (8 * 8 + 4) / 2**20
    assert row(told, "arguments") == pytest.approx(3 * weights + batch, abs=0.11)
    parts = [row(told, name) for name in ("arguments", "outputs", "temporaries", "the program")]
    assert row(told, "together") == pytest.approx(sum(parts), abs=0.3)
    assert row(told, "temporaries") > 0
    # forward and both backward products of 16 rows, those of the first layer but for the images
    kernels = [64 * 256, 256 * 256, 256 * 10]
    operations = 2 * 16 * (3 * sum(kernels) - kernels[0]) / len(jax.devices()) + 12 * 85_002  # Adam's on each device
    assert row(told, "operations") == pytest.approx(operations / 1e9, abs=0.0008)
    said = f"jaxtransfer {jt.__version__}: pretrain, a dry run"
    assert errors.splitlines()[:1] in ([said], [])  # of a machine that takes less than a second for all of it


@pytest.mark.slow
def test_several_tasks_are_not_trained_either(tmp_path, capsys):
    words = ["multitask", "--data", "digits/upright", "digits/noisy", *PRETRAIN[3:], "--no-cosines"]
    assert cli.main([*words, "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert row(told, "arguments") > 0
    assert "accuracy" not in told
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_it_reads_no_pmap(tmp_path, capsys):
    assert cli.main([*PRETRAIN, "--out", str(tmp_path / "run"), "--dry-run", "--mode", "pmap"]) == 2
    assert "choose mode='jit'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_first_line_is_soon_there(tmp_path, monkeypatch):
    class Stream:
        first = None

        def write(self, text):
            self.first = self.first or (time.monotonic(), text)

        def flush(self):
            pass

    assert cli._SOON < 2
    monkeypatch.setattr(cli, "_SOON", 0.01)  # where all of it takes less than a second, too
    stream, begin = Stream(), time.monotonic()
    monkeypatch.setattr("sys.stderr", stream)
    assert cli.main([*PRETRAIN, "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    assert stream.first is not None
    assert stream.first[0] - begin < 2
    assert "pretrain" in stream.first[1]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("NVIDIA A1000", None),
        ("cpu", None),
    ],
)
def test_the_peak_of_a_device(kind, expected):
    assert peak.peak_of(kind) == expected


def test_a_peak_is_measured():
    times = sorted(peak.measured_peak(64) for _ in range(2))
    assert 1e6 < times[0] <= times[1] < 1e15
    assert peak.peak_memory()["peak_host_memory_bytes"] > 50 * 2**20  # JAX alone takes more


def test_the_clock_leaves_evaluations_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("jaxtransfer.train.clock.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("jaxtransfer.train.clock.measured_peak", lambda: 4e9)
    clock = Clock(8, measure=True)
    clock.costs(Cost(1e9))
    with clock.waiting():
        now[0] += 1
    now[0] += 3
    clock.stepped({}, 5)
    now[0] += 10
    clock.stepped({}, 20)
    with clock.aside():
        now[0] += 6
    told = clock.report()
    assert told["seconds"] == 20
    assert told["compile_seconds"] == 3
    assert told["data_wait_fraction"] == 1 / 20
    assert told["steps_per_second"] == pytest.approx(20 / (20 - 3 - 6))
    assert told["examples_per_second"] == pytest.approx(8 * told["steps_per_second"])
    assert told["matmul_flops"] == 4e9
    assert told["flop_utilisation"] == pytest.approx(told["steps_per_second"] / 4)
    rows = dict(timing_rows(told))
    assert rows["operations of the steps, of the 0.004 T/s of the device measured by a product of matrices"] == "45.5 %"
    assert rows["waiting for data"] == "5.00 %"
    assert timing_rows({"seconds": 1.0})[0] == ("seconds", 1.0)  # a run of old


@pytest.mark.slow
def test_a_trace_is_written(tmp_path):
    from jaxtransfer.errors import InputError

    data = jt.data.pipeline(jt.data.load("digits/upright", "train"), 16)
    objective = jt.classification(jt.models.mlp(10, hidden=(8,)))
    with pytest.raises(InputError, match="give out="):
        jt.fit(objective, optax.sgd(0.1), data, steps=9, profile=True)
    fitted = jt.fit(objective, optax.sgd(0.1), data, steps=9, out=tmp_path / "run", profile=True)
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert 0 < fitted.timing["flop_utilisation"] < 1.5
    assert fitted.timing["matmul_flops"] > 0
