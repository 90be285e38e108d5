"""Tri-training: what two of three networks agree on teaches the third."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from jaxtransfer.adaptation.domain import Domain
from jaxtransfer.adaptation.self_training.guesses import (
    check_index,
    check_same_classes,
    check_several_models,
    check_threshold,
    guessed,
    logits_of,
    taught,
)
from jaxtransfer.context import named_key
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective
from jaxtransfer.objectives import classification
from jaxtransfer.parts.masking import mask_of
from jaxtransfer.terms import result_of


def tri_training(
    models: Sequence[Model],
    *,
    threshold: float = 0.0,
    disagreement: bool = False,
    bootstrap: int | None = None,
    weight: float | optax.Schedule = 1.0,
    output: str = "logits",
    label: str = "label",
    view: str = "image",
    source: str = "source",
    target: str = "target",
) -> Objective:
    """Builds Σ_i [CE(y, f_i(x)) + weight · (1/B) Σ 1[c_j(u) = c_k(u)] CE(c_j(u), f_i(u))], j and k the other two.

    (Zhou, Li 2005, "Tri-training: exploiting unlabeled data using three classifiers", IEEE TKDE 17(11).) Labelled
    examples x come from the source, unlabelled ones u from the target; c(u) is the class that a network guesses, and no
    guess is differentiated. Which example is taught is told anew in each step, where the paper has rounds, and lets
    one begin only where the two err less than before on the labelled examples; a `threshold`, or a weight that grows,
    stands for that. In the paper each network learns from a bootstrap sample of the labelled examples, which makes them
    differ: `bootstrap`. Their answer is a vote, or the mean of their probabilities:
    `jt.models.ensemble([jt.frozen(net, fitted.state) for net in nets])`.

        nets = [jt.models.small_cnn(10, name=name) for name in "abc"]
        objective = jt.tri_training(nets, threshold=0.9, bootstrap=len(labelled))
        batches = jt.data.zipped(source=jt.data.pipeline(labelled, 32), target=jt.data.pipeline(all_of_them, 128))

    Args:
      models: three, under different names: `model.named("b")`.
      threshold: how sure both must be of their guess, in [0, 1]; the mean is over all unlabelled examples.
      disagreement: whether the third learns only where its own guess differs: tri-training with disagreement (Søgaard
        2010, "Simple semi-supervised training of part-of-speech taggers", ACL).
      bootstrap: the number of labelled examples N, to draw for each network a sample of N with replacement: an example
        counts as often as it was drawn. They are numbered from 0 in the source's `index`. None for all of them, once.
      weight: of what they teach each other, a number or a schedule.
      output: the models' output that holds the logits [B, C].
      label: the entry of the source's batch that holds the labels.
      view: the entry of either batch that the models see.
      source: the entry of the batch that holds the labelled examples, with `mask` where some are left out.
      target: the entry that holds the unlabelled ones.

    Returns:
      An objective over the three. Metrics for each: `<source>/<name>`, `<source>/<name>/accuracy` on the labels;
      `<name>/tri_training`, and `<name>/tri_training/kept`, the share of examples that it is taught. A bootstrap sample
      is part of the state, as `<name>_bootstrap`.

    Raises:
      InputError: for another number of models, two of one name, a threshold or number out of range; at init, for a
        batch without these entries, for numbers that aren't in [0, N), and for models of different classes.
    """
    check_several_models("tri-training", models, 3)
    check_threshold(threshold)
    if bootstrap is not None and bootstrap < 1:
        raise InputError(f"bootstrap must be the number of labelled examples, 1 or more; got {bootstrap}")
    seen = {model: Domain.of(model, target, view) for model in models}

    def teach(student: Model) -> Objective:
        mine, name = seen[student], f"{student.name}/tri_training"
        teachers = tuple(model for model in models if model is not student)

        def loss(outputs, params, state, batch, ctx):
            one, two = (guessed(seen[model], outputs, output, batch) for model in teachers)
            logits = logits_of(mine, outputs, output, batch)
            keep = (one.label == two.label) & (jnp.minimum(one.sure, two.sure) >= threshold)
            if disagreement:
                keep &= jnp.argmax(jax.lax.stop_gradient(logits), -1) != one.label
            value, metrics = taught(name, logits, one.label, keep, mask_of(mine.part(batch)), ctx)
            return value.value, state, metrics

        def check(outputs, batch):
            check_same_classes(list(seen.values()), outputs, output)

        forwards = (mine.forward, *(seen[model].forward for model in teachers))
        return Objective(name, forwards, loss, check=check, pooled=True, peers=teachers)

    terms = []
    for model in models:
        own = classification(model, view=view, output=output, label=label).named(model.name)
        terms.append(
            (own if bootstrap is None else _sampled(own, f"{model.name}_bootstrap", bootstrap, source)).on(source)
        )
    terms += [weight * teach(model) for model in models]
    return sum(terms[1:], start=terms[0])


def _sampled(term: Objective, name: str, examples: int, source: str) -> Objective:
    """Returns a term that in training weighs each example by how often it is in a sample of its own."""

    def setup(key, batch):
        check_index("tri_training", batch, source, examples)
        drawn = jax.random.randint(named_key(key, name), (examples,), 0, examples)
        return {}, {name: {"counts": jnp.zeros(examples).at[drawn].add(1)}}

    def loss(outputs, params, state, batch, ctx):
        if ctx.train:
            index = batch["index"]
            there = jnp.where(index < 0, examples, index)  # a negative number would count from the end
            times = state[name]["counts"].at[there].get(mode="fill", fill_value=jnp.nan)  # no example of that number
            batch = {**batch, "weight": times * batch.get("weight", 1)}
        return result_of(term, outputs, params, state, batch, ctx)

    return dataclasses.replace(term, loss=loss, setup=setup)
