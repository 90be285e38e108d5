"""tfds builders of prepared folders, opened only where the folder asks for no code but tfds' own."""

import json
import re
from pathlib import Path
from typing import Any

from jaxtransfer.data.images import shown
from jaxtransfer.data.quiet import quiet_tfds
from jaxtransfer.errors import InputError
from jaxtransfer.files import read_text

FEATURES = "features.json"
_OWN = re.compile(r"tensorflow_datasets\.core\.features(\.[A-Za-z_]\w*)*\.[A-Za-z_]\w*")
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")  # the last one in folders of earlier versions


def builder_of(folder: Path) -> Any:
    """Returns the tfds builder of a prepared folder.

    Raises:
      InputError: where its features name a class that is not tfds' own, as tfds would import and run its module; or
        where its files can't be read.
    """
    check_features(folder)
    with quiet_tfds() as tfds:
        try:
            return tfds.builder_from_directory(folder)
        except Exception as error:  # whatever damaged metadata makes tfds raise
            raise InputError(
                f"the tfds data set in {shown(str(folder))} cannot be read: {reason_of(error)}; prepare it anew or "
                "remove it"
            ) from error


def check_features(folder: Path) -> None:
    """Raises where the features of a prepared folder name a class that is not tfds' own; imports nothing."""
    path = folder / FEATURES
    try:
        for name in _class_names(json.loads(read_text(path))):
            if not _OWN.fullmatch(name):
                raise InputError(
                    f"{shown(str(path))} names the class {name[:100]!r}, whose module tfds would import and run; "
                    "expected tfds' own feature classes, tensorflow_datasets.core.features.*; remove the folder, or "
                    "read it in a program of your own, by tfds"
                )
    except FileNotFoundError:
        return  # tfds says what is missing
    except (OSError, RecursionError) as error:
        raise InputError(
            f"cannot read {shown(str(path))}: {reason_of(error)}; prepare the set anew or remove it"
        ) from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{shown(str(path))} is no JSON: {error}; prepare the set anew or remove it") from None


def check_all_features(folder: Path) -> None:
    """Checks the features of all sets below a folder, which tfds may choose from by rules of its own."""
    if folder.is_dir():
        for path in sorted(folder.rglob(FEATURES)):
            check_features(path.parent)


def reason_of(error: BaseException) -> str:
    """Returns the first line of an error's message, or its kind."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _class_names(value):
    """Yields every class that is named anywhere in the features, in texts of JSON inside of them too."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in _CLASS_KEYS and isinstance(inner, str):
                yield inner
            yield from _class_names(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _class_names(inner)
    elif isinstance(value, str) and ("{" in value or "[" in value):
        try:
            inside = json.loads(value)
        except ValueError:
            return
        yield from _class_names(inside)
