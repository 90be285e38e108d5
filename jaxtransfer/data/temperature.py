"""How often the examples of several tasks are seen: by size, equally often, or between."""

import numpy as np

from jaxtransfer.data.dataset import Dataset, check_dataset
from jaxtransfer.data.joined import TASK
from jaxtransfer.errors import InputError


def temperature_weights(dataset: Dataset, temperature: float, *, by: str = TASK) -> np.ndarray:
    """Returns a weight for each example, float64 [N], by which task t is seen with p_t ∝ n_t^(1/T).

        both = jt.data.joined(letters=letters, digits=digits)
        jt.data.pipeline(both, 64, balance=jt.data.temperature_weights(both, 5.0))

    Each of a task's n_t examples weighs p_t / n_t. At T = 1 all examples are seen equally often, a larger T brings the
    tasks nearer to each other, and at T = ∞ each has the same share of the examples. (Sampling by temperature of
    multilingual and multi-task training; Arivazhagan et al. 2019, arXiv:1907.05019, T = 5; Raffel et al. 2020,
    arXiv:1910.10683, section 3.5.2.) `jt.data.pipeline(balance=)` draws by it: in an epoch of N places an example comes
    N p_t / n_t times, rounded up or down, so that the counts of tasks hardly vary either. Batch i is a function of the
    seed and i: a run resumes to the same bits.

    Args:
      dataset: with a column that tells the tasks, as `jt.data.joined` makes it.
      temperature: T > 0; `float("inf")` for equal shares.
      by: the column; a `label` balances classes likewise.

    Raises:
      InputError: for a temperature that is not positive, and a column that holds no classes.
    """
    check_dataset(dataset, "temperature_weights")
    if not temperature > 0:
        raise InputError(f"a temperature must be positive; got {temperature}")
    entry = dataset.entry_of(by)
    if not entry.is_label:
        raise InputError(f"{dataset.title}: by= names a column of classes, and {by!r} is {entry}")
    groups = dataset.labels if by == "label" else dataset.column(by)
    counts = np.bincount(groups, minlength=entry.classes or 0).astype(np.float64)
    shares = np.zeros(len(counts))
    # By logarithms: n^(1/T) of a small T is no number any more.
    logs = np.log(counts[counts > 0]) / temperature
    shares[counts > 0] = np.exp(logs - logs.max())
    return (shares / shares.sum() / np.maximum(counts, 1))[groups]
