"""Methods of training in one phase or several: fine-tuning, and what runs the phases one after the other."""

from jaxtransfer.methods.finetuning import anchored, bss, delta, discriminative, full, gradual, linear_probe, lp_ft
from jaxtransfer.methods.noisy_student import noisy_student
from jaxtransfer.methods.phases import Phase, split_steps, train_phases
from jaxtransfer.methods.relationship import calibration_temperature, direct_relationship, reverse_relationship

Stage = Phase
"""What `Phase` was called before: a stage is a part of a network."""

__all__ = [
    "Phase",
    "Stage",
    "anchored",
    "bss",
    "calibration_temperature",
    "delta",
    "direct_relationship",
    "discriminative",
    "full",
    "gradual",
    "linear_probe",
    "lp_ft",
    "noisy_student",
    "reverse_relationship",
    "split_steps",
    "train_phases",
]
