"""Noisy student: a teacher labels the unlabelled data, a student that is disturbed learns from it, and teaches next."""

from typing import Any

import optax

from jaxtransfer import adaptation, objectives
from jaxtransfer.errors import InputError
from jaxtransfer.forward import frozen
from jaxtransfer.methods.phases import Phase
from jaxtransfer.model import Model


def noisy_student(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    rounds: int = 1,
    weight: float = 1.0,
    threshold: float = 0.0,
    fresh: bool = True,
    output: str = "logits",
    view: str = "image",
    strong: str = "image2",
    source: str = "source",
    target: str = "target",
    **loss: Any,
) -> tuple[Phase, ...]:
    """Trains a teacher on the source, then students on the source and on the teacher's labels (Xie et al. 2020).

    arXiv:1911.04252. The teacher sees the weak view of the target in inference mode; the student sees the strong one,
    with its dropout: L_source + λ (1/B) Σ 1[max p_T(x) ≥ τ] · CE(argmax p_T(x), f(x')). Each student is the next
    round's teacher. The paper's students are larger from round to round and start afresh; here they are of one model.
    Its hard labels are these; soft ones and the balance of classes are left out.

        phases = jt.methods.noisy_student(model, optax.adam(1e-3), rounds=2)
        jt.methods.train_phases(phases, batches, steps=6000, transform=views, out="runs/noisy_student")

    Args:
      model: of teacher and students; its dropout is a part of the noise.
      optimizer: of each phase.
      rounds: students in a row.
      weight: λ.
      threshold: τ, how sure the teacher must be.
      fresh: whether students start from new weights, as in the paper; else from their teacher's.
      output: the model's output that holds the logits [B, C].
      view: the entry of the weak view, in the source's batch the one that is learned from.
      strong: the entry of the target's strong view.
      source: the entry of the batch that holds the labelled examples.
      target: the entry with the unlabelled ones.
      **loss: arguments of `classification`.

    Returns:
      1 + rounds phases of equal length for `train_phases`.

    Raises:
      InputError: for no rounds, and as `jt.adaptation.fixmatch`.
    """
    if rounds < 1:
        raise InputError(f"noisy_student needs a student or more: rounds=1; got {rounds}")
    labelled = objectives.classification(model, view=view, output=output, **loss).on(source)
    names: dict[str, Any] = {"output": output, "view": view, "strong": strong, "target": target}

    def student(params, state):
        variables = {"params": model.whole(params), **state.get(model.name, {})}
        teacher = frozen(model.named(f"{model.name}_teacher"), variables)
        term = adaptation.fixmatch(model, teacher=teacher, threshold=threshold, **names)
        return labelled + weight * term.named("noisy_student")

    adaptation.fixmatch(model, threshold=threshold, **names)  # refuses what it refuses before the teacher is trained
    students = (Phase(f"student-{number}", student, optimizer, fresh=fresh) for number in range(1, rounds + 1))
    return (Phase("teacher", labelled, optimizer), *students)
