"""Transfer learning for JAX: objectives that add up, one compiled step, tfds pipelines.

import jaxtransfer as jt

model = jt.models.resnet20(classes=10)
objective = jt.classification(model) + jt.l2_sp(w0, exclude="head") + 0.01 * jt.l2(only="head")
step = jt.train_step(objective, optimizer)
"""

from jaxtransfer import data, losses, meta, methods, models, optim, tree
from jaxtransfer.errors import InputError, NonFiniteLossError
from jaxtransfer.forward import Average, Forward, Frozen, FrozenModel, ema, frozen
from jaxtransfer.meta import maml
from jaxtransfer.model import Model
from jaxtransfer.objective import Context, Mean, Objective
from jaxtransfer.objectives import (
    cached,
    classification,
    crd,
    distillation,
    fisher_diagonal,
    fisher_l2_sp,
    l2,
    l2_sp,
    mean_teacher,
    mutual_learning,
    regression,
)
from jaxtransfer.surgery import Report, Transferred, transfer
from jaxtransfer.train import (
    Fitted,
    Interval,
    TrainState,
    TrainStep,
    eval_step,
    evaluate,
    evaluate_episodes,
    fit,
    init,
    train_step,
)

__all__ = [
    "Average",
    "Context",
    "Fitted",
    "Forward",
    "Frozen",
    "FrozenModel",
    "InputError",
    "Interval",
    "Mean",
    "Model",
    "NonFiniteLossError",
    "Objective",
    "Report",
    "TrainState",
    "TrainStep",
    "Transferred",
    "cached",
    "classification",
    "crd",
    "data",
    "distillation",
    "ema",
    "eval_step",
    "evaluate",
    "evaluate_episodes",
    "fisher_diagonal",
    "fisher_l2_sp",
    "fit",
    "frozen",
    "init",
    "l2",
    "l2_sp",
    "losses",
    "maml",
    "mean_teacher",
    "meta",
    "methods",
    "models",
    "mutual_learning",
    "optim",
    "regression",
    "train_step",
    "transfer",
    "tree",
]
