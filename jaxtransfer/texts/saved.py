"""What makes tokens, as a run keeps it in a file beside its configuration, and brought to a length."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtransfer.errors import InputError
from jaxtransfer.files import read_text
from jaxtransfer.texts.tokenizer import Tokenizer
from jaxtransfer.texts.words import Vocabulary

FILE = "tokenizer.json"
_PIECES, _WORDS = "pieces of words", "words"


def as_text(tokenizer: Tokenizer | Vocabulary) -> str:
    """Returns it in JSON; `from_text` reads it again.

    Args:
      tokenizer: what makes the tokens.
    """
    plain: dict[str, Any] = {"kind": _WORDS, "length": tokenizer.length}
    if isinstance(tokenizer, Vocabulary):
        plain["words"] = list(tokenizer.words)
    else:
        plain |= {"kind": _PIECES, "definition": json.loads(tokenizer.definition)}
    return json.dumps(plain, ensure_ascii=False)


def from_text(text: str) -> Tokenizer | Vocabulary:
    """Returns what `as_text` wrote.

    Args:
      text: in JSON.

    Raises:
      ValueError: where it is something else.
    """
    plain = json.loads(text)
    if not isinstance(plain, dict) or plain.get("kind") not in (_PIECES, _WORDS):
        raise ValueError("expected an object that says its kind")
    if plain["kind"] == _WORDS:
        return Vocabulary(tuple(plain["words"]), plain["length"])
    return Tokenizer(json.dumps(plain["definition"], ensure_ascii=False), plain["length"])


def read(path: Path) -> Tokenizer | Vocabulary:
    """Reads what a run keeps.

    Args:
      path: of the file.

    Raises:
      InputError: where it isn't there, or is something else.
    """
    try:
        return from_text(read_text(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read what makes the tokens of this run, {path}: {error}; restore it") from None


def digest(tokenizer: Tokenizer | Vocabulary) -> str:
    """Returns what tells it from others.

    Args:
      tokenizer: what makes the tokens.
    """
    return hashlib.sha256(as_text(tokenizer).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def check_tokenizer(tokenizer: Any, *, asked: bool, words: bool) -> None:
    """Raises for what makes no tokens, or for tokens that nobody asked for.

    Args:
      tokenizer: what was given, or None.
      asked: whether texts are to become tokens.
      words: whether a number of words was given, too.
    """
    if tokenizer is None:
        return
    if not isinstance(tokenizer, Tokenizer | Vocabulary):
        raise InputError(
            f"tokenizer= is a jt.data.Tokenizer or a jt.data.Vocabulary, got a {type(tokenizer).__name__}; "
            f"jt.data.Tokenizer.read(path) reads one"
        )
    if not asked:
        raise InputError("tokenizer= makes tokens of texts; name their column: tokens=")
    if words:
        raise InputError("words= counts the words of training texts; with tokenizer= leave it out")


def of_length(tokenizer: Tokenizer | Vocabulary, texts: Sequence[str], length: int | None) -> Tokenizer | Vocabulary:
    """Returns the same tokenizer for texts of some length.

    Args:
      tokenizer: what makes the tokens.
      texts: of the training examples; where no length is given, the longest of them says it.
      length: tokens of each text, or None.
    """
    if isinstance(tokenizer, Vocabulary):
        return tokenizer if length is None else Vocabulary(tokenizer.words, length)
    return tokenizer.fitted(texts) if length is None else tokenizer.of_length(length)
