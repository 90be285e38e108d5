"""Classification as an objective: its arguments."""

import pytest

import jaxtransfer as jt


@pytest.mark.parametrize("wrong", [-0.1, 1.0, 1.5])
def test_smoothing_out_of_range_is_refused(wrong):
    with pytest.raises(jt.InputError, match="label_smoothing must be in"):
        jt.classification(jt.models.mlp(3), label_smoothing=wrong)
