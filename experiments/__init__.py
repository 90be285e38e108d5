"""Experiments: one file per result, with its command and what it measured."""
