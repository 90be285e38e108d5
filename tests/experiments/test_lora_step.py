"""What a LoRA step costs: the benchmark runs in its tiny form."""

import json

import pytest

import jaxtransfer as jt
from experiments.benchmarks import lora_step


@pytest.mark.slow
def test_lora_step(capsys):
    result = lora_step.main(lora_step.LoraStep(tiny=True))
    assert json.loads(capsys.readouterr().out) == result
    assert result["rounds"] == 2
    assert result["ratio"] > 0
    assert result["lora"]["trained"] == 2 * 2 * (8 + 8)
    assert result["lora"]["optimizer_numbers"] == 2 * result["lora"]["trained"] + 1


def test_a_benchmark_of_no_rounds_is_refused():
    with pytest.raises(jt.InputError, match="1 or more"):
        lora_step.main(lora_step.LoraStep(rounds=0))
