"""What messages call a folder of a model's outputs: a teacher's cache, or features of `jt.features`."""

from collections.abc import Mapping
from typing import Any

_OF_FEATURES = {"model", "view", "outputs", "weights"}  # what `jt.features` notes of its model


def is_of_features(note: Mapping[str, Any]) -> bool:
    """Whether `jt.features` wrote the folder that the note is of."""
    teacher = note.get("teacher")
    return isinstance(teacher, Mapping) and teacher.keys() >= _OF_FEATURES


def called(note: Mapping[str, Any]) -> str:
    """Returns "folder of features" or "teacher cache"."""
    return "folder of features" if is_of_features(note) else "teacher cache"


def how_anew(note: Mapping[str, Any], data: str = "", split: str = "") -> str:
    """Returns what writes such a folder: a call or a command, of a data set where one is named."""
    if is_of_features(note):
        return "jt.features(..., path=ANOTHER_FOLDER)"
    return f"jaxtransfer cache-teacher RUN{f' --data {data} --split {split}' * bool(data)} --out DIR"


def same_again(note: Mapping[str, Any]) -> str:
    """Returns what was called to write the folder, for a message that says to call it again."""
    return "the same call of jt.features" if is_of_features(note) else "the same cache-teacher command"
