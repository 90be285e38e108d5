"""Options of what stays as it is while the rest of a network is fine-tuned."""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from typing import Annotated

import jax
import numpy as np
import tyro

import jaxtransfer as jt
from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.methods import Phase


@dataclasses.dataclass(frozen=True)
class FreezeOptions:
    """What stays as it is."""

    freeze: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATTERN ...", help_behavior_hint="(default: none)")] = ()
    """Layers that stay, by patterns over the keys of their paths: stem.* 'stage[12]_.*'. They run in inference mode:
    batch norm by its running statistics, no dropout."""
    freeze_bn: bool = False
    """Batch norm stays: running statistics, scales and biases. For small data, small batches."""

    def check(self) -> None:
        """Raises for patterns that are none."""
        tree.matches("", self.freeze)  # raises

    def patterns(
        self, model: jt.Model, image_shape: Sequence[int], *, new_head: bool, head_alone: bool = False
    ) -> tuple[str, ...]:
        """Returns path patterns of what stays.

        Args:
          model: that is fine-tuned.
          image_shape: of its images.
          new_head: whether its head begins afresh.
          head_alone: whether nothing but its head trains, for a while at least.

        Raises:
          InputError: for a pattern that selects nothing, and where they select all, or a new head.
        """
        if not self.freeze and not self.freeze_bn:
            return ()
        image = jax.ShapeDtypeStruct((1, *image_shape), np.uint8)
        variables = dict(jax.eval_shape(model.init, jax.random.key(0), image))
        params = variables.pop("params")
        paths = list(tree.leaves_by_path(params))
        for pattern in self.freeze:
            if not any(tree.matches(path, pattern) for path in paths):
                raise selects_nothing("freeze", pattern, paths)
        head = [path for path in paths if tree.matches(path, model.head)]
        if new_head and any(tree.matches(path, self.freeze) for path in head):
            raise InputError("--freeze selects the head, which is new and would stay as it was drawn; leave it out")
        if head_alone and all(tree.matches(path, self.freeze) for path in head):
            raise InputError("--freeze selects the head, which is all that a linear probe trains; leave it out")
        norms = jt.optim.batch_norms({model.name: params}, {model.name: variables}) if self.freeze_bn else ()
        if self.freeze_bn and not norms:
            raise InputError("--freeze-bn: the network has no batch norm; leave it out")
        found = (*(f"{model.name}/(?:.*/)?(?:{pattern})" for pattern in self.freeze), *norms)
        if all(tree.matches(f"{model.name}/{path}", found) for path in paths):
            raise InputError("--freeze selects all layers, which leaves nothing to train; choose fewer")
        return found

    @staticmethod
    def applied(phases: Sequence[Phase], patterns: Sequence[str]) -> tuple[Phase, ...]:
        """Returns the phases of a method, in each of which what the patterns select stays."""
        if not patterns:
            return tuple(phases)
        return tuple(phase._replace(optimizer=jt.optim.freeze(phase.optimizer, patterns)) for phase in phases)


def selects_nothing(option: str, pattern: str, paths: Sequence[str]) -> InputError:
    """Returns the error of an option whose pattern is of no layer, with the closest of those there are."""
    layers = list(dict.fromkeys(path.rpartition("/")[0] for path in paths))
    keys = list(dict.fromkeys(key for path in paths for key in path.split("/")))
    close = difflib.get_close_matches(re.sub(r"[\\.*+?^$()\[\]|]", "", pattern), [*layers, *keys], n=1, cutoff=0.4)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return InputError(f"--{option} {pattern!r} selects no layer{hint}; there are {tree.listed(layers)}")
