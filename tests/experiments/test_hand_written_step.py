"""What the library's step costs beside one by hand: the two make the same update."""

import json

import pytest

import jaxtransfer as jt
from experiments.benchmarks import hand_written_step


@pytest.mark.slow
@pytest.mark.parametrize("net", hand_written_step.NETS)
def test_both_forms_make_the_same_update(net, capsys):
    (result,) = hand_written_step.main(hand_written_step.HandWrittenStep(nets=(net,), tiny=True))
    assert json.loads(capsys.readouterr().out) == result
    assert result["flops_ratio"] > 0
    assert result["rounds"] == 2
    if net != "dann":  # whose forms draw weights of their own
        assert result["ours"]["loss"] == pytest.approx(result["by_hand"]["loss"], rel=2e-3)


def test_nets_and_rounds_that_are_none_are_refused():
    with pytest.raises(jt.InputError, match="did you mean 'vit-ti'"):
        hand_written_step.main(hand_written_step.HandWrittenStep(nets=("vit-t",)))
    with pytest.raises(jt.InputError, match="1 or more"):
        hand_written_step.main(hand_written_step.HandWrittenStep(rounds=0))
