"""A command's options from a file, `--config run.yaml`, and what a run notes so that its own file repeats it."""

import datetime
import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import yaml

from jaxtransfer.cli.words import Option, asks_for_help, given_options, is_option, options_of
from jaxtransfer.errors import InputError, unknown
from jaxtransfer.files import expanded, read_text
from jaxtransfer.runs.directory import MADE
from jaxtransfer.version import VERSION

_CONFIG, _OUT = "config", "out"
_INSTEAD = {"steps": "epochs", "epochs": "steps", "seed": "seeds", "seeds": "seed"}  # one says what the other says


def with_settings(words: Sequence[str], commands: Mapping[str, type]) -> list[str]:
    """Returns the words of a command line, and those which the file says that its `--config` names.

    What the command line says goes before the file. What can't be read here is left to `check_words`.

    Args:
      words: after the program's name.
      commands: dataclasses by name.

    Raises:
      InputError: for a file that can't be read, or says what is no option of the command.
    """
    words = list(words)
    if not words or words[0] not in commands or asks_for_help(words):
        return words
    options = {name.removeprefix("--"): option for name, option in options_of(commands[words[0]])[0].items()}
    path = _value_of(_CONFIG, words)
    if path is None or _CONFIG not in options:
        return words
    given = {word.partition("=")[0].removeprefix("--").replace("_", "-") for word in words if is_option(word)}
    more: list[str] = []
    for key, value in _read(path, words[0]).items():
        name = str(key).replace("_", "-")
        if name not in options or name == _CONFIG:
            known = [one for one in options if one != _CONFIG]
            raise InputError(f"{path}: {unknown(f'option of {words[0]}', str(key), known)}")
        if name not in given and _INSTEAD.get(name) not in given and value is not None:
            try:
                more += _words_of(options[name], value)
            except InputError as error:
                raise InputError(f"{path}: {error}") from None
    return [words[0], *more, *words[1:]]


def made_by(name: str, command: Any) -> dict[str, Any]:
    """Returns how a run comes about, for its configuration: versions, date, devices, the command, its options.

    Args:
      name: of the command.
      command: with all of its options.
    """
    options = given_options(command)
    line = ["jaxtransfer", name]
    for option, value in options.items():
        line += [] if option == _CONFIG else [f"--{option}", *_texts(value)]
    devices = Counter(device.device_kind for device in jax.devices())
    return {
        MADE: {
            "command line": shlex.join(line),
            "version": VERSION,
            "jax": jax.__version__,
            "devices": ", ".join(f"{count} × {kind}" for kind, count in devices.items()),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "options": {option: value for option, value in options.items() if option not in (_CONFIG, _OUT)},
        }
    }


def _texts(value: Any) -> list[str]:
    if value is True:
        return []
    return [str(one) for one in value] if isinstance(value, list) else [str(value)]


def _value_of(name: str, words: Sequence[str]) -> str | None:
    found = None
    for number, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option == f"--{name}":
            following = [one for one in words[number + 1 : number + 2] if not is_option(one)]
            found = value if equals else next(iter(following), None)
    return found


def _words_of(option: Option, value: Any) -> list[str]:
    """Returns an option of the command line with the value that a file gives it."""
    if not option.kinds:
        if not isinstance(value, bool):
            raise InputError(f"{option.name} is a switch: true or false; got {value!r:.60}")
        return [option.name] if value else []
    if isinstance(value, Mapping):
        value = [f"{key}={one}" for key, one in value.items()]
    values = value if isinstance(value, list) else [value]
    if any(isinstance(one, bool | Mapping | list) or one is None for one in values):
        raise InputError(f"{option.name} takes {option.metavar}; got {value!r:.60}")
    texts = [str(one) for one in values]
    option.check(texts if option.open_ended else texts[: len(option.kinds)])
    if not option.open_ended and len(texts) > len(option.kinds):
        raise InputError(f"{option.name} takes {option.metavar}; got {' '.join(texts):.60}")
    if len(texts) == 1:
        return [f"{option.name}={texts[0]}"]
    if strange := next(filter(is_option, texts), None):
        raise InputError(f"{option.name}: a value can't begin with a dash; got {strange!r}")
    return [option.name, *texts] if texts else []


def _read(path: str, command: str) -> dict[str, Any]:
    """Returns the options that a file says, by name."""
    try:
        text = read_text(expanded(path))
        found = json.loads(text, object_pairs_hook=_once) if path.endswith(".json") else yaml.load(text, _Loader)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"--config: cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    found = {} if found is None else found
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected options by name, lr: 0.01 say; got {found!r:.60}")
    if "format" not in found and "knows" not in found:
        return found
    if found.get("command") != command:
        raise InputError(f"{path} is the configuration of a run of {found.get('command')}, and this is {command}")
    options = found.get(MADE, {}).get("options") if isinstance(found.get(MADE), dict) else None
    if not isinstance(options, dict):
        raise InputError(f"{path} is of a version that didn't note its options; write them down as name: value")
    return options


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if several := [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]:
        raise ValueError(f"{several[0]!r} is there twice")
    return dict(pairs)


class _Loader(yaml.SafeLoader):
    """Plain values alone; a key that is there twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Returns a mapping."""
        return _once(
            [
                (self.construct_object(key, deep=True), self.construct_object(value, deep=True))
                for key, value in node.value
            ]
        )
