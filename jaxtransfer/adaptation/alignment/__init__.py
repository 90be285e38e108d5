"""Alignment: features of both domains are drawn together by a distance between their distributions."""

__all__: list[str] = []
