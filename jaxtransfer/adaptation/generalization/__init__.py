"""Generalisation to domains that are never seen in training, from several that are."""

__all__: list[str] = []
