"""A row of a registry, and the help that is written from its rows."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from jaxtransfer.errors import unknown

Facts = TypeVar("Facts")


@dataclasses.dataclass(frozen=True)
class Row(Generic[Facts]):
    """A method under a name of the command line.

    Attributes:
      build: from what the command has to what trains; each registry says from what.
      does: what it does, for --help; rows that follow each other with the same words are listed together.
      facts: what the command must know of it besides, the usual values of its options, say.
      paper: authors and year, for --help.
    """

    build: Callable[..., Any]
    does: str
    facts: Facts
    paper: str = ""


Registry = Mapping[str, Row[Facts]]


def row_of(option: str, name: str, registry: "Registry[Facts]") -> Row[Facts]:
    """Returns the row of a name; another name is an error that lists those there are, and the closest."""
    if name not in registry:
        raise unknown(option, name, registry)
    return registry[name]


def listed(registry: "Registry[Any]") -> str:
    """Returns the rows as lines of help: `- moco, nnclr: find each other in a queue (He 2020, Dwibedi 2021).`"""
    return "\n".join(_lines(registry))


def choices(registry: "Registry[Any]") -> Callable[[str], str]:
    """Returns what follows an option's help: the rows of the registry as they are then, and the default."""
    return lambda default: f"\n{listed(registry)}\n(default: {default})"


def having(registry: "Registry[Any]", fact: str, default: str) -> Callable[[str], str]:
    """Returns what follows the help of an option that some rows have: which of them, and the default in words."""
    return lambda _: f"({', '.join(names_with(registry, fact))}; default: {default})"


def names_with(registry: "Registry[Any]", fact: str) -> list[str]:
    """Returns the names of the rows that have a fact: neither None nor false."""
    return [name for name, row in registry.items() if getattr(row.facts, fact) not in (None, False)]


def _lines(registry: "Registry[Any]") -> Iterator[str]:
    names: list[str] = []
    papers: list[str] = []
    rows = list(registry.items())
    for number, (name, row) in enumerate(rows, 1):
        names.append(name)
        papers += [row.paper] if row.paper and row.paper not in papers else []
        if number < len(rows) and rows[number][1].does == row.does:
            continue
        told = f" ({', '.join(papers)})" if papers else ""
        yield f"- {', '.join(names)}: {row.does}{told}."
        names, papers = [], []
