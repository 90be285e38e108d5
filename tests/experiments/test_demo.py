"""The main job runs in its tiny form and writes what it promises."""

import json
import math

import pytest

from experiments import demo


@pytest.mark.slow
def test_demo(module, tmp_path):
    code, out, err = module("experiments.demo", "--tiny", "--out", tmp_path)
    assert code == 0, err
    assert all(method in out for method in demo.METHODS)
    results = json.loads((tmp_path / "results.json").read_text())
    for target in demo.TARGETS:
        for shots in demo.SHOTS:
            found = results["targets"][target][str(shots)]
            assert list(found) == list(demo.METHODS)
            assert all(math.isfinite(f["mean"]) and len(f["values"]) == 2 for f in found.values())
    assert (tmp_path / "results.png").read_bytes()[:4] == b"\x89PNG"
    assert "| L2-SP |" in (tmp_path / "report.md").read_text()


def test_verdict_is_paired_by_seed():
    def method(*values):
        return {"values": list(values)}

    assert demo.verdict({"L2-SP": method(60, 71), "scratch": method(50, 61)}).startswith(
        "knowledge moves: L2-SP is 10.0"
    )
    assert demo.verdict({"L2-SP": method(40, 51), "scratch": method(50, 61)}).startswith("transfer loses")
    assert demo.verdict({"L2-SP": method(40, 71), "scratch": method(50, 61)}).startswith("no clear difference")
