"""Which examples choose the best step, and what the chosen weights score on others."""

from pathlib import Path
from typing import Any

import jaxtransfer as jt
from jaxtransfer.cli.options import DataOptions, load_pair
from jaxtransfer.cli.runs import load_run
from jaxtransfer.errors import InputError
from jaxtransfer.runs.report import evaluation
from jaxtransfer.runs.result import read_result, write_result

Sets = tuple[jt.data.Dataset, jt.data.Dataset | None, jt.data.Dataset]


def share_of(val_split: str | None) -> float | None:
    """Returns the share of the training examples that --val-split asks for; None where it names a split.

    Raises:
      InputError: for a number that is no share.
    """
    try:
        share = float(val_split or "")
    except ValueError:
        return None
    if not 0 < share < 1:
        raise InputError(f"--val-split is a split, or a share of the training examples below 1; got {val_split}")
    return share


def load_sets(data: DataOptions, val_split: str | None, shape: Any, *, seed: int, **how: Any) -> Sets:
    """Returns what is trained on, what the best step is chosen by (None for the last), and what is tested on.

    Args:
      data: the options of the data.
      val_split: of the command line.
      shape: of the images.
      seed: of the choice of examples.
      **how: further arguments of `load_pair`.

    Raises:
      InputError: for splits that share examples.
    """
    share, held = share_of(val_split), []

    def prepare(train: jt.data.Dataset) -> jt.data.Dataset:
        if share is None:
            return train
        rest, chosen = jt.data.hold_out(train, share, seed=seed)
        held.append(chosen)
        return rest

    if val_split is not None and share is None:
        for name in ("split", "eval_split"):
            check_apart(data, name, getattr(data, name), val_split)
    train, test = load_pair(data, shape, seed=seed, prepare=prepare, **how)
    if val_split is None:
        return train, None, test
    if share is None:
        resizing = {"resizing": how["resizing"]} if "resizing" in how else {}
        val = jt.data.load(data.data, val_split, data_dir=data.data_dir, image_shape=shape, **resizing)
        if val.class_names != train.class_names:
            raise InputError(f"{data.data}: split {val_split!r} has other classes than {data.split!r}")
        return train, val, test
    return train, held[0], test


def chosen_where(val: jt.data.Dataset | None, test: jt.data.Dataset, metric: str) -> str:
    """Returns what a report says of the examples on which the best step was chosen."""
    if val is None:
        return (
            f"On {test.title}, {len(test)} examples. The best step is the one of the best {metric} on these same "
            f"examples, so what stands here for it is a little too good; --val-split chooses on others."
        )
    return (
        f"On {val.title}, {len(val)} examples, by whose best {metric} the best step is chosen. On {test.title} it is "
        f"tested once, below."
    )


def result_of(out: Path, best: Any, val: jt.data.Dataset | None, test: jt.data.Dataset, rows: int) -> dict[str, Any]:
    """Returns, and writes, what a run came to: the chosen step, and its scores on the test examples.

    Args:
      out: the run directory.
      best: the record of the chosen step.
      val: by what it was chosen; None for the test examples themselves.
      test: what it is tested on.
      rows: examples at a time.
    """
    chosen = {name: float(value) for name, value in evaluation(best).items()} if best else {}
    where = (test if val is None else val).title
    result = {"step": best["step"] if best else None, "chosen on": where, "chosen by": chosen}
    if val is None:
        result |= {"test on": where, "test": chosen}
    else:
        known = read_result(out) or {}
        same = all(known.get(name) == value for name, value in {**result, "test on": test.title}.items())
        result |= {"test on": test.title, "test": known["test"] if same else _tested(out, test, rows)}
    write_result(out, result)
    return result


def _tested(out: Path, test: jt.data.Dataset, rows: int) -> dict[str, float]:
    run = load_run(out)
    state = jt.TrainState.of(run.params, run.state, step=run.step)
    scores = jt.evaluate(jt.classification(run.model), state, jt.data.eval_batches(test, rows))
    return {name: float(value) for name, value in scores.items()}


def check_apart(data: DataOptions, option: str, split: str, val_split: str) -> None:
    """Raises for a split that shares examples with that of --val-split, or where nothing tells."""

    def size_of(name: str) -> int:
        return len(jt.data.load(data.data, name, data_dir=data.data_dir))

    name = f"--{option.replace('_', '-')}"
    try:
        shared = jt.data.share_examples(split, val_split, size_of)
    except InputError:
        one, other = ({part.partition("[")[0].strip() for part in both.split("+")} for both in (split, val_split))
        if not one & other:
            return
        for one_split in (split, val_split):  # raises for what isn't there
            size_of(one_split)
        raise InputError(
            f"{name} {split} and --val-split {val_split}: nothing tells whether they have examples in common; write "
            f"slices in plain numbers or percent, as train[:90%] and train[90%:], or give a share: --val-split 0.1"
        ) from None
    if shared:
        raise InputError(
            f"{name} {split} and --val-split {val_split} have examples in common; slice them apart, as train[:90%] and "
            f"train[90%:], or give a share: --val-split 0.1"
        )
