"""Open-set adaptation by backpropagation: the features of each target example choose, known or unknown."""

import jax
import jax.numpy as jnp

from jaxtransfer import losses, tree
from jaxtransfer.adaptation.adversarial.domains import Coefficient, at, check_coefficient, setup_of
from jaxtransfer.errors import InputError
from jaxtransfer.forward import Forward
from jaxtransfer.losses.adversarial import gradient_reversal
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective, view_of
from jaxtransfer.objectives.supervised.classification import check_labels
from jaxtransfer.parts.masking import mask_of
from jaxtransfer.parts.outputs import pick, shapes_of
from jaxtransfer.parts.rows import kept


def osbp(
    model: Model,
    *,
    coefficient: Coefficient = 1.0,
    threshold: float = 0.5,
    head: tree.Patterns | None = None,
    output: str = "logits",
    view: str = "image",
    source: str = "source",
    target: str = "target",
) -> Objective:
    """Builds open-set adaptation by backpropagation (Saito et al. 2018, arXiv:1804.10427): see `jt.losses.open_set`.

    The target has examples of classes that the source has not. The model gives one class more than the source has, the
    last one, for what is unknown. On the target its classifier aims at a probability t of that; the encoder does the
    reverse, and so moves each example to either side, known or unknown:

        net = jt.models.lenet(classes + 1)
        objective = jt.classification(net).on("source") + jt.adaptation.osbp(net)

    The reversal stands at the encoder's parameters, with the same gradient as one between features and classifier, so
    any model will do; the term runs it on the target by itself, as released, also within `jt.together`.

    Args:
      model: encoder and classifier of C + 1 classes.
      coefficient: λ of the gradient reversal, a number or a schedule.
      threshold: t, in (0, 1).
      head: path patterns of the classifier's parameters; the last of the model's stages by default.
      output: the output that holds the logits [B, C + 1].
      view: the entry of a domain's batch that the model sees.
      source: the entry of the batch that holds the source's, whose labels are checked.
      target: that of the target.

    Returns:
      An objective with the metrics `osbp` and `osbp/unknown`, the share of the target that is taken for unknown.

    Raises:
      InputError: for a threshold out of range; at init, for a batch without the domains, a head that no parameter
        matches, fewer than two classes, and a source label that is the class of the unknown.
    """
    if not 0 < threshold < 1:
        raise InputError(f"osbp: threshold is a probability in (0, 1); got {threshold}")
    check_coefficient(coefficient)
    heads = tree.as_patterns(head or model.head)

    def setup(key, batch):
        params, state = setup_of(model, key, view_of(batch, (target, *view.split("/"))))
        tree.check_used(heads, tree.leaves_by_path(params[model.name]), "the head of osbp")
        return params, state

    def loss(outputs, params, state, batch, ctx):
        part, reverse = view_of(batch, (target,)), at(coefficient, ctx)
        whole = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf if tree.matches(tree.path_of(path), heads) else gradient_reversal(leaf, reverse),
            model.whole(params),
        )
        inputs = view_of(part, tuple(view.split("/")))
        found, state = ctx.run(model, model.spread(params, whole), state, inputs, view=f"{target}/{view}")
        mask = mask_of(part)
        logits = kept(pick(f"model {model.name!r}", found, output), mask)
        value = ctx.mean(losses.open_set(logits, threshold=threshold), mask)
        unknown = (jnp.argmax(logits, axis=-1) == logits.shape[1] - 1).astype(jnp.float32)
        return value.value, state, {"osbp": value, "osbp/unknown": ctx.mean(unknown, mask)}

    def check(outputs, batch):
        found = pick(f"model {model.name!r}", shapes_of(Forward.of(model, f"{target}/{view}"), batch), output)
        if len(found.shape) != 2 or found.shape[1] < 2:
            raise InputError(
                f"osbp: the model gives logits [batch, classes of the source + 1 for the unknown]; got {found.shape}"
            )
        try:
            check_labels(model.name, found.shape[1] - 1, view_of(batch, (source,)))
        except InputError as error:
            raise InputError(f"osbp: the model's last class is for the unknown, so {error}") from None

    return Objective("osbp", (), loss, setup=setup, check=check, models=(model,))
