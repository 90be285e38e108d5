"""Which kernel of ours a module of Hugging Face peft's adapters changes, and back: by the tables that read weights."""

import re
from collections.abc import Collection, Iterable, Sequence

from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.pretrained.layouts import Shapes, embedding, fused, heads, layer
from jaxtransfer.pretrained.names_out import layer_names
from jaxtransfer.pretrained.scheme import Rule, Scheme
from jaxtransfer.pretrained.schemes import SCHEMES

_THIRDS = ("query", "key", "value")
_PLAIN = (layer, heads, embedding)


def kernels_of(module: str, rules: Sequence[Rule], shapes: Shapes) -> tuple[str, ...]:
    """Returns the paths of the kernels that a module's weight is: three of a fused one, none where there is no such.

    Args:
      module: its name in the library's network.
      rules: the table.
      shapes: of our leaves, by path.
    """
    for rule in rules:
        if (match := re.fullmatch(rule.pattern, module)) is None:
            continue
        path = re.sub(r"\{(\d+)\}", lambda number: str(int(number[1]) + 1), match.expand(rule.path))
        if rule.how is fused:
            found = tuple(f"{path}/{name}/kernel" for name in _THIRDS)
        else:
            found = (f"{path}/{'embedding' if rule.how is embedding else 'kernel'}",) if rule.how in _PLAIN else ()
        return found if all(f"params/{one}" in shapes for one in found) else ()
    return ()


def table_for(model: Model, modules: Collection[str], shapes: Shapes, what: str) -> tuple[Scheme, Sequence[Rule]]:
    """Returns the scheme by whose names all modules are kernels of the model, with its table.

    Raises:
      InputError: where there is none; the line names a module that the closest scheme doesn't know.
    """
    tables = [(scheme, scheme.table(shapes)) for scheme in fitting(model)]
    unknown = [[name for name in modules if not kernels_of(name, rules, shapes)] for _, rules in tables]
    best = min(range(len(tables)), key=lambda number: len(unknown[number]))
    if unknown[best]:
        raise InputError(
            f"{what} changes the module {unknown[best][0]!r}, for which the closest scheme, {tables[best][0].name}, "
            f"has no kernel of model {model.name!r}; is it of another network?"
        )
    return tables[best]


def module_of(path: str, rules: Iterable[Rule], shapes: Shapes) -> str | None:
    """Returns the name of the module whose weight is a kernel of ours, the newest of several; None where none is."""
    rules = list(rules)
    for rule in reversed(rules):
        if rule.how in _PLAIN:
            for name in layer_names(rule, path.rpartition("/")[0]):
                if kernels_of(name, rules, shapes) == (path,):
                    return name
    return None


def fitting(model: Model) -> list[Scheme]:
    """Returns the schemes of other libraries that a model may have names of."""
    network = None if model.recipe is None else model.recipe.build
    return [one for one in SCHEMES if one.libraries and (not one.networks or network in (None, *one.networks))]
