"""A command in several processes: all of them run it, the first one prints."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from jaxtransfer.devices import processes
from jaxtransfer.devices.parts import within_reach
from jaxtransfer.devices.peers import LOST as LOST
from jaxtransfer.train import Fitted


@contextlib.contextmanager
def together(command: Any) -> Iterator[None]:
    """Joins the processes where --distributed asks for it; all but the first one are silent until they end."""
    if not getattr(getattr(command, "training", command), "distributed", False):
        yield
        return
    processes.start()
    with contextlib.ExitStack() as stack:
        if not processes.is_first():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


def by_first(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function as the first process alone calls it, for what is done with files, once training is over."""

    def call(*arguments: Any) -> Any:
        near = [one._replace(state=within_reach(one.state)) if isinstance(one, Fitted) else one for one in arguments]
        return processes.first_does(lambda: function(*near))

    return call


def says(message: str, *, agreed: bool) -> None:
    """Prints how a command ended on stderr; what all processes know is said by the first one.

    Args:
      message: a line.
      agreed: whether all of them end by it.
    """
    if not processes.joined() or processes.is_first():
        print(f"jaxtransfer: {message}", file=sys.stderr)
    elif not agreed:
        print(f"jaxtransfer: process {processes.index()}: {message}", file=sys.stderr)
