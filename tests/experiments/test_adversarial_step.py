"""What a DANN step costs: the benchmark runs in its tiny form."""

import json

import pytest

import jaxtransfer as jt
from experiments.benchmarks import adversarial_step


@pytest.mark.slow
def test_adversarial_step(capsys):
    result = adversarial_step.main(adversarial_step.AdversarialStep(tiny=True))
    assert json.loads(capsys.readouterr().out) == result
    assert result["rounds"] == 2
    assert all(result[name]["ratio"] > 0 for name in ("by_hand", "same_net"))


def test_nonsense_is_refused():
    with pytest.raises(jt.InputError, match="1 or more"):
        adversarial_step.main(adversarial_step.AdversarialStep(rounds=0))
