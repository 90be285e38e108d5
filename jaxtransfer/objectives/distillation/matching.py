"""Knowledge distillation: a student is drawn to what teachers say of the same inputs."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import losses
from jaxtransfer.errors import InputError
from jaxtransfer.forward import Forward
from jaxtransfer.losses._numerics import check_temperature
from jaxtransfer.model import Model
from jaxtransfer.objective import Batch, Context, Mean, Objective, fresh, view_of
from jaxtransfer.objectives.distillation.teachers import Source, Teacher, peers_of
from jaxtransfer.objectives.supervised.classification import check_labels
from jaxtransfer.parts.learned_weights import LearnedWeights
from jaxtransfer.parts.masking import mask_of
from jaxtransfer.parts.outputs import Tap, pick, shapes_of
from jaxtransfer.parts.rows import kept

Taps = Tap | Sequence[Tap] | Mapping[Tap, Tap]


def distillation(
    student: Model,
    teacher: Teacher | Sequence[Teacher],
    *,
    temperature: float | None = None,
    loss: Callable[..., jax.Array] | None = None,
    taps: Taps = "logits",
    adapter: Model | None = None,
    weights: Sequence[float] | None = None,
    learn_weights: bool = False,
    view: str = "image",
    teacher_view: str | None = None,
) -> Objective:
    """Builds (1/n) Σᵢ Σ_k w_k L(student(xᵢ), teacher_k(xᵢ)); by default L = T² KL(teacher/T ‖ student/T).

    (Hinton et al. 2015, arXiv:1503.02531.) A frozen teacher runs in inference mode on exactly what the student sees,
    receives no gradient and costs no backward pass; terms of a sum that share it run it once. Labels are read only by
    a loss that asks for them. Metrics: `distillation`; `agreement`, how often both choose the same class, where both
    give logits; with several teachers or taps each one's loss as `distillation/...`.

    Args:
      student: what trains.
      teacher: `jt.frozen(model, variables)`; `jt.ema(student)`, a mean teacher; `jt.cached()`, whose outputs the data
        bring along; `jt.peer(model)`, which trains in another term (mutual learning); or several of these.
      temperature: T of the default loss, 4 where nothing is said; not together with `loss`.
      loss: `loss(student, teacher)` of the tapped outputs, such as `functools.partial(jt.losses.dkd, beta=2.0)`:
        values [B], which are averaged with the batch's mask, or a scalar where examples meet, which then gets all rows
        of all devices. It is also given what it names among its arguments: `labels`, `mask`, and what an adapter
        returns besides the two.
      taps: which outputs are compared: a name; a list of names, whose losses add up; or a dict from the student's to
        the teacher's. A tuple in the place of a name hands the loss a tuple of maps: `[("stage1", "stage2")]` for
        `fsp` and `review_kd`.
      adapter: brings the two to one shape: a model of `(student, teacher)` whose outputs are `student`, `teacher` or
        both, and more for the loss; `jt.models.adapters` has some. It is trained along, under a name of its own for
        each pair: `<student>_<tap>_to_<teacher>_<adapter>`.
      weights: w_k, one per teacher; 1 / (number of teachers) by default.
      learn_weights: learn them with the student by uncertainty, Σ_k w_k (e^(−s_k) L_k + s_k) with s_k from 0 (Kendall
        et al. 2018, arXiv:1705.07115), which a plain learned weight would bring to zero. Metrics:
        `distillation/weight_k`.
      view: the entry of the batch that the student sees.
      teacher_view: the entry that the teacher sees; the student's by default.

    Returns:
      An objective over the student's parameters and, where there are any, the adapters' and weights'.

    Raises:
      InputError: for arguments that exclude each other or no run can have; at init, for a peer that no term trains,
        classes that differ, an output that does not exist (those that do are listed), labels out of range, shapes that
        the loss can't compare.
    """
    if loss is not None and temperature is not None:
        raise InputError("temperature is of the default loss; give functools.partial(loss, temperature=...) instead")
    if loss is None:
        temperature = 4.0 if temperature is None else temperature
        check_temperature(temperature)
        loss = functools.partial(losses.kd, temperature=temperature)
    if not isinstance(student, Model):
        raise InputError(f"expected a model to train as the student; got {type(student).__name__}")
    run = Forward.of(student, view)
    given = (teacher,) if not isinstance(teacher, Sequence) else tuple(teacher)
    sources = [Source.of(one, teacher_view or view) for one in given]
    shares = _shares(weights, len(sources))
    pairs = _pairs(student, sources, _as_taps(taps), adapter)
    learned = LearnedWeights(f"{student.name}_teacher_weights", len(sources))
    compare = _Comparison(loss)

    def term(outputs, params, state, batch, ctx):
        metrics, total, count = {}, jnp.zeros(()), jnp.ones(())
        for number, (source, share) in enumerate(zip(sources, shares, strict=True)):
            own = jax.lax.stop_gradient(source.outputs(outputs, batch))
            value = jnp.zeros(())
            for pair in (pair for pair in pairs if pair.source is source):
                state, inputs = pair.inputs(outputs[run], own, params, state, ctx)
                mean = compare(inputs, batch, ctx)
                value, count = value + mean.value, mean.count
                if len(pairs) > 1:
                    metrics[f"distillation/{pair.label}"] = mean
            if learn_weights:
                weight, bill = learned.of(params, number)
                metrics[f"distillation/weight_{number}"] = Mean(share * weight, jnp.ones(()))
                value = weight * value + bill
            total = total + share * value
            metrics |= _agreement(outputs[run], own, batch, ctx, "" if len(sources) == 1 else f"/{number}")
        return total, state, {"distillation": Mean(total * count, count), **metrics}

    def setup(key, batch):
        params, state = {}, {}
        if learn_weights:
            params |= learned.fresh()
        if adapter is not None:
            forwards = [run, *(source.forward for source in sources if source.forward is not None)]
            shapes = {forward: shapes_of(forward, batch) for forward in dict.fromkeys(forwards)}
            for pair in pairs:
                assert pair.adapter is not None
                seen = pair.picked(shapes[run], pair.source.outputs(shapes, batch))
                seen = jax.eval_shape(lambda *seen: seen, *seen)  # a cached teacher's are there already
                params[pair.name], state[pair.name] = fresh(pair.adapter, key, seen)
        return params, state

    def check(outputs, batch):
        for pair in pairs:
            mine, other = pair.picked(outputs[run], pair.source.outputs(outputs, batch))
            if pair.adapter is None and pair.student_tap == pair.teacher_tap == "logits" and mine.shape != other.shape:
                raise InputError(
                    f"student {student.name!r} has {mine.shape[-1]} classes, teacher {pair.source.name!r} "
                    f"{other.shape[-1]}; build the student with the teacher's classes, or compare other outputs (taps=)"
                )
        if "labels" in compare.wants:
            check_labels(student.name, pick(f"student {student.name!r}", outputs[run], "logits").shape[-1], batch)

    forwards = (run, *(source.forward for source in sources if source.forward is not None))
    adapters = tuple(pair.adapter for pair in pairs if pair.adapter is not None)
    peers = peers_of(given, student)
    return Objective("distillation", forwards, term, setup=setup, check=check, models=adapters, peers=peers)


class _Pair(NamedTuple):
    """A tapped output of the student beside one of a teacher, and what brings them to one shape."""

    name: str
    label: str
    student: str
    source: Source
    student_tap: Tap
    teacher_tap: Tap
    adapter: Model | None

    def picked(self, student, teacher) -> tuple[Any, Any]:
        """Returns the two outputs."""
        return pick(f"student {self.student!r}", student, self.student_tap), self.source.pick(teacher, self.teacher_tap)

    def inputs(self, student, teacher, params, state, ctx: Context) -> tuple[Any, dict[str, Any]]:
        """Returns the state and what the loss compares, by name."""
        mine, other = self.picked(student, teacher)
        if self.adapter is None:
            return state, {"student": mine, "teacher": other}
        outputs, state = ctx.run(self.adapter, params, state, (mine, other))
        return state, {"student": mine, "teacher": other, **outputs}


class _Comparison:
    """A loss with what it asks for besides the two outputs."""

    def __init__(self, loss: Callable[..., jax.Array]):
        if not callable(loss):
            raise InputError(f"loss must be a function of two outputs, jt.losses.hint say; got {loss!r}")
        self.loss = loss
        bound, parameters = getattr(loss, "keywords", {}), inspect.signature(loss).parameters
        self.wants = [name for name in parameters if name not in bound]
        named = {name for name, one in parameters.items() if one.kind is one.KEYWORD_ONLY and one.default is one.empty}
        self.needs = named - set(bound)

    def __call__(self, inputs: dict[str, Any], batch: Batch, ctx: Context) -> Mean:
        """Returns the mean over the global batch."""
        mask = mask_of(batch)
        rows: dict[str, Any] = {"student": inputs.pop("student"), "teacher": inputs.pop("teacher")}
        if "labels" in self.wants:
            rows["labels"] = view_of(batch, ("label",))
        rows = jax.tree.map(lambda leaf: kept(leaf, mask), rows)
        if "mask" in self.wants and mask is not None:
            rows["mask"] = mask
        extras = {name: inputs[name] for name in self.wants if name in inputs}
        if missing := sorted(self.needs - rows.keys() - extras.keys()):
            raise InputError(
                f"the loss needs {missing[0]!r}, which neither the batch nor an adapter gives: bind it, "
                f"functools.partial(loss, {missing[0]}=...), or take an adapter with that output"
            )

        def value(rows):
            rows = dict(rows)
            return self.loss(rows.pop("student"), rows.pop("teacher"), **rows, **extras)

        shape = jax.eval_shape(value, rows).shape
        size = jax.tree.leaves(rows)[0].shape[0]
        if shape == (size,):
            return ctx.mean(value(rows), mask)
        if shape != ():
            raise InputError(f"a loss gives one value per example [{size}] or a scalar; got shape {shape}")
        if mask is not None and "mask" not in self.wants:
            raise InputError(
                "the batch has a mask, and the loss, in which examples meet, takes none: add mask=None to it"
            )
        total = value(jax.tree.map(ctx.gather, rows))
        count = ctx.sum(jnp.ones(size) if mask is None else mask)
        return Mean(total * count, count)


def _agreement(student, teacher, batch, ctx: Context, suffix: str) -> dict[str, Mean]:
    mine, other = student.get("logits"), teacher.get("logits")
    if mine is None or other is None or mine.shape != other.shape or mine.ndim != 2:
        return {}
    same = (jnp.argmax(mine, -1) == jnp.argmax(other, -1)).astype(jnp.float32)
    return {f"agreement{suffix}": ctx.mean(same, mask_of(batch))}


def _shares(weights: Sequence[float] | None, teachers: int) -> list[float]:
    if not teachers:
        raise InputError("expected a teacher, or several; got none")
    if weights is None:
        return [1 / teachers] * teachers
    known = np.asarray(weights, float)
    if known.shape != (teachers,) or not np.all(np.isfinite(known) & (known >= 0)) or not known.sum() > 0:
        raise InputError(
            f"weights must be one finite number for each of the {teachers} teachers, not negative, not all 0; got "
            f"{list(weights)}. To draw away from a teacher give it a term of its own with a negative weight"
        )
    return [float(weight) for weight in weights]


def _as_taps(taps: Taps) -> list[tuple[Tap, Tap]]:
    if isinstance(taps, Mapping):
        return list(taps.items())
    return [(tap, tap) for tap in ([taps] if isinstance(taps, str) else taps)]


def _pairs(student: Model, sources: list[Source], taps: list[tuple[Tap, Tap]], adapter: Model | None) -> list[_Pair]:
    if not taps:
        raise InputError("taps: expected the name of an output, or several; got none")
    pairs, several = [], len(sources) > 1
    for number, source in enumerate(sources):
        for mine, other in taps:
            text = "_".join(mine) if isinstance(mine, tuple) else mine
            kind = "" if adapter is None else f"_{adapter.name}"
            name = f"{student.name}_{text}_to_{source.name}" + (f"_{number}" if several else "") + kind
            own = None if adapter is None else adapter.named(name)
            pairs.append(_Pair(name, f"{number}/{text}" if several else text, student.name, source, mine, other, own))
    return pairs
