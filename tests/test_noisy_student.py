"""Noisy student: phases in which each teacher labels for the next student."""

import jax
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from tests.contract import KEY, batches, normalised


class Pairs:
    """Batches of two domains that can be read from a position on."""

    def __init__(self, rng):
        self.all = [{"source": s, "target": t} for s, t in zip(batches(rng, 6, 8), batches(rng, 6, 4), strict=True)]

    def iterate(self, start=0):
        return iter(self.all[start:])

    def fingerprint(self):
        return {"pairs": 6}


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [True, False])
def test_each_student_learns_what_the_one_before_says(rng, fresh):
    model, data, reached = normalised([]), Pairs(rng), []
    phases = jt.methods.noisy_student(
        model, optax.sgd(0.2), rounds=2, weight=0.5, threshold=0.3, fresh=fresh, label_smoothing=0.1
    )
    assert [phase.name for phase in phases] == ["teacher", "student-1", "student-2"]
    jt.methods.train_phases(
        phases, data, steps=6, progress=False, after=lambda phase, _, fitted: reached.append((phase, fitted))
    )
    teacher, (student, fitted) = reached[1][1].state, reached[2]
    objective = student.objective_after(teacher.params, teacher.state)
    assert "0.5 * noisy_student" in repr(objective)
    batch = data.all[0]
    frozen = {"params": teacher.params["model"], **teacher.state["model"]}
    own = {"params": fitted.state.params["model"], **fitted.state.state["model"]}

    @jax.jit
    def run(state, batch):
        value, _, metrics = objective(state.params, state.state, batch, jt.Context(key=KEY))
        labels = model.apply(frozen, batch["target"]["image"], train=False, key=None)[0]["logits"]
        learned = model.apply(own, batch["target"]["image2"], train=True, key=None)[0]["logits"]
        return value, metrics, jax.nn.softmax(labels), jax.nn.log_softmax(learned)

    _, metrics, labels, learned = run(fitted.state, batch)
    sure = np.max(labels, 1) >= 0.3
    expected = np.mean(sure * -np.array(learned)[np.arange(4), np.argmax(labels, 1)])
    np.testing.assert_allclose(metrics["noisy_student"].value, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["noisy_student/fixmatch/kept"].value, sure.mean(), rtol=1e-6)
    assert {phase.fresh for phase, _ in reached[1:]} == {fresh}


def test_what_is_no_student_is_refused():
    model = normalised([])
    with pytest.raises(jt.InputError, match="a student or more"):
        jt.methods.noisy_student(model, optax.sgd(0.1), rounds=0)
    with pytest.raises(jt.InputError, match="threshold must be in"):
        jt.methods.noisy_student(model, optax.sgd(0.1), threshold=2)
