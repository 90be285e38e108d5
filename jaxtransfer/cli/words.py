"""What the words of a command line may be, known from the commands' fields, so that a mistake is told in our words."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import tyro

from jaxtransfer.errors import InputError, unknown

_READ: dict[Any, tuple[Callable[[str], Any], str]] = {
    int: (int, "a whole number"),
    float: (float, "a number"),
}


class Option(NamedTuple):
    """What a command takes: an option, or a word by its place.

    Attributes:
      name: with its dashes; of a word by its place its name in the help.
      kinds: the types of its values; of one or more alike where `open_ended`.
      open_ended: whether any number of values is taken.
      required: whether it has no default.
      metavar: its values in the help.
    """

    name: str
    kinds: tuple[Any, ...]
    open_ended: bool
    required: bool
    metavar: str

    def check(self, values: Sequence[str]) -> None:
        """Raises for values that it can't take."""
        kinds = self.kinds * len(values) if self.open_ended else self.kinds
        if len(values) < len(kinds):
            few = f"{len(kinds)} values ({self.metavar})" if len(kinds) > 1 else f"a value ({self.metavar})"
            raise InputError(f"{self.name} needs {few}; got {' '.join(values) or 'none'}")
        for value, kind in zip(values, kinds, strict=True):
            read, expected = _READ.get(kind, (str, ""))
            try:
                read(value)
            except ValueError:
                raise InputError(f"{self.name}: expected {expected}, got {_brief(value)}") from None


def asks_for_help(words: Sequence[str]) -> bool:
    """Whether the words ask for text, which the parser writes, rather than for work."""
    return any(word in ("-h", "--help") or word.startswith("--tyro-") for word in words)


def placed(words: Sequence[str], commands: Mapping[str, type]) -> list[str]:
    """Returns the words with a word by its place moved to the front, where an option of many values swallowed it.

    `evaluate --data a b runs/x` is `evaluate runs/x --data a b`, where nothing else is the run.

    Args:
      words: of the command line, after the program's name.
      commands: dataclasses by name.
    """
    if not words or words[0] not in commands or asks_for_help(words):
        return list(words)
    options, places = options_of(commands[words[0]])
    if len([one for one in places if one.required and not one.open_ended]) != 1 or any(p.open_ended for p in places):
        return list(words)
    position, last = 1, None
    while position < len(words):
        word, position = words[position], position + 1
        if not is_option(word):
            return list(words)  # the place is taken
        name, equals, _ = word.partition("=")
        option = options.get(name.replace("_", "-"))
        if option is None or equals:
            continue
        first, most = position, len(words) if option.open_ended else position + len(option.kinds)
        while position < min(most, len(words)) and not is_option(words[position]):
            position += 1
        if option.open_ended and position - first > 1:
            last = position - 1
    if last is None:
        return list(words)
    return [words[0], words[last], *words[1:last], *words[last + 1 :]]


def check_words(words: Sequence[str], commands: Mapping[str, type], prog: str = "jaxtransfer") -> None:
    """Raises for words that no command is made of.

    Args:
      words: of the command line, after the program's name.
      commands: dataclasses by name; options are their fields, and those of the dataclasses in their fields.
      prog: the program's name.

    Raises:
      InputError: in one line: what is wrong, and the nearest that is right.
    """
    asks = asks_for_help(words)
    if asks and (not words or words[0].startswith("-") or words[0] in commands):
        return
    if not words or words[0].startswith("-"):
        came = f"before {words[0]}" if words else "got nothing"
        raise InputError(f"expected a command, {came}: one of {', '.join(commands)}; see {prog} --help")
    name, *rest = words
    if name not in commands:
        raise InputError(f"{unknown('command', name, commands)}; see {prog} --help")
    try:
        _check_options(name, rest, commands)
    except InputError as error:
        raise InputError(f"{error}; see {prog} {name} --help") from None


