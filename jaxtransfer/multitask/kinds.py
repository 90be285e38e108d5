"""What a rule says of itself: that it looks at the losses alone, or that it remembers."""

from collections.abc import Callable
from typing import Any

from jaxtransfer.parts.mixing import Rule


def of_values(rule: Rule) -> Rule:
    """Marks a rule that reads the losses and not the gradients: it costs one pass backwards, whatever the tasks.

        @jt.multitask.of_values
        def hardest(gram, values, key, state):
            return jax.nn.softmax(values), state

    Its `gram` is None, unless the cosines are asked for.
    """
    setattr(rule, "of_values", True)  # noqa: B010 (a function has no such field)
    return rule


def remembers(init: Callable[[int], Any]) -> Callable[[Rule], Rule]:
    """Marks a rule that has a state: `init(T)` is the first one, a tree of arrays."""

    def mark(rule: Rule) -> Rule:
        setattr(rule, "init", init)  # noqa: B010
        return rule

    return mark
