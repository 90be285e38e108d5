"""What a term teaches an output of its model to name, for a run to note: outputs are read as they were learned."""

from typing import NamedTuple

CLASSES, LABELS = "classes", "labels"


class Learns(NamedTuple):
    """What an output of a model names.

    Attributes:
      kind: `classes`, one of which holds, by a softmax; or `labels`, any number of which hold, each by a sigmoid.
      output: the model's output that scores them.
      columns: the entries of the batch that say which hold; several for labels of a column each.
    """

    kind: str
    output: str
    columns: tuple[str, ...]
