"""What a rule says of itself: that it looks at the losses alone, that it remembers, or averages the gradients."""

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


def averages(average: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Marks a rule that looks at moving averages of the gradients, ĝ_t ← b ĝ_t + (1 − b) f_t g_t from 0.

    `average(**settings)` is given what the rule is set to, by `functools.partial`, and returns a function
    `(values [T], update) -> (f [T], b)`, the updates counted from 1, or None for no averages. The `gram` of the rule is
    then that of the averages, and its weights mix them. They are kept for the shared parameters, T of each, in the
    model state under `<name>_gradients`.
    """

    def mark(rule: Rule) -> Rule:
        setattr(rule, "averages", average)  # noqa: B010
        return rule

    return mark
