"""Where the blocks of a transformer are among its parameters: what adapters, prompts and prefixes are put into."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtransfer import tree
from jaxtransfer.errors import InputError

_LAYERS = ("attention/query/kernel", "attention/out/kernel", "fc1/kernel", "fc2/kernel", "norm2/scale")


class TransformerBlock(NamedTuple):
    """A block of self-attention and a perceptron, as those of `jt.models.vit` and `jt.models.text_encoder`.

    Attributes:
      path: of its parameters.
      width: D of its tokens.
      heads: of the attention.
      head_width: d of each.
    """

    path: str
    width: int
    heads: int
    head_width: int

    @property
    def above(self) -> str:
        """The path of what it stands in."""
        return self.path.rpartition("/")[0]

    def at(self, name: str) -> str:
        """Returns the path of a layer in it, or of a new one."""
        return f"{self.path}/{name}"


def transformer_blocks(params: Mapping[str, Any], only: tree.Patterns, what: str) -> tuple[TransformerBlock, ...]:
    """Returns the blocks of a transformer, from the first to the last.

    Args:
      params: by path.
      only: path patterns of the blocks that are wanted; all by none.
      what: who asks, for errors.

    Raises:
      InputError: where there are no blocks, or a pattern selects none.
    """
    found = []
    for path, kernel in params.items():
        place, _, layer = path.rpartition("/attention/query/")
        if layer == "kernel" and all(f"{place}/{name}" in params for name in _LAYERS):
            found.append(TransformerBlock(place, *kernel.shape))
    if not found:
        raise InputError(
            f"{what} needs the blocks of a transformer, layers with the parameters {', '.join(_LAYERS)} in each, as "
            f"jt.models.vit and jt.models.text_encoder have them; the base has {tree.listed(params, limit=6)}"
        )
    found.sort(key=lambda block: [int(n) if n.isdigit() else n for n in re.split(r"(\d+)", block.path)])
    if not only:
        return tuple(found)
    tree.check_used(only, [block.path for block in found], f"{what}, only")
    return tuple(block for block in found if tree.matches(block.path, only))
