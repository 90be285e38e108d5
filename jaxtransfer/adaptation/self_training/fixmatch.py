"""FixMatch: sure guesses on weakly changed examples are the labels of the same examples, strongly changed."""

from jaxtransfer.adaptation.domain import Domain
from jaxtransfer.adaptation.self_training.guesses import check_logits, check_threshold, guessed, logits_of, taught
from jaxtransfer.forward import Average, FrozenModel
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective
from jaxtransfer.parts.masking import mask_of


def fixmatch(
    model: Model,
    *,
    teacher: FrozenModel | Average | None = None,
    threshold: float = 0.95,
    output: str = "logits",
    view: str = "image",
    strong: str = "image2",
    target: str = "target",
) -> Objective:
    """Builds (1/B) Σ 1[max p(x) ≥ τ] · CE(argmax p(x), f(x')), x' a stronger view of x (Sohn et al. 2020).

    arXiv:2001.07685, their λ_u = 1. Guesses on the weak view are not differentiated. Views come from
    `jt.data.views.two_views(weak, strong)` on the target; for few labels of one data set, the source is its labelled
    examples and the target the same data without labels:

        objective = jt.together(jt.classification(model).on("source") + jt.adaptation.fixmatch(model))
        batches = jt.data.zipped(source=jt.data.pipeline(few, 32), target=jt.data.pipeline(all_of_them, 128))
        views = jt.data.views.on("target", jt.data.views.two_views(weak, strong))
        jt.fit(objective, optimizer, batches, steps=2000, transform=views)

    Args:
      model: what trains, and guesses; run once on both views within `jt.together`.
      teacher: what guesses in its place, in inference mode: the moving average of its weights, `jt.ema(model, 0.99)`,
        which doesn't drop and errs less, or a frozen model, `jt.frozen(model.named("teacher"), variables)`.
      threshold: τ in [0, 1]; the mean is over all examples, those that are left out count as 0.
      output: the model's output that holds the logits [B, C].
      view: the entry of the target's batch with the weak view.
      strong: the entry with the strong view.
      target: the entry of the batch that holds the target's, with `mask` where examples are left out.

    Returns:
      An objective with the metrics `fixmatch` and `fixmatch/kept`, the share at the threshold or above.

    Raises:
      InputError: for a threshold out of range; at init, for a batch without the target or one of its views.
    """
    check_threshold(threshold)
    weak, hard = Domain.of(teacher or model, target, view), Domain.of(model, target, strong)

    def loss(outputs, params, state, batch, ctx):
        guess = guessed(weak, outputs, output, batch)
        logits, mask = logits_of(hard, outputs, output, batch), mask_of(weak.part(batch))
        value, metrics = taught("fixmatch", logits, guess.label, guess.sure >= threshold, mask, ctx)
        return value.value, state, metrics

    def check(outputs, batch):
        check_logits(weak, outputs, output)

    return Objective("fixmatch", (weak.forward, hard.forward), loss, check=check, pooled=True)
