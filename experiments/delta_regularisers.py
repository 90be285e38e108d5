"""Regularisers of fine-tuning on one task: CIFAR-100 with ten labels per class, from CIFAR-10's published ResNet.

`full` and `l2-sp` are those of `finetune_cifar100`, whose options, recipe and run directories are shared; beside them:

- `ewc`: L2-SP with each weight's square by its Fisher information on CIFAR-10 (Kirkpatrick et al. 2017);
- `delta`: the last two stages' maps held at the pretrained network's (Li et al. 2019), plain;
- `delta-attention`: the same, the last stage's channels weighed by how much the loss grows without them;
- `bss`: full, and the features' smallest singular value shrunk (Chen et al. 2019);
- `co-tuning`: the pretrained head is trained along, by the direct relationship (You et al. 2020);
- `bi-tuning`: full, and classifier and projection contrasted with a slow network's keys (Zhong et al. 2020);
- `stoch-norm`: full, by stochastic normalisation (Kou et al. 2020).

Strengths are those of the papers, of l2-sp and ewc `--strengths` (the first one); no test label chose anything.

    TFDS_DATA_DIR=... python -m experiments.delta_regularisers --weights resnet56-4bfd9763.th --seeds 3

The same command resumes what is unfinished, and more methods or seeds add to what is there.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax

import jaxtransfer as jt
from experiments import finetune_cifar100
from experiments.finetune_cifar100 import METHODS as EARLIER
from experiments.finetune_cifar100 import Experiment, Kit, Method, Methods, of_phase, run, settled

SOURCE_CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Regularisers(Experiment):
    """Compare DELTA, BSS, Co-Tuning, Bi-Tuning, StochNorm and EWC with L2-SP and full fine-tuning; writes a table."""

    per_class: tuple[int, ...] = (10,)
    """Labels per class, one table row of each method for each."""
    epochs: tuple[int, ...] = (15,)
    """Passes over the images, one number for each of --per-class."""
    methods: tuple[str, ...] = (
        "full",
        "l2-sp",
        "ewc",
        "delta",
        "delta-attention",
        "bss",
        "co-tuning",
        "bi-tuning",
        "stoch-norm",
    )
    """Any of them, and those of finetune_cifar100, in the order in which they run."""
    strengths: tuple[float, ...] = (0.01,)
    """Of the penalty of l2-sp, and of ewc relative to a mean Fisher weight of 1."""


def main(experiment: Regularisers) -> dict[str, Any]:
    """Trains what is not trained yet and returns the test accuracies by labels per class and method, in per cent."""
    return finetune_cifar100.compare(settled(experiment, METHODS), METHODS)


def _source(kit: Kit) -> jt.FrozenModel:
    return jt.frozen(kit.model.named("source"), kit.start())


def _ewc(kit: Kit) -> Method:
    fisher = kit.bench.fisher()
    (phase,) = jt.methods.anchored(
        kit.model, kit.finetune(decay=0.0), kit.anchor, strength=kit.experiment.strengths[0], fisher=fisher
    )
    return of_phase(phase, kit)


def _delta(kit: Kit) -> Method:
    (phase,) = jt.methods.delta(kit.model, kit.finetune(decay=0.0), _source(kit), taps=("stage2", "stage3"))
    return of_phase(phase, kit)


def _delta_attention(kit: Kit) -> Method:
    known = kit.start(kit.probe())
    last = [path for path in jt.tree.leaves_by_path(known["params"]) if path.startswith("stage3")]
    kernel = max((path for path in last if path.endswith("conv2/kernel")), key=lambda path: (len(path), path))
    train = kit.bench.train_data.select(np.sort(kit.rows)[:: max(1, len(kit.rows) // 200)])
    batches = jt.data.eval_batches(train, min(100, len(train)))
    weights = jt.filter_weights(kit.model, known, batches, filters={"stage3": kernel}, temperature=0.05)
    (phase,) = jt.methods.delta(kit.model, kit.finetune(decay=0.0), _source(kit), taps="stage3", weights=weights)
    return of_phase(phase, kit)


def _bss(kit: Kit) -> Method:
    (phase,) = jt.methods.bss(kit.model, kit.finetune())
    return of_phase(phase, kit)


def _co_tuning(kit: Kit) -> Method:
    old = kit.bench.source[1]["params"]["head"]
    deep = kit.bench.features("train").select(np.sort(kit.rows))
    logits = deep.column("features") @ np.asarray(old["kernel"]) + np.asarray(old["bias"])
    relationship = jt.methods.direct_relationship(logits, deep.labels, kit.bench.train_data.classes)
    both = jt.models.with_heads(kit.model, source=jt.models.head(SOURCE_CLASSES, batch_norm=False))
    start = kit.start()
    variables = {kind: {"encoder": values} for kind, values in start.items()}
    variables["params"]["source"] = {"dense1": old}
    return Method(jt.classification(both) + jt.co_tuning(both, relationship), _inside(kit), variables, both)


def _bi_tuning(kit: Kit) -> Method:
    both = jt.models.with_heads(kit.model, projection=jt.models.head(128, batch_norm=False))
    image = np.zeros((1, *kit.image_shape), np.uint8)
    fresh = both.init(jax.random.key(kit.seed), image)
    variables = {kind: {**fresh[kind], "encoder": values} for kind, values in kit.start().items()}
    queue = min(40, max(1, len(kit.rows) // kit.bench.train_data.classes))  # as many keys as a class has examples
    objective = jt.classification(both) + jt.bi_tuning(both, queue=queue)
    return Method(objective, _inside(kit), variables, both, two_views=True)


def _inside(kit: Kit) -> optax.GradientTransformation:
    """The optimiser of `Kit.finetune` for the network inside of a model with further heads."""
    head, rest = (kit.sgd(rate, kit.experiment.decay) for rate in (kit.experiment.rate, kit.experiment.finetune_rate))
    return jt.optim.by_path({f"{kit.model.name}/encoder/{kit.model.head}": head, ".*": rest})


def _stoch_norm(kit: Kit) -> Method:
    model = jt.models.stoch_norm(kit.model)
    return Method(jt.classification(model), kit.finetune(), kit.start(), model)


METHODS: Methods = {
    **EARLIER,
    "ewc": _ewc,
    "delta": _delta,
    "delta-attention": _delta_attention,
    "bss": _bss,
    "co-tuning": _co_tuning,
    "bi-tuning": _bi_tuning,
    "stoch-norm": _stoch_norm,
}


if __name__ == "__main__":
    run("delta_regularisers", Regularisers, main)