def _check_options(name: str, words: Sequence[str], commands: Mapping[str, type]) -> None:
    options, places = options_of(commands[name])
    given, left, position = set(), [], 0
    while position < len(words):
        word, position = words[position], position + 1
        if not is_option(word):
            left.append(word)
            continue
        word, equals, value = word.partition("=")
        option = options.get(word.replace("_", "-"))
        if option is None:
            raise _no_option(name, word, options, commands)
        given.add(option.name)
        following = []
        while position + len(following) < len(words) and not is_option(words[position + len(following)]):
            following.append(words[position + len(following)])
        if equals:
            values, taken = [value], 0
            if not option.kinds:
                raise InputError(f"{word} is a switch and takes no value; got {word}={value}")
        else:
            taken = len(following) if option.open_ended else min(len(option.kinds), len(following))
            values = following[:taken]
        option.check(values)
        position += taken
    missing = [f"{one.name} {one.metavar}" for one in options.values() if one.required and one.name not in given]
    for place in places:
        taken = len(left) if place.open_ended else min(1, len(left))
        if not taken and not place.open_ended:
            missing.insert(0, place.metavar)
            continue
        place.check(left[:taken])
        left = left[taken:]
    if missing:
        raise InputError(f"{name} needs {' and '.join(missing)}")
    if left:
        raise InputError(f"{name} has no use for the word {_brief(left[0])}; options begin with --")


def _no_option(name: str, word: str, options: Mapping[str, Option], commands: Mapping[str, type]) -> InputError:
    close = difflib.get_close_matches(word, options, n=1)
    others = [other for other, kind in commands.items() if word in options_of(kind)[0]]
    if others:
        return InputError(f"{name} has no option {word}, which is one of {', '.join(others)}")
    hint = f" (did you mean {close[0]}?)" if close else ""
    return InputError(f"{name} has no option {word}{hint}")


def options_of(command: type) -> tuple[dict[str, Option], list[Option]]:
    """Returns what a command takes: options by name, and words by their place."""
    options: dict[str, Option] = {}
    places: list[Option] = []
    hints = typing.get_type_hints(command, include_extras=True)
    for field in dataclasses.fields(command):
        kind, notes = _without_notes(hints[field.name])
        if dataclasses.is_dataclass(kind):
            inner, further = options_of(typing.cast(type, kind))
            options |= inner
            places += further
            continue
        told = _told(notes)
        kinds, open_ended = _kinds(kind)
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        name = f"--{told.get('name', field.name).replace('_', '-')}"
        metavar = told.get("metavar", " ".join(getattr(one, "__name__", str(one)).upper() for one in kinds))
        if tyro.conf.Positional in notes:
            places.append(Option(metavar, kinds, open_ended, required, metavar))
            continue
        if kind is bool and field.default is True:
            name = f"--no-{name[2:]}"
        options[name] = Option(name, kinds, open_ended, required, metavar)
    return options, places


def given_options(command: Any) -> dict[str, Any]:
    """Returns what a command was given, by the options' names without dashes, JSON types: all but the defaults."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(type(command), include_extras=True)
    for field in dataclasses.fields(command):
        value, notes = getattr(command, field.name), _without_notes(hints[field.name])[1]
        if dataclasses.is_dataclass(value):
            found |= given_options(value)
        elif value != field.default:
            value = [str(one) if isinstance(one, Path) else one for one in value] if isinstance(value, tuple) else value
            name = _told(notes).get("name", field.name).replace("_", "-")
            found[name] = str(value) if isinstance(value, Path) else value
    return found


def _told(notes: Sequence[Any]) -> dict[str, Any]:
    """The name and the metavar that an option has besides those of its field."""
    return {key: value for note in notes for key in ("name", "metavar") if (value := getattr(note, key, None))}


def _without_notes(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Returns the type inside of `Annotated` and of `| None`, and what it is annotated with."""
    notes: tuple[Any, ...] = ()
    while True:
        if hasattr(hint, "__metadata__"):
            hint, notes = hint.__origin__, (*notes, *hint.__metadata__)
        elif get_origin(hint) in (typing.Union, types.UnionType):
            inner = [one for one in get_args(hint) if one is not type(None)]
            if len(inner) != 1:
                return str, notes
            hint = inner[0]
        else:
            return hint, notes


def _kinds(kind: Any) -> tuple[tuple[Any, ...], bool]:
    """Returns the types of the values that a field takes, and whether it takes any number of the one type."""
    if kind is bool:
        return (), False
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        return ((inner[0],), True) if Ellipsis in inner else (inner, False)
    return (kind if kind in (int, float, str, Path) else str,), False


def is_option(word: str) -> bool:
    """Whether a word is meant as an option; a negative number isn't."""
    if not word.startswith("-") or word == "-":
        return False
    try:
        float(word)
    except ValueError:
        return True
    return False


def _brief(word: str) -> str:
    return repr(word if len(word) <= 60 else f"{word[:57]}...")
