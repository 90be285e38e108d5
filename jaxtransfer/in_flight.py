"""How far the host runs ahead of the devices."""

from collections import deque
from typing import Any

import jax


class InFlight:
    """Lets the host run ahead of the devices by a few calls and no more.

    A call of a compiled program returns before the devices have computed it. Where nothing holds the host back it
    queues call upon call, each with its batch in the devices' memory. On several CPU devices it is worse than that:
    the 33rd call that waits on a device does so inside one of the threads that they share, an earlier program lacks
    that thread for its devices to meet, and neither ends.

    Args:
      calls: how many calls may be under way when the host goes on.
    """

    def __init__(self, calls: int = 2):
        self._calls, self._most = deque[Any](), calls

    def add(self, outputs: Any) -> None:
        """Notes a call by (some of) its outputs, which must not be donated; waits until few enough are under way."""
        self._calls.append(outputs)
        if len(self._calls) > self._most:
            jax.block_until_ready(self._calls.popleft())
