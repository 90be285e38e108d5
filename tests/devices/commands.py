"""Runs, one after the other in the same processes: `commands.py OUT ROW ...`; after the row `alone` in one process.

Each leaves a run in OUT/ROW. What some start from, OUT/pretrain, is a row too.
"""

import sys
from pathlib import Path

import numpy as np
import optax

import jaxtransfer as jt
from jaxtransfer.devices import processes

FEW = ("--steps", "4", "--eval-every", "2", "--optimizer", "sgd", "--lr", "0.02")
UPRIGHT = ("--data", "digits/upright", *FEW, "--model", "mlp")
NOISY = ("--data", "digits/noisy", *FEW, "--batch-size", "16")
EPISODES = ("--split-classes", "4", "3", "3", "--ways", "3", "--queries", "3", "--test-episodes", "20")
DOMAINS = ("--source", "digits/upright", "--target", "digits/noisy")
ROWS = {
    "pretrain": ("pretrain", *UPRIGHT, "--batch-size", "16"),
    "finetune": ("finetune", "--from", "{out}/pretrain", *NOISY, "--method", "l2-sp"),
    "distill": ("distill", "--teacher", "{out}/pretrain", *NOISY, "--model", "mlp"),
    "simclr": ("contrast", *UPRIGHT, "--batch-size", "16", "--knn-every", "2"),
    "moco": ("contrast", *UPRIGHT, "--batch-size", "16", "--method", "moco", "--queue", "64"),
    "maml": ("meta", *UPRIGHT, "--method", "maml", "--tasks", "4", *EPISODES),
    "pcgrad": (
        *("multitask", "--data", "digits/upright", "digits/noisy", *FEW, "--batch-size", "16"),
        *("--method", "pcgrad", "--model", "mlp"),
    ),
    "dann": ("adapt", *DOMAINS, *FEW, "--batch-size", "16", "--method", "dann", "--model", "mlp", "--compare", "none"),
}
READERS = {
    "evaluate": ("evaluate", "{out}/pretrain", "--split", "test[:133]", "--batch-size", "50"),
    "evaluate-several": ("evaluate", "{out}/pretrain", "--data", "digits/upright", "digits/noisy@test[:7]"),
    "evaluate-features": ("evaluate", "{out}/simclr", "--split", "test[:61]", "--batch-size", "40"),
    "evaluate-tasks": ("evaluate", "{out}/pcgrad", "--split", "test[:61]", "--batch-size", "40"),
    "predict.jsonl": ("predict", "{out}/pretrain", "{out}/pictures", "--batch-size", "5", "--features"),
}


def two_tasks(out: Path, mesh=None, *, spoiled: bool = False, **options) -> jt.Fitted:
    """Two balanced tasks of one network, through the library: no command has several."""
    rng = np.random.default_rng(0)
    columns = {"image": rng.normal(size=(50, 2, 3, 1)).astype(np.float32)}
    columns |= {"label": rng.integers(0, 3, 50, np.int32), "odd": rng.integers(0, 2, 50, np.int32)}
    examples = jt.data.Dataset.from_columns(columns)
    net = jt.models.mlp(3, hidden=(8,))
    losses = jt.classification(net) + jt.classification(net, label="odd").named("odd")
    return jt.fit(
        jt.balance(losses, jt.multitask.pcgrad),
        optax.sgd(1e38 if spoiled else 0.02, momentum=0.9),
        jt.data.pipeline(examples, 16),
        eval_data=jt.data.eval_batches(examples, 16),  # the last batch has two examples, both of process 0
        monitor="loss",
        maximize=False,
        mesh=mesh,
        out=out,
        **{"steps": 4, "eval_every": 2, **options},
    )


def without_reports() -> None:
    """Leaves out what the first process does alone, once training is over, where it takes longer than all else."""
    from jaxtransfer.cli import adapt, contrast, meta, multitask
    from jaxtransfer.runs import report

    for command, name in (
        (contrast.Contrast, "_reported"),
        (meta.Meta, "_tested"),
        (adapt.Adapt, "_reported"),
        (multitask.Multitask, "_reported"),
    ):
        setattr(command, name, lambda *_: None)
    report.plot_curves = lambda _, path: path.write_bytes(b"")


def run(out: Path, names: list[str]) -> int:
    """Runs the rows and returns the first exit code that is not 0."""
    several = "alone" not in names
    if several:
        jt.devices.start()
    for name in names:
        if name == "two-tasks":
            two_tasks(out / name, jt.devices.device_mesh())
        elif name != "alone":
            from jaxtransfer.cli import main

            without_reports()
            words = [word.format(out=out) for word in {**ROWS, **READERS}[name]]
            code = main([*words, "--out", str(out / name), *(["--distributed"] if several else [])])
            if code:
                return code
    return 0


if __name__ == "__main__":
    processes.leave(run(Path(sys.argv[1]), sys.argv[2:]))
