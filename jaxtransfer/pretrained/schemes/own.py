"""Paths of our own leaves: what our runs and exports have."""

from jaxtransfer.pretrained.scheme import Rule, Scheme, as_is

OWN = Scheme("jaxtransfer", (Rule(r"((?:params|batch_stats)/.+)", r"\1", as_is),))
