"""Training the phases of a method into one run directory, as a command's options say."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np

import jaxtransfer as jt
from jaxtransfer.cli.dry_run import end_dry_run
from jaxtransfer.cli.options import TrainOptions
from jaxtransfer.cli.together import by_first
from jaxtransfer.cli.validation import chosen_where, result_of
from jaxtransfer.errors import InputError
from jaxtransfer.methods import Phase, train_phases
from jaxtransfer.methods import split_steps as split_steps
from jaxtransfer.runs.console import announce, facts_of, print_results
from jaxtransfer.runs.console import announcer as announcer
from jaxtransfer.runs.console import shown as shown
from jaxtransfer.runs.directory import open_run as open_run
from jaxtransfer.runs.report import write_report


def train_stages(
    stages: Sequence[Phase],
    config: dict[str, Any],
    training: TrainOptions,
    train: jt.data.Dataset,
    test: jt.data.Dataset,
    *,
    eval_model: jt.Model,
    title: str,
    val: jt.data.Dataset | None = None,
    params: Any = None,
    state: Any = None,
    eval_objective: jt.Objective | None = None,
    monitor: str | None = None,
    unused: Collection[str] = (),
    tables: Callable[[Any], Sequence[tuple[str, Sequence[str], Sequence[Any]]]] = lambda variables: (),
) -> None:
    """Trains each phase from the weights of the one before and writes the report; done phases are not repeated.

    The best step is chosen by `val`, and tested on `test` then; without `val` it is chosen by `test`.
    The last phase's records lie in the run directory itself, an earlier one's in a folder of its name. The report gets
    `tables(variables)` of the model that was trained, (title, header, rows) each, and no entries of the configuration
    that are `unused` by the method.
    """
    with open_run(training.out, config):
        split_steps(training.updates, [phase.share for phase in stages])  # raises
        check_model_takes(eval_model, config["model"], train)
        batches, evals = (
            training.pipeline(train),
            jt.data.eval_batches(test if val is None else val, training.batch_size),
        )
    training.say_steps()
    facts, earlier = facts_of({name: value for name, value in config.items() if name not in unused}), []

    def report(phase: Phase, out: Any, fitted: jt.Fitted) -> None:
        last, name = phase is stages[-1], eval_model.name
        if training.dry_run:
            return end_dry_run(training, fitted, phase="" if len(stages) == 1 else phase.name, last=last)
        result: dict[str, Any] = {}
        if last:
            result = result_of(training.out, fitted.best, val, test, training.batch_size)
        more = (
            []
            if val is None or not last
            else [(f"Test of step {result['step']}", ("", test.title), [*result["test"].items()])]
        )
        own = {"params": fitted.state.params[name], **fitted.state.state[name]}
        heading = title if last else f"{title}: {phase.name}"
        page = write_report(
            out,
            heading,
            facts,
            earlier=earlier,
            tables=[*more, *(tables(own) if last else ())],
            monitor=monitor or "accuracy",
            note=chosen_where(val, test, monitor or "accuracy"),
        )
        earlier.append(out.name)
        if last:
            print_results(training.out, fitted, page)
            if val is not None:
                told = ", ".join(f"{name} {value:.4g}" for name, value in result["test"].items())
                print(f"test of that step, on {test.title}: {told}")

    train_phases(
        stages,
        batches,
        steps=training.updates,
        key=training.seed,
        params=params,
        state=state,
        out=training.out,
        log=announce,
        after=by_first(report),
        eval_data=evals,
        eval_objective=eval_objective or jt.classification(eval_model),
        eval_every=training.eval_every,
        patience=training.patience,
        monitor=monitor,
        config=config,
        keep=training.keep,
        **training.where,
        **training.looked_at,
    )


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
