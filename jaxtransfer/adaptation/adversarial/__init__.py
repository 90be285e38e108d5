"""Adversaries: a domain discriminator, or two classifiers, that the features must deceive."""

__all__: list[str] = []
