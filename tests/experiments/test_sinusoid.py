"""Sinusoid regression: the distribution of its tasks, a tiny run, and the benchmark beside it."""

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtransfer as jt
from experiments import sinusoid
from experiments.benchmarks import sinusoid_speed
from experiments.benchmarks.torch_loop import TorchLoop, torch_python

PNG = b"\x89PNG"


@pytest.mark.slow
def test_both_ranges_of_the_frequency(tmp_path):
    options = {"shots": (2,), "meta_steps": 4, "steps_per_call": 4, "test_tasks": 3}
    results = sinusoid.main(sinusoid.Sinusoid(out=tmp_path, **options))
    assert {name: part["options"]["frequency"] for name, part in results.items()} == {
        "varying": (0.8, 1.2),
        "fixed": (1.0, 1.0),
    }
    assert all((tmp_path / name / "steps.png").read_bytes().startswith(PNG) for name in results)


@pytest.mark.slow
def test_tiny_run(tmp_path, capsys):
    results = sinusoid.main(sinusoid.Sinusoid(out=tmp_path / "out", tiny=True))
    printed = capsys.readouterr().out
    assert "MAML" in printed
    assert "Meta-SGD" in printed
    assert "1.13" in printed  # published
    stored = json.loads((tmp_path / "out" / "sinusoid.json").read_text())
    assert stored["options"]["meta_steps"] == results["options"]["meta_steps"]
    for method in sinusoid.METHODS:
        assert set(stored["train_seconds"][method]) == {"5"}
        by_step = stored["mse_by_step"][method]["5"]
        assert len(by_step) == 1 + sinusoid.STEPS_SHOWN
        assert by_step[1] < by_step[0]
        cell = stored["mse"][method]["5"]["5"]
        assert cell["mean"] == pytest.approx(by_step[1], rel=1e-3)
        assert 0 < cell["interval"] < math.inf
    for name in ("adaptation.png", "steps.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == PNG


@pytest.mark.slow
def test_the_tasks_are_the_protocols():
    count, frequency = 4000, jnp.array([0.8, 1.2])
    curve, x = sinusoid.draw(jax.random.key(3), count, 6, frequency)
    bounds = {"amplitude": (0.1, 5.0), "frequency": (0.8, 1.2), "phase": (0.0, np.pi)}
    drawn = {name: np.asarray(curve[name])[:, 0, 0] for name in bounds} | {"x": np.asarray(x).ravel()}
    for name, (low, high) in (bounds | {"x": (-5.0, 5.0)}).items():
        assert low <= drawn[name].min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < drawn[name].max() <= high
        assert drawn[name].mean() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))
        assert drawn[name].std() == pytest.approx((high - low) / np.sqrt(12), rel=0.03)
    correlations = np.corrcoef([*(drawn[name] for name in bounds), np.asarray(x)[:, 0, 0], np.asarray(x)[:, 1, 0]])
    assert np.abs(correlations - np.eye(5)).max() < 0.06

    episodes = sinusoid.episodes(jax.random.key(3), count, 2, 4, frequency)
    assert episodes["support"]["input"].shape == (count, 2, 1)
    for part, points in (("support", slice(0, 2)), ("query", slice(2, 6))):
        np.testing.assert_array_equal(episodes[part]["input"], x[:, points])
        for task in (0, 1, count - 1):
            amplitude, omega, phase = (drawn[name][task] for name in bounds)
            expected = [amplitude * math.sin(omega * point + phase) for point in np.asarray(x)[task, points, 0]]
            np.testing.assert_allclose(episodes[part]["value"][task, :, 0], expected, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": 0}, "--tasks must be at least 1; got 0"),
        ({"meta_steps": 1500}, "must divide --meta-steps; got 1000 and 1500"),
        ({"shots": ()}, "--shots"),
        ({"frequency": (1.2, 0.8)}, "--frequency"),
    ],
)
def test_refuses(tmp_path, changes, message):
    with pytest.raises(jt.InputError, match=message):
        sinusoid.main(sinusoid.Sinusoid(**{"out": tmp_path / "out", **changes}))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_speed(capsys):
    result = sinusoid_speed.main(sinusoid_speed.Speed(tiny=True))
    assert json.loads(capsys.readouterr().out) == result
    assert result["ours_per_second"] > 0
    assert result["compile_s"] > 0
    if torch_python() is None:
        assert result["pytorch"] is None
    else:
        assert result["ratio"] > 0


def test_torch_loop_refuses_an_unknown_setting(capfd):
    with TorchLoop(sys.executable, size=3) as loop, pytest.raises(RuntimeError, match="ended with code 1"):
        loop.seconds()
    assert "unknown setting 'size'" in capfd.readouterr().err


@pytest.mark.parametrize("model", [{"model": "mlp", "steps": 2}, {"model": "conv4", "pooled": False, "width": 4}])
def test_torch_loop(model):
    pytest.importorskip("torch")
    with TorchLoop(sys.executable, **model, tasks=2, support=5, query=5) as loop:
        assert loop.seconds(2) > 0
        assert loop.close()["peak_mb"] > 1
