"""Training the stages of a method into one run directory."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxtransfer as jt
from jaxtransfer.cli.options import TrainOptions
from jaxtransfer.cli.runs import device_mesh
from jaxtransfer.errors import InputError
from jaxtransfer.methods import Stage
from jaxtransfer.runs.directory import CONFIG, open_run
from jaxtransfer.runs.report import evaluation, write_report


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
    eval_objective: jt.Objective | None = None,
    tables: Callable[[Any], Sequence[tuple[str, Sequence[str], Sequence[Any]]]] = lambda variables: (),
) -> None:
    """Trains each stage from the weights of the one before and writes the report; done stages are not repeated.

    The last stage's records lie in the run directory itself, an earlier one's in a folder of its name. The report gets
    `tables(variables)` of the model that was trained, (title, header, rows) each.
    """
    with opened(training.out, config):
        shares = split_steps(training.updates, [stage.share for stage in stages])
        check_model_takes(eval_model, config["model"], train)
        batches, evals = training.pipeline(train), jt.data.eval_batches(test, training.batch_size)
    training.say_steps()
    mesh = device_mesh() if training.mode == "jit" else None
    facts, earlier, first = facts_of(config), [], 0
    evaluated = eval_objective or jt.classification(eval_model)
    for number, (stage, steps) in enumerate(zip(stages, shares, strict=True)):
        last = number == len(stages) - 1
        out = training.out if last else training.out / f"stage-{number + 1}-{stage.name}"
        fitted = jt.fit(
            stage.objective_after(params, state),
            stage.optimizer,
            _From(batches, first),
            steps=steps,
            key=training.seed + number if stage.fresh else training.seed,
            params=None if stage.fresh else params,
            state=None if stage.fresh else state,
            eval_data=evals,
            eval_objective=evaluated,
            eval_every=training.eval_every,
            patience=training.patience,
            out=out,
            config=config,
            keep=training.keep,
            mesh=mesh,
            mode=training.mode,
            log=announcer(stage.name if len(stages) > 1 else ""),
        )
        params, state, first = fitted.state.params, fitted.state.state, first + steps
        own = {"params": params[eval_model.name], **state[eval_model.name]}
        heading = title if last else f"{title}: {stage.name}"
        report = write_report(out, heading, facts, earlier=earlier, tables=tables(own) if last else ())
        earlier.append(out.name)
        if last:
            print_results(training.out, fitted, report)


@contextmanager
def opened(out: Path, config: dict[str, Any]) -> Iterator[None]:
    """Holds the run directory; a run that turns out to be impossible before it began leaves no configuration there."""
    began = (out / CONFIG).exists()
    with open_run(out, config):
        try:
            yield
        except InputError:
            if not began:
                (out / CONFIG).unlink(missing_ok=True)
            raise


def check_model_takes(model: jt.Model, name: str, dataset: jt.data.Dataset) -> None:
    """Raises where the images don't fit the network, by tracing it: nothing is compiled or allocated."""
    image = jax.ShapeDtypeStruct((1, *dataset.image_shape), np.uint8)
    try:
        jax.eval_shape(model.init, jax.random.key(0), image)
    except InputError as error:
        raise InputError(f"{dataset.name} doesn't fit {name}: {error}") from error
    except Exception as error:  # whatever a network of another library raises
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{dataset.name} has images {dataset.image_shape}, which don't fit {name} ({reason}); choose another "
            f"--model or bring them to a shape that it takes"
        ) from error


def facts_of(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the rows of a report's first table: the configuration, without what only the reader of a run needs."""
    return {name: shown(value) for name, value in config.items() if name not in ("format", "knows", "heads")}


def shown(value: Any) -> Any:
    """Returns a value as the report shows it: a list by its first entries."""
    if not isinstance(value, list | tuple):
        return value
    more = f", … ({len(value)} in all)" if len(value) > 20 else ""
    return ", ".join(map(str, value[:20])) + more


def print_results(out: Path, fitted: jt.Fitted, report: Path) -> None:
    """Prints what a training came to."""
    if not fitted.timing:
        print(f"already done: {out} has its {int(fitted.state.step)} steps")
    if fitted.best:
        best = ", ".join(f"{k} {v:.4g}" for k, v in evaluation(fitted.best).items())
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

    def fingerprint(self) -> dict[str, Any]:
        return {**self.batches.fingerprint(), "first batch of the stage": self.first}


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
        if values := evaluation(record):
            line = "  ".join(f"{k} {v:.4f}" if abs(v) < 1e4 else f"{k} {v:.4g}" for k, v in values.items())
            print(f"{prefix + ' ' if prefix else ''}step {record['step']:>6}  {line}", file=sys.stderr)

    return log
