"""Training the stages of a method into one run directory."""

import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import jaxtransfer as jt
from jaxtransfer.cli.options import TrainOptions
from jaxtransfer.cli.runs import device_mesh
from jaxtransfer.methods import Stage
from jaxtransfer.report import write_report
from jaxtransfer.train.run import open_run


def train_stages(
    stages: Sequence[Stage],
    config: dict[str, Any],
    training: TrainOptions,
    train: jt.data.Dataset,
    test: jt.data.Dataset,
    *,
    eval_model: jt.Model,
    title: str,
    params: Any = None,
    state: Any = None,
) -> None:
    """Trains each stage from the weights of the one before and writes the report; done stages are not repeated.

    The last stage's records lie in the run directory itself, an earlier one's in a folder of its name.
    """
    with open_run(training.out, config):
        pass  # refuses another configuration before anything is trained
    batches = training.pipeline(train)
    evals = jt.data.eval_batches(test, min(training.batch_size, max(1, len(test))))
    mesh = device_mesh() if training.mode == "jit" else None
    if mesh is not None and len(evals.dataset):
        evals = jt.data.eval_batches(test, training.batch_size)
    shares, fitted, first = split_steps(training.steps, [stage.share for stage in stages]), None, 0
    for number, (stage, steps) in enumerate(zip(stages, shares, strict=True)):
        last = number == len(stages) - 1
        fitted = jt.fit(
            stage.objective,
            stage.optimizer,
            _From(batches, first),
            steps=steps,
            key=training.seed,
            params=params,
            state=state,
            eval_data=evals,
            eval_objective=jt.classification(eval_model),
            eval_every=training.eval_every,
            patience=training.patience,
            out=training.out if last else training.out / f"stage-{number + 1}-{stage.name}",
            config=config,
            keep=training.keep,
            mesh=mesh,
            mode=training.mode,
            log=announcer(stage.name if len(stages) > 1 else ""),
        )
        params, state, first = fitted.state.params, fitted.state.state, first + steps
    assert fitted is not None
    facts = {k: ", ".join(map(str, v)) if isinstance(v, list | tuple) else v for k, v in config.items()}
    report = write_report(training.out, title, facts)
    if not fitted.timing:
        print(f"already done: {training.out} has its {int(fitted.state.step)} steps")
    if fitted.best:
        best = ", ".join(f"{k.removeprefix('eval/')} {v:.4g}" for k, v in fitted.best.items() if k != "step")
        print(f"best evaluation, at step {fitted.best['step']}: {best}")
    if fitted.timing:
        print(
            f"{fitted.timing['seconds']:.1f} s, {fitted.timing['examples_per_second']:.0f} examples/s, "
            f"{100 * fitted.timing['data_wait_fraction']:.2f} % of the time waiting for data"
        )
    print(f"report: {report}")


class _From:
    """The batches of a pipeline from a position on: a later stage reads on where the one before ended."""

    def __init__(self, batches, first: int):
        self.batches, self.first = batches, first

    def iterate(self, start: int):
        return self.batches.iterate(self.first + start)


def split_steps(steps: int, shares: Sequence[float]) -> list[int]:
    """Returns whole numbers of steps, at least one each, that add up to `steps` in proportion to the shares."""
    if steps < len(shares):
        raise jt.InputError(f"the method has {len(shares)} stages and needs as many steps; got --steps {steps}")
    bounds, total = [0], sum(shares)
    for number in range(1, len(shares) + 1):
        ideal = round(steps * sum(shares[:number]) / total)
        bounds.append(min(max(ideal, bounds[-1] + 1), steps - (len(shares) - number)))
    return [after - before for before, after in pairwise(bounds)]


def announcer(prefix: str) -> Callable[[dict[str, Any]], None]:
    """Returns a logger that prints each evaluation as a line."""

    def log(record: dict[str, Any]) -> None:
        values = {k.removeprefix("eval/"): v for k, v in record.items() if k.startswith("eval/")}
        if values:
            line = "  ".join(f"{k} {v:.4f}" for k, v in values.items())
            print(f"{prefix + ' ' if prefix else ''}step {record['step']:>6}  {line}", file=sys.stderr)

    return log
