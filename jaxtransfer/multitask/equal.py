"""Equal weights: the plain sum, what everything else is held against."""

from typing import Any

import jax
import numpy as np

from jaxtransfer.multitask.kinds import of_values


@of_values
def equal(gram: Any, values: jax.Array, key: Any, state: Any) -> tuple[np.ndarray, Any]:
    """Returns a weight of 1 for each task: the gradient of Σ_t L_t.

    A baseline that tuned methods rarely beat by much (Kurin et al. 2022, arXiv:2201.04122; Xin et al. 2022,
    arXiv:2209.11379). The program is that of the sum, one pass backwards, while the metrics stay comparable.

    Args:
      gram: not looked at.
      values: of the losses [T]; only their number counts.
      key: nothing is drawn.
      state: none.

    Returns:
      The weights [T], known before anything runs, and the state as it is.
    """
    return np.ones(values.shape, np.float32), state
