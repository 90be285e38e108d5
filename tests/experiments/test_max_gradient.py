"""The derivative of a maximum that is picked by its place is right, compiled, forward and backward."""

import numpy as np
import pytest

from experiments import max_gradient


@pytest.mark.optimised
@pytest.mark.parametrize("name", ["place", "window"])
def test_maxima_by_place(name, x64):
    difference, *derivatives = max_gradient.derivatives(max_gradient.MAXIMA[name])
    np.testing.assert_allclose(derivatives, difference, rtol=1e-6)
