"""How far the host runs ahead of the devices."""

from collections import deque
from typing import Any

import jax
from jax.core import Tracer


class InFlight:
    """Lets the host run ahead of the devices by a few calls and no more: `wait()`, call, `add(outputs)`.

    A call of a compiled program returns before the devices have computed it. Where nothing holds the host back it
    queues call upon call, each with its batch in the devices' memory. On several CPU devices it is worse than that: a
    program that comes to a device which has 32 to run waits for its turn in one of the threads that the devices share,
    an earlier program lacks that thread for its devices to meet, and neither ends.

    Args:
      calls: how many may be under way at once.
    """

    def __init__(self, calls: int = 2):
        self._calls: deque[list[jax.Array]] = deque()
        self._most = calls

    def wait(self) -> None:
        """Waits until there is room for one more call."""
        while len(self._calls) >= self._most:
            jax.block_until_ready(self._calls.popleft())

    def add(self, outputs: Any) -> None:
        """Notes a call by outputs of it, or of what follows from them, which nobody donates or deletes."""
        self._calls.append([leaf for leaf in jax.tree.leaves(outputs) if not isinstance(leaf, Tracer)])
