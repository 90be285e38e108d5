"""What batch norm normalises by inside a task: a choice that few-shot code tends to hide."""

from typing import NamedTuple


class Statistics(NamedTuple):
    """How a task's forwards treat batch statistics.

    Attributes:
      support_train: whether the inner loop normalises by the support set's own statistics.
      query_train: whether the query set is normalised by its own statistics (transductive).
    """

    support_train: bool
    query_train: bool


transductive = Statistics(support_train=True, query_train=True)
"""Each set is normalised by its own statistics, in training and in evaluation: what MAML's authors and most others do.
The predictions of a query example depend on the other query examples; the adaptation never sees them."""

running = Statistics(support_train=False, query_train=False)
"""Both sets are normalised by the running statistics of the state, as in ordinary inference: what pretraining or a
sum with an ordinary term has brought there. Nothing leaks between query examples."""
