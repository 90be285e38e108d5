"""Paths of our own leaves: what our runs and exports have."""

from jaxtransfer.pretrained.layouts import as_is
from jaxtransfer.pretrained.scheme import Rule, Scheme

OWN = Scheme("jaxtransfer", (Rule(r"((?:params|batch_stats)/.+)", r"\1", as_is),), libraries=("jaxtransfer",))
