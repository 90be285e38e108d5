"""`jaxtransfer launch`: several processes on this machine, to try what a pod will run."""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO, Annotated, Any

import tyro

from jaxtransfer.cli.together import LOST
from jaxtransfer.cli.values import at_least
from jaxtransfer.devices import processes
from jaxtransfer.errors import InputError

_GRACE = 20  # seconds in which the others notice the end of one, before they are ended
_NOISE = b"[Gloo]"  # begins what the library by which CPUs meet prints of itself
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclasses.dataclass(frozen=True)
class Launch:
    """Run a training, or a Python script, in several processes on this machine.

    They train one model together, over the devices of all.

    The words after -- are the command.

    Example: jaxtransfer launch --processes 2 -- finetune --from a --data b --out c
    """

    processes: int = 2
    """How many."""
    devices: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: as JAX finds them)")] = (
        None
    )
    """Virtual devices of each process, on the CPU."""

    def run_words(self, words: Sequence[str]) -> int:
        """Runs the command in each process; returns 0, or the exit code of the process that failed first."""
        at_least(self, 1, "processes", "devices")
        if not words:
            raise InputError("launch needs a command after --: jaxtransfer launch --processes 2 -- finetune ...")
        script = words[0].endswith(".py")
        command = [sys.executable, *([] if script else ["-m", "jaxtransfer"]), *words]
        if not script and "--distributed" not in words:
            command.append("--distributed")
        environment = {"JAX_PLATFORMS": "cpu", **os.environ, "PYTHONUNBUFFERED": "1"}
        environment |= {processes.ADDRESS: f"localhost:{free_port()}", processes.COUNT: str(self.processes)}
        if self.devices is not None:
            environment["JAX_NUM_CPU_DEVICES"] = str(self.devices)
        children: list[subprocess.Popen] = []
        relays: list[threading.Thread] = []
        with _forwarded(children):
            for index in range(self.processes):
                own = {**environment, processes.INDEX: str(index)}
                child = subprocess.Popen(command, env=own, start_new_session=True, stdout=subprocess.PIPE)
                children.append(child)
                relays.append(threading.Thread(target=_relay, args=(child.stdout,), daemon=True))
                relays[-1].start()
            code = _ended(children)
        for relay in relays:
            relay.join(timeout=5)  # a process that they started may hold the stream open
        return code


def free_port() -> int:
    """Returns a port of this machine on which nobody listens."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _relay(stream: IO[bytes]) -> None:
    """Prints what a process prints, but for what is no word of ours."""
    with stream:
        for line in stream:
            if not line.startswith(_NOISE):
                sys.stdout.write(line.decode(errors="replace"))
                sys.stdout.flush()


@contextlib.contextmanager
def _forwarded(children: list[subprocess.Popen]) -> Iterator[None]:
    """Hands SIGINT and SIGTERM on to all processes, once each time; at the end none is left."""

    def hand_on(number: int, _: Any) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, hand_on) for number in _SIGNALS}
    try:
        yield
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _ended(children: list[subprocess.Popen]) -> int:
    """Waits for all processes; those that are left some time after one failed are ended."""
    failed, since = None, 0.0
    while any(child.poll() is None for child in children):
        if failed is None:
            bad = [index for index, child in enumerate(children) if child.poll()]
            if bad:
                failed, since = bad[0], time.monotonic()
        elif time.monotonic() - since > _GRACE:
            print(f"jaxtransfer: the others did not notice in {_GRACE} s and are ended", file=sys.stderr)
            break
        time.sleep(0.05)
    codes = [child.poll() for child in children]
    if failed is None:
        failed = next((index for index, code in enumerate(codes) if code), None)
    if failed is None:
        return 0
    code = codes[failed] or 0
    if code > 0:
        return code
    name = signal.Signals(-code).name
    print(f"jaxtransfer: process {failed} of {len(children)} was ended by {name}", file=sys.stderr)
    return LOST
