"""The loop: one for every objective, resumable at any step."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from jaxtransfer.devices import processes
from jaxtransfer.devices.in_flight import InFlight
from jaxtransfer.devices.parts import within_reach
from jaxtransfer.devices.placement_table import state_table
from jaxtransfer.devices.sharding import Rule
from jaxtransfer.errors import InputError
from jaxtransfer.objective import Batch, Objective
from jaxtransfer.runs import loggers, selection
from jaxtransfer.runs.checkpoints import Checkpoints
from jaxtransfer.runs.directory import open_run
from jaxtransfer.runs.note import noted
from jaxtransfer.train.arguments import check_batches, check_objective, check_optimizer, check_takes, key_of
from jaxtransfer.train.batches import DrawnInside, FromHost, check_apart, check_transform, rows_in
from jaxtransfer.train.clock import Clock
from jaxtransfer.train.compilation import compiled_step, cut_evaluation, told_of
from jaxtransfer.train.evaluation import eval_step
from jaxtransfer.train.identity import of_evaluation, of_split, of_training
from jaxtransfer.train.interrupt import EvaluationCut, noticed
from jaxtransfer.train.patience import Patience
from jaxtransfer.train.plan import Plan
from jaxtransfer.train.records import Call, as_json, evaluated, finite, flush, measured, measures_of
from jaxtransfer.train.refresh import Refresh, check_refresh
from jaxtransfer.train.resumption import CUT, resumed
from jaxtransfer.train.state import TrainState, init
from jaxtransfer.train.step import Transform
from jaxtransfer.train.trace import Trace, folder_of

_LOG = logging.getLogger("jaxtransfer")
_PENDING = "unrecorded"  # in a checkpoint between two records: what the next one will hold


class Fitted(NamedTuple):
    """What `fit` gives back.

    Attributes:
      state: the last state, in its parts over several processes; the best one is in `out`: `jt.load_run(out)`.
      history: the records of the run, dicts of `step`, `train/...` and `eval/...`; those of the training also hold
        what `train_step(watch=True)` tells: `train/gradient_norm`, and, where they are known, `train/learning_rate` and
        `train/weight/<term>`, the last ones.
      best: the evaluation record with the best score, or None without evaluation.
      timing: what `Clock.report` tells of this call: `seconds`, `compile_seconds`, `data_wait_fraction`,
        `steps_per_second`, `examples_per_second`, `flops_per_step`, `flop_utilisation`, the peak of memory; empty
        where the run was already done. After a dry run `flops_per_step` and the bytes of the compiled step:
        `argument_bytes`, `output_bytes`, `temporary_bytes`, `program_bytes`.
    """

    state: TrainState
    history: list[dict[str, Any]]
    best: dict[str, Any] | None
    timing: dict[str, float]

    def __repr__(self):
        """The result, without the arrays: `Fitted(step 300; best at 200: eval/accuracy 0.912; last: ...; 12 s)`."""
        last = {name: value for record in self.history for name, value in record.items()}
        shown = [f"step {last['step']}" if last else "nothing recorded"]
        if self.best is not None:
            shown.append(f"best at {self.best['step']}: {measures_of(self.best)}")
        if listed := measures_of(last):
            shown.append(f"last: {listed}")
        if "seconds" in self.timing:
            shown.append(f"{self.timing['seconds']:.3g} s")
        return f"Fitted({'; '.join(shown)})"


def fit(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    data: Any,
    *,
    steps: int,
    key: jax.Array | int = 0,
    params: Any = None,
    state: Any = None,
    eval_data: Iterable[Batch] | None = None,
    eval_objective: Objective | None = None,
    eval_every: int | None = None,
    monitor: str | None = None,
    maximize: bool = True,
    patience: int | None = None,
    out: str | Path | None = None,
    config: dict[str, Any] | None = None,
    model: Any = None,
    dataset: Any = None,
    save_every: int | None = None,
    keep: int = 2,
    log_every: int | None = None,
    mesh: Mesh | None = None,
    shard: Mapping[str, Rule] | None = None,
    mode: str = "jit",
    sample: Callable[[jax.Array, Any], Batch] | None = None,
    steps_per_call: int | None = None,
    transform: Transform | None = None,
    measure: Callable[[TrainState], Mapping[str, float]] | None = None,
    measure_every: int | None = None,
    refresh: Refresh | None = None,
    progress: bool | None = None,
    data_patience: float | None = 60.0,
    profile: bool = False,
    dry_run: bool = False,
    log: Callable[[dict[str, Any]], None] | None = None,
) -> Fitted:
    """Trains an objective; with `out`, the same call resumes an interrupted run and ends as the unbroken run would.

    In several processes, which `jt.devices.start()` joined, each calls it with the same arguments and with its part of
    the batches, as `jt.data.pipeline` makes them: the rows of process 0 first. All have the devices of all as their
    `mesh`. The first one writes `out`, which all of them can read, and measures; they stop at the same step. Their
    number may be another one when the run goes on.

    With `out` and in the main thread, SIGINT (Ctrl-C) and SIGTERM let the step, or the call of several, finish and be
    saved before they end the run; a second one ends it at once. Handlers that a caller has installed stay.

    Args:
      objective: what to minimise.
      optimizer: any optax transformation; or what `jt.alternate` gave with the objective, for updates in turns.
      data: batches: a `jt.data.pipeline` or anything with `iterate(start)`, or an iterable. Batch i must depend on i
        alone; an iterable is read from its beginning to the position when a run resumes.
      steps: batches in all: updates, unless the optimiser accumulates gradients.
      key: a JAX key or a seed; all randomness of the training follows from it.
      params: weights to start from, by model name; copied.
      state: batch statistics and averages to start from, as for `jt.init`.
      eval_data: batches that can be iterated again, such as `jt.data.eval_batches`.
      eval_objective: what to evaluate; the training objective by default, whose loss has its penalties: with a loss
        of your own, `jt.classification(model)` chooses by the accuracy.
      eval_every: steps between evaluations; always also at the end. Ten evaluations by default.
      monitor: the evaluation metric by which the best checkpoint is kept and training stops early; by default
        `accuracy` where there is one, else the smallest `loss`.
      maximize: whether more of `monitor` is better.
      patience: stop after this many evaluations without an improvement; None never stops early.
      out: the run directory: `config.json`, `identity.json`, `metrics.jsonl`, `timing.jsonl`, `tensorboard/`,
        `checkpoints/`. What determines the weights is noted there and compared when the run goes on: the seed, the
        data (what `data.fingerprint()` says, else the first batch), batch size, objective, optimiser, transform,
        refresh, weights to start from, frozen weights. Devices and the periods of records may change.
      config: what is noted as the run's configuration; another one in the same `out` is refused.
      model: which of the models that the objective trains the run is for, or `jt.ema(model)`, its average; noted in
        `out` for `jt.load_run`, and, where it is of the zoo, for the commands evaluate, predict, finetune and distill.
      dataset: what it learns from, beside `model`: its class names, image shape, name and split are noted. By default
        that of `data`, a pipeline, where there is one.
      save_every: steps between checkpoints; at each evaluation by default, always also at the end.
      keep: how many of the newest checkpoints stay, besides the best.
      log_every: steps between training records, each the mean of the steps since the last one; 50 in all by default.
      mesh: as for `train_step`.
      shard: as for `train_step`; the logger `jaxtransfer` tells who lives where. Devices may change when the run goes
        on. With rules where it began without, or the other way round, it may be refused for its starting weights:
        drawn in parts, by one program, they can differ in their last bits. Give params= where that matters.
      mode: as for `train_step`.
      sample: `sample(key, data) -> batch` draws each batch inside the compiled step from `data`, arrays that live on
        the devices, such as `jt.data.Episodes.on_device` gives.
      steps_per_call: with `sample`, steps that run in one call of the program; records, evaluations and checkpoints
        are then that many steps apart or a multiple. By default 1 on a CPU where the program holds convolutions,
        which XLA runs slowly there inside loops, else up to 100, the period of the records.
      transform: as for `train_step`: random views inside the compiled step, for training alone. What
        `jt.data.augment` makes goes to `jt.data.pipeline(augment=)`.
      measure: `measure(state) -> {name: value}`, whatever else is to be known of a state, `jt.representation.
        neighbours(...)` say, and not what `jt.evaluate(measures=)` takes; noted as `eval/name`, and
        `monitor` may name it.
      measure_every: steps between measurements; by default at each evaluation. A measured state is saved.
      refresh: a `jt.Refresh(every, fn)`: what of the state is made anew before every so many steps, from a pass over
        all data say.
      progress: show a progress bar; None shows it on a terminal.
      data_patience: seconds without a batch after which a warning says what is waited for, and again after as many;
        after ten times as many the run ends. Only the main thread can be ended so. None waits for ever.
      profile: whether to write a trace of a few steps to `out/profile/`, for TensorBoard, XProf or Perfetto, and to
        measure what the device makes of a product of matrices where its data sheet isn't known.
      dry_run: compile the step, make none, and tell in `timing` what it takes on each device; nothing is written.
      log: called with each record, in addition to the files; in the first of several processes.

    Returns:
      A `Fitted`.

    Raises:
      KeyboardInterrupt: after SIGINT.
      SystemExit: after SIGTERM, with code 143.
      LostProcessError: where another process is gone.
      StuckDataError: where a batch did not come, see `data_patience`.
      NonFiniteLossError: names the step and the term that is not finite; the last good checkpoint stays.
      InputError: for an unusable argument, before anything is compiled; for a run in `out` that is another one, by
        the name of what differs.
    """
    out = None if dry_run else out
    _check_counts(
        steps=steps, eval_every=eval_every, save_every=save_every, log_every=log_every, patience=patience, keep=keep
    )
    _check_counts(measure_every=measure_every)
    check_objective(objective)
    check_optimizer(optimizer)
    check_apart(objective, data)
    check_transform(transform, data)
    check_takes(sample, "sample", "key", "data")
    check_takes(measure, "measure", "state")
    check_refresh(refresh)
    check_takes(transform, "transform", "key", "batch", "rows")
    if sample is None:
        check_batches(data, "fit")
    if eval_data is not None:
        check_batches(eval_data, "evaluate")
    seed = key
    key = key_of(key)
    better = selection.score_of(monitor, maximize)
    own = getattr(data, "dataset", None)
    learned = dataset if dataset is not None or model is None else own
    described = noted(objective, model, learned, config, seed=seed, monitor=monitor, maximize=maximize, batches_of=own)
    note = {"steps": steps, **described}
    with ExitStack() as stack:
        stack.enter_context(processes.loss_told())
        waits = stack.enter_context(Patience(data_patience, resumes=out is not None))
        checkpoints = None
        if out is not None:
            out = stack.enter_context(open_run(out, note))
            checkpoints = Checkpoints(out / "checkpoints", keep=keep, score=better)
            stack.callback(checkpoints.close)
        trace = Trace(folder_of(out, profile=profile and not dry_run))
        stack.callback(trace.close)
        where = {"mesh": mesh, "shard": shard, "mode": mode}
        source = (
            FromHost(objective, optimizer, data, where, transform, key, waits)
            if sample is None
            else DrawnInside(objective, optimizer, data, where, transform, key, sample)
        )
        here = {"params": params, "state": state, "shard": shard, "mesh": None if shard is None else mesh}
        current = init(objective, optimizer, key, source.first, **here)
        together = source.steps_per_call(current, steps_per_call, at_most=log_every or max(1, steps // 50))
        if refresh is not None:
            together = refresh.calls_of(together, asked=steps_per_call is not None)
        measures = (measure_every or eval_every or max(1, steps // 10)) if measure is not None else None
        plan = Plan.of(steps, eval_every, save_every, log_every, eval_data is not None, together, measures)
        start, history, kept = 0, [], {}
        if out is not None and checkpoints is not None:
            begun, given = processes.local(current), not (params is None and state is None)
            known = of_split(objective, begun)

            def facts(begun: TrainState = begun) -> dict[str, Any]:
                told = of_training(objective, optimizer, begun, source.first, given=given, arrays=known)
                again = None if refresh is None else refresh.facts()
                return {**told, **source.facts(key), "evaluation data": of_evaluation(eval_data), "refresh": again}

            evaluates = eval_data is not None
            current, start, history, kept = resumed(
                out, checkpoints, current, facts, plan=plan, evaluates=evaluates, note=note, learned=learned
            )
        owed = eval_data is not None and kept.get(CUT, False)  # the evaluation of the step that was saved last
        if (start >= steps and not owed) or selection.exhausted(history, better, patience):
            return Fitted(current, history, selection.best(history, better), {})
        if start:
            _LOG.info("%s: resumes from step %d of %d", out, start, steps)
        if shard is not None and processes.is_first():
            _LOG.info("%s", state_table(current))

        sinks: list[loggers.Logger] = [history.append]
        timing_sink = None
        if out is not None and processes.is_first():
            sinks.append(stack.enter_context(loggers.jsonl(Path(out) / "metrics.jsonl", up_to=start)))
            sinks.append(stack.enter_context(loggers.tensorboard(Path(out) / "tensorboard", up_to=start)))
            timing_sink = stack.enter_context(loggers.jsonl(Path(out) / "timing.jsonl", up_to=start))
        bar = stack.enter_context(loggers.progress_bar(steps, start, show=progress if processes.is_first() else False))
        evaluate = None
        if eval_data is not None:
            evaluate = eval_step(eval_objective or objective, **where)

        clock = Clock(rows=rows_in(data, source.first), measure=profile)
        stack.callback(source.close)
        signals = stack.enter_context(noticed(active=checkpoints is not None))
        if start < steps:
            cost = compiled_step(source, current, plan.size(start), start, signals, bar)
            if dry_run:
                return Fitted(current, history, None, told_of(cost))
            clock.costs(cost)
        source.open(start, steps)
        pending: deque[Call] = deque(Call(*entry) for entry in kept.get(_PENDING, ()))
        in_flight, number = InFlight(), start
        while number < steps or owed:
            records: list[dict[str, Any]] = []
            if not owed:
                in_flight.wait()
                if refresh is not None:
                    current = refresh.at(number, current)
                size = plan.size(number)
                with clock.waiting():
                    advance = source.next(size)
                trace.next_call()
                current, metrics = advance(current)
                number += size
                pending.append(Call(number - size + 1, number, metrics))
                in_flight.add(metrics)
                clock.stepped(metrics, size)
                bar(number, "")
                if plan.logs(number):
                    records.append(record := flush(pending, checkpoints))
                    for sink in sinks:
                        sink(record)
                    if timing_sink:
                        timing_sink({"step": number, **clock.report()})
                    bar(number, measures_of(record).replace("train/", ""))
            meta: dict[str, Any] = {}
            saves = plan.saves(number) or owed
            if evaluate is not None and eval_data is not None and plan.evaluates(number):
                try:
                    with clock.aside():
                        batches = waits.each(eval_data, "the evaluation data")
                        values = cut_evaluation(evaluate, jax.block_until_ready(current), batches, signals)
                    meta = evaluated(values, number, monitor if measure is None else None, checkpoints)
                except EvaluationCut:
                    meta = {CUT: True}
            if CUT not in meta:
                if measure is not None and plan.measures(number):
                    asked = monitor if meta or evaluate is None else None  # else the evaluations to come may hold it
                    meta = measured(_measured(measure, current), number, meta, asked)
                for sink in [records.append, *sinks] if meta else ():
                    sink(meta)
            owed, done = False, selection.exhausted(history, better, patience)
            stopping = signals.stops()  # asked once: what comes from here on is for the next step
            if checkpoints is not None and (saves or done or stopping):
                if pending:
                    meta = {**meta, _PENDING: as_json(finite(pending, checkpoints))}
                checkpoints.save(number, current, meta)
            if log is not None and processes.is_first():
                for record in records:  # last: what a caller's logger raises costs no checkpoint
                    log(record)
            if done or stopping:
                break
        if checkpoints is not None and signals.stopped:
            processes.first_does(checkpoints.wait)
            signals.end(number, checkpoints.directory.parent)
        jax.block_until_ready(current.step)
        return Fitted(processes.local(current), history, selection.best(history, better), clock.report())


def _measured(measure: Callable[[TrainState], Mapping[str, float]], state: TrainState) -> dict[str, float]:
    """Returns what is measured of a state; of several processes the first one does, over all of the data."""
    whole = within_reach(state)
    return processes.first_tells(lambda: {name: float(value) for name, value in measure(whole).items()})


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and (value < 1 or int(value) != value):
            raise InputError(f"{name} must be a positive whole number; got {value}")
