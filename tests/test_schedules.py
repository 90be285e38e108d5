"""Learning rates over the steps, each against its formula written out."""

import math

import jax
import numpy as np
import pytest

import jaxtransfer as jt


def rates(schedule, steps):
    return [float(schedule(step)) for step in range(steps)]


@pytest.mark.parametrize("warmup", [0, 3])
def test_each_schedule_is_its_formula(warmup):
    steps, rate = 10, 0.4
    rising = [rate * (t + 1) / (warmup + 1) for t in range(warmup)]
    left = steps - warmup
    expected = {
        "cosine": [rate * 0.5 * (1 + math.cos(math.pi * t / left)) for t in range(left)],
        "linear": [rate * (1 - t / left) for t in range(left)],
        "constant": [rate] * left,
        "step": [rate * 0.5 ** ((t + warmup >= 5) + (t + warmup >= 8)) for t in range(left)],
    }
    got = {
        "cosine": jt.schedules.cosine(rate, steps, warmup=warmup),
        "linear": jt.schedules.linear(rate, steps, warmup=warmup),
        "constant": jt.schedules.constant(rate, warmup=warmup),
        "step": jt.schedules.step_decay(rate, (5, 8), factor=0.5, warmup=warmup),
    }
    for name, schedule in got.items():
        assert rates(schedule, steps) == pytest.approx(rising + expected[name], rel=1e-5), name


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: jt.schedules.cosine(1.0, 5, warmup=5), "shorter than the 5 steps"),
        (lambda: jt.schedules.linear(1.0, 5, warmup=-1), "shorter than the 5 steps"),
        (lambda: jt.schedules.step_decay(1.0, ()), "steps that rise"),
        (lambda: jt.schedules.step_decay(1.0, (3, 3)), "steps that rise"),
        (lambda: jt.schedules.step_decay(1.0, (2, 5), warmup=2), "after a warm-up of 2"),
        (lambda: jt.schedules.step_decay(1.0, (2,), factor=0), "factor must be"),
        (lambda: jt.schedules.step_decay(1.0, (0.5, 0.75)), "a milestone must be a whole number of steps.*got 0.5"),
        (lambda: jt.schedules.cosine(1.0, 100, warmup=0.1), "a warm-up must be a whole number of steps.*got 0.1"),
        (lambda: jt.schedules.linear(1.0, 7.5), "steps must be a whole number of steps"),
        (lambda: jt.schedules.constant(1.0, warmup=0.1), "a warm-up must be a whole number"),
        (lambda: jt.schedules.constant(1.0, warmup=-1), "0 steps or more"),
        (lambda: jt.schedules.step_decay(1.0, (2,), warmup=-2), "0 steps or more"),
    ],
)
def test_what_can_be_no_schedule(make, expected):
    with pytest.raises(jt.InputError, match=expected):
        make()


def test_ramps_are_those_of_the_annealed_training_signal():
    share = [min(t / 4, 1) for t in range(7)]
    ramps = (jt.schedules.linear_ramp, jt.schedules.log_ramp, jt.schedules.exp_ramp)
    shapes = (lambda x: x, lambda x: 1 - math.exp(-5 * x), lambda x: math.exp(5 * (x - 1)))
    for ramp, shape in zip(ramps, shapes, strict=True):
        expected = [0.1 + 0.9 * shape(x) for x in share]
        assert rates(ramp(0.1, 1.0, 4), 7) == pytest.approx(expected, rel=1e-5)
    assert rates(jt.schedules.exp_ramp(0.0, 1.0, 4, rate=2.0), 1) == pytest.approx([math.exp(-2)])
    with pytest.raises(jt.InputError, match="1 step or more"):
        jt.schedules.linear_ramp(0.0, 1.0, 0)


@pytest.mark.parametrize(("start", "every"), [(0, 1), (3, 1), (2, 4)])
def test_weight_averaging_is_the_mean_of_some_iterates(start, every):
    decay = jt.schedules.weight_averaging(start, every=every)
    weights, average, seen = [7.0, 1.0, 4.0, -2.0, 8.0, 3.0, 5.0, 9.0, 0.0, 6.0, 2.0], 50.0, []
    for step, weight in enumerate(weights):
        share = float(decay(step))
        average = share * average + (1 - share) * weight
        seen += [weight] if step >= start and (step - start) % every == 0 else []
        assert average == pytest.approx(sum(seen) / len(seen) if seen else 50.0, rel=1e-6)
    with pytest.raises(jt.InputError, match="every must be at least one step"):
        jt.schedules.weight_averaging(0, every=0)
    with pytest.raises(jt.InputError, match="start must be a whole number"):
        jt.schedules.weight_averaging(0.5)


def test_switch_has_two_values():
    weight = jt.schedules.switch(1.0, 100.0, at=3)
    assert [float(weight(step)) for step in range(5)] == [1, 1, 1, 100, 100]
    assert float(jax.jit(weight)(np.int32(3))) == 100
    with pytest.raises(jt.InputError, match="whole number"):
        jt.schedules.switch(0.0, 1.0, at=0.1)  # pyright: ignore[reportArgumentType]


def test_a_warm_start_is_the_released_formula():
    for low, high, steps, alpha in ((0.0, 1.0, 1000, 1.0), (0.1, 0.4, 50, 10.0)):
        released = [2 * (high - low) / (1 + math.exp(-alpha * t / steps)) - (high - low) + low for t in range(7)]
        found = rates(jt.schedules.warm_start(high, low=low, steps=steps, alpha=alpha), 7)
        assert found == pytest.approx(released, rel=1e-5, abs=1e-7)
    assert float(jt.schedules.warm_start(steps=1)(10**9)) == 1.0
    for wrong, told in (
        ({"steps": 0}, "one step or more"),
        ({"alpha": 0.0}, "positive alpha"),
        ({"steps": 0.5}, "whole"),
    ):
        with pytest.raises(jt.InputError, match=told):
            jt.schedules.warm_start(**wrong)
