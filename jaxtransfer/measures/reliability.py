"""How well confidences agree with what turned out right, in bins of equal width."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Reliability:
    """A reliability diagram: examples by their confidence, the largest probability, in M bins of equal width.

    Bin m holds confidences in (m/M, (m+1)/M] (Guo, Pleiss, Sun and Weinberger 2017, arXiv:1706.04599).

    Attributes:
      count: int64 [M], examples in each bin.
      accuracy: float64 [M], the share of them that is right; NaN in an empty bin.
      confidence: float64 [M], their mean confidence; NaN in an empty bin.
    """

    count: np.ndarray
    accuracy: np.ndarray
    confidence: np.ndarray

    @property
    def bins(self) -> int:
        """M, how many bins there are."""
        return len(self.count)

    @property
    def ece(self) -> float:
        """Expected calibration error Σ_m (n_m / n) |accuracy_m − confidence_m|."""
        gaps, some = np.abs(self.accuracy - self.confidence), self.count > 0
        return float(np.sum(self.count[some] * gaps[some]) / np.sum(self.count))

    @property
    def mce(self) -> float:
        """Maximum calibration error max_m |accuracy_m − confidence_m|, over the bins that hold an example."""
        return float(np.nanmax(np.abs(self.accuracy - self.confidence)))
