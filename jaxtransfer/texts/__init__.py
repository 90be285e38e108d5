"""Texts as numbers of words or of pieces of words: what makes tokens, and how a run keeps it."""
