"""Methods of training in one phase or several: fine-tuning, and what runs the phases one after the other."""

from jaxtransfer.methods.finetuning import anchored, discriminative, full, gradual, linear_probe, lp_ft
from jaxtransfer.methods.phases import Phase, split_steps, train_phases

Stage = Phase
"""What `Phase` was called before: a stage is a part of a network."""

__all__ = [
    "Phase",
    "Stage",
    "anchored",
    "discriminative",
    "full",
    "gradual",
    "linear_probe",
    "lp_ft",
    "split_steps",
    "train_phases",
]
