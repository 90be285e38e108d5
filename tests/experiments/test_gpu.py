"""The GPU benchmark's dry run: a row is measured and written, an unknown one is refused."""

import json

import pytest

import jaxtransfer as jt
from experiments.benchmarks import gpu


@pytest.mark.slow
def test_a_row_is_measured_and_written(tmp_path, capsys):
    rows = gpu.main(gpu.GpuBenchmark(out=tmp_path, rows=("nt_xent_65536",), tiny=True))
    assert [row["row"] for row in rows] == ["machine", "nt_xent_65536"]
    assert rows[1]["pairs"] == 64
    assert rows[1]["ours_ms"] > 0
    assert rows[1]["plain_ratio"] > 0
    (written,) = tmp_path.glob("gpu-*.jsonl")
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    assert lines == rows == [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_what_fails_is_told_and_what_comes_too_late_left_out(monkeypatch):
    def fails(row):
        raise ValueError("no such thing")

    monkeypatch.setitem(gpu.ROWS, "maxima", fails)
    assert gpu.main(gpu.GpuBenchmark(rows=("maxima",), tiny=True))[1]["failed"] == "ValueError: no such thing"
    assert "left_out" in gpu.main(gpu.GpuBenchmark(rows=("maxima",), tiny=True, limit=0))[1]


def test_an_unknown_row_is_refused():
    with pytest.raises(jt.InputError, match="unknown row 'maxim'; there are maxima"):
        gpu.main(gpu.GpuBenchmark(rows=("maxim",), tiny=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in gpu.ROWS if not name.startswith("nt_xent")])
def test_every_row_runs(name):
    assert "failed" not in gpu.main(gpu.GpuBenchmark(rows=(name,), tiny=True))[1]
