"""Who is still there: processes of a job notice at once that one of them ended, and end too, with a line that says so.

A program that waits for a device of another process can wait for ever, and what JAX does about it after a while is to
abort. A connection to the first process, on which nothing is said, breaks when the machine's kernel closes it.
"""

import atexit
import contextlib
import functools
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable

LOST = 75
"""The exit code of a process that lost another one: the same command goes on from the last checkpoint."""
_GRACE = 1.0  # seconds in which all processes may end by themselves, of the same error say
_BYE = b"bye"
_KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # a machine without power says nothing


class Watch:
    """Watches over the other processes: the first one over all, the others over the first.

    Args:
      index: of this process.
      count: of processes.
      tell: `tell(text | None) -> text` brings the first process's text to all.
      host: where the others reach the first one.
    """

    def __init__(self, index: int, count: int, tell: Callable[[str | None], str], host: str):
        self._index, self._count, self._over = index, count, False
        self._streams: dict[socket.socket, int] = {}
        if index == 0:
            server = socket.create_server(("", 0), backlog=count)
            tell(f"{host} {server.getsockname()[1]}")
            work = functools.partial(self._accept, server)
        else:
            address, port = tell(None).split()
            try:
                stream = _kept_alive(socket.create_connection((address, int(port)), timeout=10))
                stream.sendall(index.to_bytes(4, "little"))
            except OSError:  # a firewall: JAX's own heartbeats remain
                return
            self._streams[stream] = 0
            work = functools.partial(self._watch)
        atexit.register(self._at_exit)
        threading.Thread(target=work, name="peers", daemon=True).start()

    def over(self) -> None:
        """Says that this process ends as it should, and that what the others do matters no more."""
        if not self._over:
            self._over = True
            for stream in list(self._streams):
                with contextlib.suppress(OSError):
                    stream.sendall(_BYE)

    def leaving(self) -> None:
        """Says nothing to the others, who notice; what they do matters no more."""
        self._over = True

    def _at_exit(self) -> None:
        if getattr(sys, "last_type", None) is None:  # no error that nobody caught
            self.over()

    def _accept(self, server: socket.socket) -> None:
        with server:
            server.settimeout(60)
            with contextlib.suppress(OSError):
                while len(self._streams) < self._count - 1:
                    stream = _kept_alive(server.accept()[0])
                    self._streams[stream] = int.from_bytes(stream.recv(4), "little")
        self._watch()

    def _watch(self) -> None:
        gone: set[socket.socket] = set()
        while len(gone) < len(self._streams):
            for stream in select.select([one for one in self._streams if one not in gone], [], [])[0]:
                gone.add(stream)
                try:
                    orderly = stream.recv(16).startswith(_BYE)
                except OSError:
                    orderly = False
                if not orderly:
                    self._lost(self._streams[stream])

    def _lost(self, index: int) -> None:
        if self._index == 0:  # whose end would be the end of the others, before they have said why
            time.sleep(_GRACE)
        if self._over:
            return
        again = "the same command resumes from the last checkpoint"
        line = (
            f"jaxtransfer: error: process {self._index} of {self._count} lost process {index}, which ended; {again}\n"
        )
        os.write(2, line.encode())
        if self._index == 0:
            time.sleep(_GRACE)
        os._exit(LOST)


def _kept_alive(stream: socket.socket) -> socket.socket:
    stream.settimeout(None)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if hasattr(socket, name):
            stream.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return stream
