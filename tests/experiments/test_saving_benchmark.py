"""The benchmark of saving, in a trial."""

import json

import pytest

from experiments.benchmarks import saving


@pytest.mark.slow
def test_it_measures_and_prints_one_line(capsys):
    saving.main(["--rounds", "1", "--seconds", "0.2", "--width", "8"])
    (line,) = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    assert told["benchmark"] == "saving"
    assert told["steps_per_second"] > 0
    assert told["steps_per_second_with_a_save"] > 0
    assert 0 < told["blocked_seconds"] < told["written_seconds_at_most"]
    assert abs(told["loss"] - (1 - told["steps_per_second_with_a_save"] / told["steps_per_second"])) < 0.01
