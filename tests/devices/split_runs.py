"""A run whose weights are split, in each process of a job: `split_runs.py OUT KIND [OPTION=VALUE ...]`.

KIND says how it is split: `fsdp`, `mixed` (layers within a process, rows over processes), `across` (layers over
processes), `whole` (without rules). Options: `steps`, `save_every`; `die` (a place in the save of step 4 at which this
process kills itself, or `full`: it has no room to begin its part, or `half`: to end it) and `who` (which one does);
`check`: what is read is compared with the file. Prints what each process holds.
"""

import errno
import json
import os
import resource
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import optax

import jaxtransfer as jt
from jaxtransfer.devices import processes
from jaxtransfer.runs import arrays, checkpoints, collective

TEACHER = jt.models.mlp(4, hidden=(32,), name="teacher")
MODEL = jt.models.mlp(4, hidden=(32, 64))
BATCHES = [
    {
        "image": np.random.default_rng(number).normal(size=(16, 8)).astype(np.float32),
        "label": np.random.default_rng(number).integers(0, 4, 16, np.int32),
    }
    for number in range(8)
]
FSDP = {".*": jt.devices.fsdp("data", smallest=64)}
LAYERS = {"stage2/kernel": (None, "model"), "stage2/bias": ("model",), "head/kernel": ("model",)}
RULES = {"fsdp": FSDP, "mixed": {**LAYERS, **FSDP}, "across": {**LAYERS, ".*": None}, "whole": None}


def objective():
    """A loss with a teacher, an average, and an anchor."""
    shapes = jax.eval_shape(TEACHER.init, jax.random.key(5), BATCHES[0]["image"])
    drawn = np.random.default_rng(5)
    teacher = jt.frozen(TEACHER, jax.tree.map(lambda leaf: drawn.normal(size=leaf.shape).astype(np.float32), shapes))
    return jt.classification(MODEL) + jt.distillation(MODEL, teacher) + jt.averaged(jt.ema(MODEL, 0.9))


def mesh_of(kind):
    """The devices of all processes, as the kind of run names them."""
    devices = np.array(jax.devices())
    if kind == "mixed":
        return jax.sharding.Mesh(devices.reshape(-1, 2), ("data", "model"))
    if kind == "across":
        return jax.sharding.Mesh(devices.reshape(2, -1).T, ("data", "model"))
    return jax.sharding.Mesh(devices, ("data",)) if len(devices) > 1 else None


def own_part(batch):
    """The rows of a batch that this process makes."""
    size = 16 // processes.count()
    start = size * processes.index()
    return {name: rows[start : start + size] for name, rows in batch.items()}


class Evaluation:
    """Batches that don't say what they are, as each process has a part of its own."""

    def __iter__(self):
        return iter([own_part(batch) for batch in BATCHES[:2]])


def fit(out, kind, steps=6, save_every=2, **more):
    """Trains, or goes on."""
    parts = [own_part(batch) for batch in BATCHES]
    where = {"mesh": mesh_of(kind), "shard": RULES[kind]}
    periods = {"log_every": 1, "save_every": save_every, "eval_every": 2}
    return jt.fit(
        objective(), optax.adam(1e-2), parts, steps=steps, eval_data=Evaluation(), monitor="loss", maximize=False,
        out=out, keep=3, progress=False, **where, **periods, **more,
    )  # fmt: skip


def dying(place, who):
    """Ends this process at a place of its save of step 4, as a lost machine would."""
    if processes.index() != who:
        return

    def killing(function, when=lambda *_: True):
        def run(*arguments):
            if when(*arguments):
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return run

    of_4 = lambda folder, *_: "-4" in str(folder)  # noqa: E731
    if place == "before":
        arrays.begin = killing(arrays.begin, of_4)
    elif place == "written":
        collective.digests_below = killing(collective.digests_below, of_4)
    elif place == "full":

        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        begin = arrays.begin
        arrays.begin = lambda folder, leaves: full() if of_4(folder) else begin(folder, leaves)
    elif place == "half":  # its files may not grow beyond a few bytes: it fails beside the training, in its own write
        begin_whole = arrays.begin

        def half(folder, leaves):
            if of_4(folder):
                resource.setrlimit(resource.RLIMIT_FSIZE, (512, resource.RLIM_INFINITY))
            return begin_whole(folder, leaves)

        arrays.begin = half
    elif place == "merging":
        arrays.finish = killing(arrays.finish, of_4)
    else:
        collective.commit = killing(collective.commit, of_4)


def main(out, kind, **options):
    """Runs, and prints what this process holds of the state."""
    if "JAX_PROCESS_ID" in os.environ:
        jt.devices.start()
    if "die" in options:
        dying(options.pop("die"), int(options.pop("who")))
    check = options.pop("check", None)
    with processes.loss_told():
        fitted = fit(Path(out), kind, **{name: int(value) for name, value in options.items()})
    if check:
        saved = checkpoints.read(Path(out) / "checkpoints").leaves
        for path, leaf in jt.tree.leaves_by_path(fitted.state).items():
            leaf = jax.random.key_data(leaf) if processes.is_key(leaf) else leaf
            for part in leaf.addressable_shards if leaf.size else ():
                assert np.asarray(part.data).tobytes() == saved[path][part.index].tobytes(), path
    held = sum(
        part.data.nbytes
        for leaf in jax.tree.leaves((fitted.state.params, fitted.state.opt_state))
        for part in leaf.addressable_shards[:1]
    )
    print(json.dumps({"held": held, "step": int(processes.local(fitted.state.step))}))


if __name__ == "__main__":
    code = 0
    try:
        main(*sys.argv[1:3], **dict(word.split("=") for word in sys.argv[3:]))
    except jt.InputError as error:
        code = 2
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    except jt.LostProcessError:
        code = 75
    processes.leave(code)
