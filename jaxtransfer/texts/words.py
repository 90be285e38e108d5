"""Sentences as numbers of words: a small tokenizer that depends on nothing but the training texts."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jaxtransfer.errors import InputError

PADDING, UNKNOWN = 0, 1
_SPECIAL = ("<padding>", "<unknown>")
_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
_LONGEST = 256


def words_of(text: str) -> list[str]:
    """Returns the words of a text in lower case, signs by themselves: "It's 5 €." is it's, 5, €, and the full stop."""
    return _WORD.findall(unicodedata.normalize("NFC", text).casefold())


@dataclass(frozen=True)
class Vocabulary:
    """The words of training texts, by their numbers; called with texts it gives tokens.

        vocabulary = jt.data.Vocabulary.of(train_texts)
        tokens = vocabulary(test_texts)  # int32 [N, length]: 0 is padding, 1 a word that it doesn't know

    Attributes:
      words: the words; word k has the number k + 2.
      length: tokens of each text; longer texts are cut, shorter ones filled up.
    """

    words: tuple[str, ...]
    length: int

    def __post_init__(self):
        if self.length < 1 or int(self.length) != self.length:
            raise InputError(f"a text has at least one token, a whole number; got length={self.length}")

    @classmethod
    def of(
        cls, texts: Iterable[str], *, length: int | None = None, size: int = 20_000, min_count: int = 1
    ) -> "Vocabulary":
        """Collects the words of training texts, the most frequent ones first, those of one count in plain order.

        Args:
          texts: of the training examples alone; a word that only others have is to stay unknown.
          length: tokens of each text; by default those of the longest text, at most 256.
          size: words that are kept at most.
          min_count: how often a word must occur to be kept.

        Raises:
          InputError: for what are no texts, or texts without a word.
        """
        if size < 1 or min_count < 1:
            raise InputError(f"a vocabulary needs size >= 1 and min_count >= 1, got {size} and {min_count}")
        counts, longest = Counter(), 0
        for text in plain_texts(texts):
            found = words_of(text)
            counts.update(found)
            longest = max(longest, len(found))
        kept = sorted((word for word, count in counts.items() if count >= min_count), key=lambda w: (-counts[w], w))
        if not kept:
            raise InputError(f"the training texts have no words that occur {min_count} times or more")
        return cls(tuple(kept[:size]), min(longest, _LONGEST) if length is None else length)

    @property
    def names(self) -> tuple[str, ...]:
        """What the numbers stand for: token k is `names[k]`."""
        return (*_SPECIAL, *self.words)

    def __len__(self) -> int:
        return len(self.words) + len(_SPECIAL)

    def __repr__(self):
        return f"Vocabulary({len(self.words)} words, {self.length} tokens a text)"

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the tokens of texts, int32 [N, length], filled up by 0."""
        tokens = np.full((len(texts), self.length), PADDING, np.int32)
        for row, text in enumerate(plain_texts(texts)):
            numbers = [self._numbers.get(word, UNKNOWN) for word in words_of(text)[: self.length]]
            tokens[row, : len(numbers)] = numbers
        return tokens

    def longer(self, texts: Sequence[str]) -> int:
        """Returns how many texts have more words than `length`, and are cut."""
        return sum(len(words_of(text)) > self.length for text in plain_texts(texts))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words, len(_SPECIAL))}


def plain_texts(texts: Iterable[str]) -> Iterable[str]:
    """Yields texts, checked.

    Args:
      texts: several.

    Raises:
      InputError: for one text, and for what are none.
    """
    if isinstance(texts, str):
        raise InputError(f"expected several texts, got one, {texts[:40]!r}; pass a list")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"text {number} is {text!r:.60}, a {type(text).__name__}; expected a text, '' for none")
        yield text
