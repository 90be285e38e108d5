"""Learning rates over the steps of a run, each with a linear warm-up: what `jaxtransfer --schedule` names.

A schedule is a function of the step, as optax takes it: `optax.adam(jt.schedules.cosine(1e-3, 1000, warmup=50))`.
With a warm-up of W steps, step t < W has the rate · (t + 1) / (W + 1); what follows begins at the full rate.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtransfer.errors import InputError


def cosine(rate: float, steps: int, *, warmup: int = 0) -> optax.Schedule:
    """Returns rate · ½(1 + cos(π t / T)), from the full rate to 0 (Loshchilov, Hutter 2017, arXiv:1608.03983).

    Args:
      rate: at the peak.
      steps: of the whole run, warm-up included; T is what is left of them after it.
      warmup: steps in which the rate first rises.

    Raises:
      InputError: for a warm-up that leaves no steps.
    """
    return _warmed_up(optax.cosine_decay_schedule(rate, _after(steps, warmup)), rate, warmup)


def linear(rate: float, steps: int, *, warmup: int = 0) -> optax.Schedule:
    """Returns rate · (1 − t / T), from the full rate to 0, as BERT is fine-tuned (Devlin et al. 2019).

    Args:
      rate: at the peak.
      steps: of the whole run, warm-up included.
      warmup: steps in which the rate first rises.

    Raises:
      InputError: for a warm-up that leaves no steps.
    """
    return _warmed_up(optax.linear_schedule(rate, 0.0, _after(steps, warmup)), rate, warmup)


def constant(rate: float, *, warmup: int = 0) -> optax.Schedule:
    """Returns the full rate throughout.

    Args:
      rate: of all steps after the warm-up.
      warmup: steps in which the rate first rises.

    Raises:
      InputError: for a warm-up that is no number of steps.
    """
    return _warmed_up(optax.constant_schedule(rate), rate, warmup)


def step_decay(rate: float, milestones: Sequence[int], *, factor: float = 0.1, warmup: int = 0) -> optax.Schedule:
    """Returns rate · factorᵏ, k the number of milestones that the step has reached (He et al. 2016, arXiv:1512.03385).

    Args:
      rate: before the first milestone.
      milestones: steps, counted from the run's first, that rise.
      factor: by which each multiplies the rate, in (0, 1].
      warmup: steps in which the rate first rises.

    Raises:
      InputError: for milestones that are no whole numbers, don't rise or lie within the warm-up, and a factor out of
        range.
    """
    if not 0 < factor <= 1:
        raise InputError(f"factor must be in (0, 1]; got {factor}")
    places = list(milestones)
    for place in places:
        _check_whole("a milestone", place)
    if not places or sorted(set(places)) != places or places[0] <= warmup:
        raise InputError(f"milestones are steps that rise, after a warm-up of {warmup}; got {places}")
    later = optax.piecewise_constant_schedule(rate, {place - warmup: factor for place in places})
    return _warmed_up(later, rate, warmup)


def switch(before: float, after: float, *, at: int) -> optax.Schedule:
    """Returns one number up to a step and another from it on: penalties that set in once something is learned.

        weight = jt.schedules.switch(1.0, 100.0, at=500)
        objective = erm + weight * jt.adaptation.irm(model, domains=names)

    Args:
      before: of the steps 0 to at − 1.
      after: of the steps from `at` on.
      at: a step.

    Raises:
      InputError: for a step that is no whole number.
    """
    _check_whole("at", at)

    def switch(step):
        return jnp.where(jnp.asarray(step) < at, before, after)

    return switch


def warm_start(high: float = 1.0, *, low: float = 0.0, steps: int = 1000, alpha: float = 1.0) -> optax.Schedule:
    """Returns low + (high − low) · (2 / (1 + exp(−α t / T)) − 1), how adversaries' weights rise (Ganin et al. 2016).

    (arXiv:1505.07818, with α = 10 and T the steps of the run.) The defaults are those of Transfer-Learning-Library,
    slower: 0.46 after 1,000 steps, 0.76 after 2,000, 0.96 after 4,000. Early on features change with every step and a
    discriminator knows nothing of them yet: what it says then is noise, of which little should reach the features.

    Args:
      high: what it rises to.
      low: where it begins.
      steps: T, at which it has risen by tanh(α/2) of the way; it goes on rising after them.
      alpha: α, how steeply.

    Raises:
      InputError: for numbers that are not finite, steps below one, and an α that isn't positive.
    """
    if not all(np.isfinite(value) for value in (high, low, alpha)) or alpha <= 0:
        raise InputError(f"a warm start has finite numbers and a positive alpha; got {low} to {high}, alpha {alpha}")
    _check_whole("steps", steps)
    if steps < 1:
        raise InputError(f"a warm start takes one step or more; got {steps}")

    def ramp(step):
        return low + (high - low) * jnp.tanh(alpha / 2 * step / steps)  # the same, without an exponential to overflow

    return ramp


def linear_ramp(start: float, end: float, steps: int) -> optax.Schedule:
    """Returns start + (end − start) · t / T up to step T, then `end`: for weights and thresholds that change.

    With start 1/C and end 1 it is UDA's linear annealing of the training signal (Xie et al. 2020, arXiv:1904.12848).

    Args:
      start: at step 0.
      end: from step T on.
      steps: T.

    Raises:
      InputError: for no steps.
    """
    return _ramp(start, end, steps, lambda share: share)


def log_ramp(start: float, end: float, steps: int, *, rate: float = 5.0) -> optax.Schedule:
    """Returns start + (end − start) · (1 − exp(−5 t / T)): fast at first. UDA's for many labels; see `linear_ramp`.

    Args:
      start: at step 0.
      end: what it comes near to; at step T exp(−5), less than a hundredth, is missing, and it stays there.
      steps: T.
      rate: in place of 5.

    Raises:
      InputError: for no steps.
    """
    return _ramp(start, end, steps, lambda share: 1 - jnp.exp(-rate * share))


def exp_ramp(start: float, end: float, steps: int, *, rate: float = 5.0) -> optax.Schedule:
    """Returns start + (end − start) · exp(5 (t / T − 1)): fast at last. UDA's for few labels; see `linear_ramp`.

    Args:
      start: what it comes from; at step 0 it is exp(−5), less than a hundredth, on the way.
      end: from step T on.
      steps: T.
      rate: in place of 5.

    Raises:
      InputError: for no steps.
    """
    return _ramp(start, end, steps, lambda share: jnp.exp(rate * (share - 1)))


def _ramp(start: float, end: float, steps: int, shape: Callable[[jax.Array], jax.Array]) -> optax.Schedule:
    _check_whole("steps", steps)
    if steps < 1:
        raise InputError(f"a ramp has 1 step or more; got {steps}")

    def value(step):
        return start + (end - start) * shape(jnp.clip(jnp.asarray(step, jnp.float32) / steps, 0, 1))

    return value


def _after(steps: int, warmup: int) -> int:
    """The steps that are left after the warm-up."""
    _check_whole("steps", steps)
    _check_whole("a warm-up", warmup)
    if not 0 <= warmup < steps:
        raise InputError(f"a warm-up is shorter than the {steps} steps that it is a part of; got {warmup}")
    return steps - warmup


def _warmed_up(schedule: optax.Schedule, rate: float, warmup: int) -> optax.Schedule:
    _check_whole("a warm-up", warmup)
    if warmup < 0:
        raise InputError(f"a warm-up has 0 steps or more; got {warmup}")
    if not warmup:
        return schedule
    return optax.join_schedules([optax.linear_schedule(rate / (warmup + 1), rate, warmup), schedule], [warmup])


def _check_whole(what: str, steps: float) -> None:
    """Raises for a share of the run, where steps are counted."""
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer):
        raise InputError(f"{what} must be a whole number of steps, no share of them; got {steps!r}")


def weight_averaging(start: int, *, every: int = 1) -> optax.Schedule:
    """Returns the decay with which a moving average is the plain mean of some iterates: stochastic weight averaging.

    With n = (t − start) / every: n / (n + 1) where n is whole and not negative, else 1, so that the average stays
    (Izmailov et al. 2018, arXiv:1803.05407). Before `start` it is as it begins.

        objective = jt.classification(model) + jt.averaged(model, jt.schedules.weight_averaging(800, every=50))

    As with all averages the weights after t updates go in at the start of the next step. Batch statistics are to be
    renewed: `jt.recompute_statistics`.

    Args:
      start: the updates after which the first weights go in, alone.
      every: updates between two of them: an epoch, or a cycle of the learning rate.

    Raises:
      InputError: for what are no whole numbers, or an `every` below 1.
    """
    _check_whole("start", start)
    _check_whole("every", every)
    if every < 1:
        raise InputError(f"every must be at least one step; got {every}")

    def decay(step):
        after = jnp.asarray(step) - start
        number = after // every
        return jnp.where((after >= 0) & (after % every == 0), number / (number + 1), 1.0)

    return decay
