"""A sum keeps its terms: they can be asked for, and spell the formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt

STUDENT = jt.models.mlp(3, name="student")
TEACHER = jt.frozen(jt.models.mlp(3, name="teacher"), {"params": {}})


def constant(value, name):
    def loss(outputs, params, state, batch, ctx):
        return jnp.float32(value), {**state, "order": state.get("order", "") + name}, {name: jt.Mean(value, 1)}

    return jt.Objective(name, (), loss)


A, B, C = constant(2.0, "a"), constant(3.0, "b"), constant(5.0, "c")


def ramp(step):
    return 0.5 * step


def anything():
    return functools.partial(optax.linear_schedule(0, 1, 10))


TASK, LESSON = jt.classification(STUDENT), jt.distillation(STUDENT, TEACHER)
FORMULAS = {
    "classification(student)": TASK,
    "0.1 * classification(student) + 0.9 * distillation(student)": 0.1 * TASK + 0.9 * LESSON,
    "classification(student) + ramp * mean_teacher(student)": TASK + ramp * jt.mean_teacher(STUDENT),
    "classification(student) + 0.5 * schedule * l2": TASK + 0.5 * (anything() * jt.l2()),
    "schedule * classification(student)": (lambda step: step) * TASK,
    "classification(student) + (1 / ramp) * l2": TASK + jt.l2() / ramp,
    "-a + b - 2.5 * c": -A + B - 2.5 * C,
    "6 * a + 12 * b - 3 * c": 3 * (2 * (A + 2 * B) - C),
    "0.5 * a + 0.25 * b": sum([np.float32(1) * A, jnp.float32(0.5) * B]) / 2,
    "0 * a + b": 0 * A + B,
    "source/classification(student) + 2 * target/l2": (TASK).on("source") + (2 * jt.l2()).on("target"),
    "all/classification(student) - all/l2": (TASK - jt.l2()).named("all"),
    "x/all/classification(student) - x/all/l2": (TASK - jt.l2()).named("all").on("x"),
    "hint(student)": LESSON.named("hint"),
    "classification(teacher)": jt.classification(TEACHER),
    "classification(student_ema)": jt.classification(jt.ema(STUDENT)),
    "info_nce(student, psi)": jt.info_nce(STUDENT, jt.models.mlp(3, name="psi")),
    "maml(student)": jt.maml(TASK, inner=optax.sgd(0.1), steps=1),
    "objective(student) + a": jt.Objective("", (jt.Forward.of(STUDENT),), A.loss) + A,
}


@pytest.mark.parametrize("formula", FORMULAS)
def test_the_formula(formula):
    assert repr(FORMULAS[formula]) == formula


def test_the_terms_can_be_asked_for():
    objective = 3 * (0.5 * A + ramp * B) - C / 4
    weights = [weight for weight, _ in objective.terms]
    assert [term for _, term in objective.terms] == [A, B, C]
    assert weights[0] == 1.5
    assert weights[1](jnp.int32(4)) == 6
    assert weights[2] == -0.25
    assert A.terms == ((1, A),)
    assert [term.name for _, term in (A + B).on("s").terms] == ["s/a", "s/b"]
    assert [term.name for _, term in (A + (B + C)).named("n").terms] == ["n/a", "n/b", "n/c"]
    assert (2 * A).named("n").terms[0][1].name == "n"


def test_a_sum_however_it_was_made_runs_its_terms_from_left_to_right():
    for objective in (A + (2 * B + C), (A + 2 * B) + C, sum([A, 2 * B, C]), 0.5 * (2 * A + (4 * B + 2 * C))):
        value, state, metrics = objective({}, {}, {}, jt.Context())
        assert float(value) == 13
        assert state == {"order": "abc"}
        assert list(metrics) == ["a", "b", "c"]
    named = ((A + B).named("all") + C)({}, {}, {}, jt.Context())
    assert list(named[2]) == ["all/a", "all/b", "c"]
    assert list(((A + B).named("all").named("x") + C)({}, {}, {}, jt.Context())[2]) == ["x/all/a", "x/all/b", "c"]


def test_an_objective_whose_functions_were_replaced_is_a_term_of_its_own():
    import dataclasses

    kept = []
    odd = dataclasses.replace(A + B, setup=lambda key, batch: kept.append(1) or ({}, {}))
    whole = odd + C
    assert [term for _, term in whole.terms] == [odd, C]
    whole.setup(jax.random.key(0), {})
    assert kept == [1]
    assert float(whole({}, {}, {}, jt.Context())[0]) == 10


def test_two_metrics_of_one_name_are_told_wherever_they_stand():
    for objective in (A + (B + A), (A + B) + A, (A + A).on("s"), (B + (A + A)).named("all")):
        with pytest.raises(jt.InputError, match=r"two terms of a sum report the metric .*a'; rename one"):
            objective({}, {}, {"s": {}}, jt.Context())


@pytest.mark.parametrize(
    ("gives", "told"),
    [
        (lambda mean, state: mean, "got a Mean"),
        (lambda mean, state: (mean.value, state), "got 2 values"),
        (lambda mean, state: (mean, state, {}), "return its .value"),
        (lambda mean, state: (jnp.ones(4), state, {}), r"loss of shape \(4,\)"),
        (lambda mean, state: (mean.value, None, {}), "a NoneType and a dict"),
        (lambda mean, state: (mean.value, state, {"own": mean.value}), "metric 'own' is a .*: keep what ctx.mean"),
    ],
)
def test_what_a_loss_returns_is_checked(gives, told):
    """Alone, in a sum, under a key and under another name; when it is trained and when it is evaluated."""

    def loss(outputs, params, state, batch, ctx):
        return gives(ctx.mean(batch["x"]), state)

    own = jt.Objective("own", (), loss)
    batch = {"x": jnp.ones(4)}
    for objective, data in ((own, batch), (own + jt.l2(), batch), (own.on("a"), {"a": batch}), (own.named("b"), batch)):
        with pytest.raises(jt.InputError, match=f"the loss of objective 'own'.*{told}"):
            objective({"net": {"w": jnp.ones(2)}}, {}, data, jt.Context(0, jax.random.key(0)))


def test_no_metric_takes_the_place_of_the_total():
    """In training and in evaluation; under another name it may stand beside it."""

    def loss(outputs, params, state, batch, ctx):
        mean = ctx.mean(2 * batch["x"], batch.get("mask"))
        return mean.value, state, {"loss": mean}

    own, batch = jt.Objective("own", (), loss), {"x": jnp.array([1.0, 3.0])}
    for objective in (own, 2.0 * own, own + own.named("other")):
        with pytest.raises(jt.InputError, match="a metric can't be called 'loss'"):
            jt.init(objective, optax.sgd(0.1), jax.random.key(0), batch)
    state = jt.init(2.0 * own.named("own"), optax.sgd(0.1), jax.random.key(0), batch)
    with pytest.raises(jt.InputError, match="a metric can't be called 'loss'"):
        jt.evaluate(own, state, [batch])
    assert jt.evaluate(2.0 * own.named("own"), state, [batch]) == {"own/loss": 4.0, "loss": 8.0}
