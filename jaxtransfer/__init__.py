"""Transfer learning for JAX: objectives that add up, one compiled step, tfds pipelines.

import jaxtransfer as jt

model = jt.models.resnet20(classes=10)
objective = jt.classification(model) + jt.l2_sp(w0, exclude="head") + 0.01 * jt.l2(only="head")
step = jt.train_step(objective, optimizer)
"""

from jaxtransfer import (
    adaptation,
    data,
    deltas,
    devices,
    fusion,
    losses,
    measures,
    meta,
    methods,
    models,
    multitask,
    optim,
    pretrained,
    representation,
    runs,
    schedules,
    tree,
)
from jaxtransfer.adaptation.self_training import co_training, tri_training
from jaxtransfer.errors import InputError, LostProcessError, NonFiniteLossError, StuckDataError
from jaxtransfer.former import keep_former_names
from jaxtransfer.forward import Average, Forward, Frozen, FrozenModel, ema, frozen
from jaxtransfer.meta import maml
from jaxtransfer.micro_batches import micro_batched
from jaxtransfer.model import Model
from jaxtransfer.multitask import balance
from jaxtransfer.objective import Context, Mean, Objective
from jaxtransfer.objectives import (
    averaged,
    bi_tuning,
    bss,
    cached,
    classification,
    co_teaching,
    co_tuning,
    crd,
    delta,
    distillation,
    filter_weights,
    fisher_diagonal,
    fisher_l2_sp,
    l2,
    l2_sp,
    mean_teacher,
    multilabel_classification,
    mutual_learning,
    peer,
    regression,
)
from jaxtransfer.objectives import selfsupervised as _selfsupervised
from jaxtransfer.objectives.selfsupervised import *  # noqa: F403
from jaxtransfer.parts.outputs import shapes_of
from jaxtransfer.parts.together import together
from jaxtransfer.pretrained import (
    PeftDelta,
    Pretrained,
    export_program,
    export_weights,
    inspect_weights,
    load_peft,
    load_pretrained,
    save_peft,
)
from jaxtransfer.representation.features import features
from jaxtransfer.runs.load import Run, load_run
from jaxtransfer.train import (
    Fitted,
    Interval,
    Refresh,
    TrainState,
    TrainStep,
    Turn,
    alternate,
    eval_step,
    evaluate,
    evaluate_episodes,
    fit,
    init,
    train_step,
)
from jaxtransfer.version import VERSION as __version__
from jaxtransfer.weights import recompute_statistics
from jaxtransfer.weights.transfer import Report, Transferred, transfer

keep_former_names()

__all__ = [
    "Average",
    "Context",
    "Fitted",
    "Forward",
    "Frozen",
    "FrozenModel",
    "InputError",
    "Interval",
    "LostProcessError",
    "Mean",
    "Model",
    "NonFiniteLossError",
    "Objective",
    "PeftDelta",
    "Pretrained",
    "Refresh",
    "Report",
    "Run",
    "StuckDataError",
    "TrainState",
    "TrainStep",
    "Transferred",
    "Turn",
    "__version__",
    "adaptation",
    "alternate",
    "averaged",
    "balance",
    "bi_tuning",
    "bss",
    "cached",
    "classification",
    "co_teaching",
    "co_training",
    "co_tuning",
    "crd",
    "data",
    "delta",
    "deltas",
    "devices",
    "distillation",
    "ema",
    "eval_step",
    "evaluate",
    "evaluate_episodes",
    "export_program",
    "export_weights",
    "features",
    "filter_weights",
    "fisher_diagonal",
    "fisher_l2_sp",
    "fit",
    "frozen",
    "fusion",
    "init",
    "inspect_weights",
    "l2",
    "l2_sp",
    "load_peft",
    "load_pretrained",
    "load_run",
    "losses",
    "maml",
    "mean_teacher",
    "measures",
    "meta",
    "methods",
    "micro_batched",
    "models",
    "multilabel_classification",
    "multitask",
    "mutual_learning",
    "optim",
    "peer",
    "pretrained",
    "recompute_statistics",
    "regression",
    "representation",
    "runs",
    "save_peft",
    "schedules",
    "shapes_of",
    "together",
    "train_step",
    "transfer",
    "tree",
    "tri_training",
]
__all__ += _selfsupervised.__all__  # a method that is new there is a name here
