"""The benchmark of dispatch: fifty steps in a call end where fifty calls do, bit for bit."""

import json

import pytest

from experiments.benchmarks import dispatch


@pytest.mark.slow
def test_both_ways_end_at_the_same_parameters(capsys):
    dispatch.main(["--rounds", "1", "--calls", "1"])
    (line,) = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    assert told["largest_difference"] == 0.0
    rates = told["steps_per_call_50_steps_per_second"], told["one_by_one_steps_per_second"]
    assert min(rates) > 0
    assert abs(told["step_times"] - rates[0] / rates[1]) < 0.01 * told["step_times"] + 0.01
    assert min(told["fit_steps_per_call_50_steps_per_second"], told["fit_one_by_one_steps_per_second"]) > 0
