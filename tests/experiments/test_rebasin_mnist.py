"""Re-Basin of two perceptrons: the tiny form runs and writes what it promises."""

import json

import pytest

import jaxtransfer as jt
from experiments import rebasin_mnist
from experiments.rebasin_mnist import Rebasin

pytestmark = pytest.mark.usefixtures("offline")


@pytest.mark.slow
def test_tiny_run(tmp_path, capsys):
    results = rebasin_mnist.main(Rebasin(out=tmp_path, tiny=True, data="digits/upright", points=5))
    assert "aligned" in capsys.readouterr().out
    stored = json.loads((tmp_path / "rebasin.json").read_text())
    assert stored["barrier"] == results["barrier"]
    for split in ("train", "test"):
        apart, aligned = (results["lines"][split][0][name] for name in ("apart", "aligned"))
        assert len(apart["loss"]) == 5
        assert apart["loss"][0] == aligned["loss"][0]
        assert apart["loss"][-1] == pytest.approx(aligned["loss"][-1], rel=1e-4)  # the same function
        assert max(aligned["loss"]) < max(apart["loss"])
    assert (tmp_path / "barrier.png").read_bytes()[:4] == b"\x89PNG"


def test_barriers_are_above_the_straight_line():
    line = {"loss": [1.0, 4.0, 3.0], "accuracy": [90.0, 10.0, 80.0]}
    flat = {"loss": [1.0, 2.2, 3.0], "accuracy": [90.0, 85.0, 80.0]}
    found = rebasin_mnist._barriers({"apart": line, "aligned": flat})
    assert found == {"apart": 2.0, "apart_middle_accuracy": 10.0, "aligned": 0.2, "aligned_middle_accuracy": 85.0,
                     "gone": 90.0}  # fmt: skip


@pytest.mark.parametrize("how", [{"pairs": 0}, {"points": 2}])
def test_refuses(tmp_path, how):
    with pytest.raises(jt.InputError, match="a pair or more and 3 points or more"):
        rebasin_mnist.main(Rebasin(out=tmp_path / "out", **how))
    assert not (tmp_path / "out").exists()
