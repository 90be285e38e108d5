"""Training: one state, one compiled step, one loop, one evaluation for every objective."""

from jaxtransfer.train.episodes import Interval, evaluate_episodes
from jaxtransfer.train.evaluation import eval_step, evaluate
from jaxtransfer.train.loop import Fitted, fit
from jaxtransfer.train.refresh import Refresh
from jaxtransfer.train.state import TrainState, init
from jaxtransfer.train.step import TrainStep, train_step
from jaxtransfer.train.turns import Turn, alternate

__all__ = [
    "Fitted",
    "Interval",
    "Refresh",
    "TrainState",
    "TrainStep",
    "Turn",
    "alternate",
    "eval_step",
    "evaluate",
    "evaluate_episodes",
    "fit",
    "init",
    "train_step",
]
