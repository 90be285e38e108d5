"""A training as long as a test wants, as a command of several processes: `endless.py OUT STEPS [option ...]`.

With `spoiled` its loss is soon NaN; with `stuck=INDEX` that process gets no more data after some batches; with
`wait=SECONDS` the processes wait that long for each other; with `alone` there is one.
"""

import functools
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import commands

import jaxtransfer as jt
from jaxtransfer import cli
from jaxtransfer.devices import processes

out, steps, options = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]


class Command:
    class training:
        distributed = "alone" not in options

    def run(self):
        def log(record):  # of each step: the first is told before the evaluation is compiled
            (out.parent / "began").touch()
            time.sleep(0.05)

        more = {} if "spoiled" not in options else {"spoiled": True}
        if stuck:
            more["data_patience"] = 1.0
        commands.two_tasks(out, jt.devices.device_mesh(), steps=steps, log_every=1, log=log, **more)


stuck = [int(option[6:]) for option in options if option.startswith("stuck=")]
made = jt.data.Pipeline._part


def part(self, own, number):
    if number >= 8 and processes.index() in stuck:
        threading.Event().wait()
    return made(self, own, number)


jt.data.Pipeline._part = part
waits = [float(option[5:]) for option in options if option.startswith("wait=")]
if waits:
    processes.start = functools.partial(processes.start, wait=waits[0])
cli._parse = lambda words: Command()
processes.leave(cli.main(["two-tasks"]))
