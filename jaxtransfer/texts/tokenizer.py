"""Texts as pieces of words, by the tokenizer that came with somebody's weights."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxtransfer.errors import InputError
from jaxtransfer.files import expanded, read_text
from jaxtransfer.texts.word_pieces import definition_of
from jaxtransfer.texts.words import PADDING, plain_texts

LONGEST = 512


@dataclasses.dataclass(frozen=True, repr=False)
class Tokenizer:
    """What a `tokenizer.json` says, called with texts: tokens as the weights beside it were trained on them.

        tokenizer = loaded.tokenizer  # of jt.load_pretrained
        tokens = tokenizer(["Good case.", "It broke."])  # int32 [2, length], filled up by 0

    The package `tokenizers` (the extra `text`) does the work: lower case, accents, signs, pieces of words, the special
    tokens in front and behind. What stands for padding is token 0; where a text itself has the word for it, "[PAD]",
    the token for unknown words stands there.

    Attributes:
      definition: the text of the file.
      length: tokens of each text, special ones too; longer texts are cut, shorter ones filled up.
    """

    definition: str
    length: int = LONGEST

    def __post_init__(self):
        if isinstance(self.length, bool) or not isinstance(self.length, int | np.integer) or self.length < 1:
            raise InputError(f"a text has at least one token, a whole number; got length={self.length!r}")
        if not self._vocabulary:
            raise InputError("a tokenizer's definition has no vocabulary; expected the text of a tokenizer.json")
        first = self.names[PADDING]
        if first not in self._special:
            raise InputError(
                f"expected a tokenizer whose token 0 is padding, as those of the BERT family have it; its token 0 is "
                f"{first!r}"
            )
        if self.length <= self._extra:
            raise InputError(f"length={self.length} leaves no room beside {self._extra} special tokens; take more")

    @classmethod
    def read(cls, path: str | Path, *, length: int | None = None) -> "Tokenizer":
        """Reads a tokenizer.

        Args:
          path: a `tokenizer.json`, a `vocab.txt` (one word piece a line), or a folder with one of them; what a
            `tokenizer_config.json` beside says of lower case, accents and the length counts too.
          length: tokens of each text; by default what the configuration says, at most 512.

        Raises:
          InputError: where there is none, or it can't be read.
        """
        path = expanded(path)
        folder = path if path.is_dir() else path.parent
        names = [path.name] if not path.is_dir() else ["tokenizer.json", "vocab.txt"]
        file = next((folder / name for name in names if (folder / name).is_file()), None)
        if file is None:
            raise InputError(f"there is no tokenizer at {path}; expected a tokenizer.json or a vocab.txt")
        try:
            config = _object(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
            definition = definition_of(read_text(file), config, pieces=file.suffix == ".txt")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"cannot read the tokenizer {file}: {error!r}") from None
        most = config.get("model_max_length")
        usual = min(int(most), LONGEST) if isinstance(most, int | float) and most >= 1 else LONGEST
        return cls(json.dumps(definition, ensure_ascii=False), usual if length is None else length)

    @property
    def names(self) -> tuple[str, ...]:
        """What the numbers stand for: token k is `names[k]`."""
        return self._names

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self):
        return f"Tokenizer({len(self)} pieces of words, {self.length} tokens a text)"

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the tokens of texts, int32 [N, length], filled up by 0.

        Raises:
          InputError: for what are no texts; without the package `tokenizers`.
        """
        tokens = np.full((len(texts), self.length), PADDING, np.int32)
        for row, numbers in enumerate(self._encoded(texts, cut=True)):
            tokens[row, : len(numbers)] = [number if number != PADDING else self._unknown for number in numbers]
        return tokens

    def longer(self, texts: Sequence[str]) -> int:
        """Returns how many texts have more tokens than `length`, and are cut."""
        return sum(len(numbers) > self.length for numbers in self._encoded(texts, cut=False))

    def fitted(self, texts: Sequence[str]) -> "Tokenizer":
        """Returns the same tokenizer for no longer texts than these: shorter rows, less to compute.

        Args:
          texts: of the training examples, say.
        """
        longest = max((len(numbers) for numbers in self._encoded(texts, cut=True)), default=self.length)
        return self.of_length(max(longest, self._extra + 1))

    def of_length(self, length: int) -> "Tokenizer":
        """Returns the same tokenizer for texts of another number of tokens.

        Args:
          length: tokens of each text, special ones too.
        """
        return dataclasses.replace(self, length=length)

    def _encoded(self, texts: Sequence[str], *, cut: bool) -> list[list[int]]:
        self._rust.enable_truncation(self.length) if cut else self._rust.no_truncation()
        return [encoding.ids for encoding in self._rust.encode_batch(list(plain_texts(texts)))]

    @cached_property
    def _content(self) -> Mapping[str, Any]:
        try:
            found = json.loads(self.definition)
        except ValueError as error:
            raise InputError(f"a tokenizer's definition is no JSON: {error}") from None
        return found if isinstance(found, dict) else {}

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        model, added = self._content.get("model"), self._content.get("added_tokens") or []
        own = model.get("vocab") if isinstance(model, dict) else None
        own = own if isinstance(own, dict) else {}
        return {**own, **{one["content"]: one["id"] for one in added}} if own else {}

    @cached_property
    def _names(self) -> tuple[str, ...]:
        names = {number: piece for piece, number in self._vocabulary.items()}
        return tuple(names.get(number, f"<{number}>") for number in range(max(names) + 1))

    @cached_property
    def _special(self) -> frozenset[str]:
        return frozenset(one["content"] for one in self._content.get("added_tokens") or [] if one.get("special"))

    @cached_property
    def _unknown(self) -> int:
        return self._vocabulary.get(self._content["model"].get("unk_token") or "[UNK]", PADDING)

    @cached_property
    def _extra(self) -> int:
        """How many special tokens each text gets."""
        processor = self._content.get("post_processor")
        single = processor.get("single", ()) if isinstance(processor, dict) else ()
        return sum("SpecialToken" in one for one in single) if single else 2 * bool(processor)

    @cached_property
    def _rust(self) -> Any:
        try:
            import tokenizers
        except ImportError:
            raise InputError(
                "the tokenizers of pretrained text encoders need the package tokenizers: "
                "pip install 'jaxtransfer[text]'"
            ) from None
        try:
            return tokenizers.Tokenizer.from_str(self.definition)
        except Exception as error:  # the package raises bare exceptions
            raise InputError(f"the package tokenizers can't read this tokenizer: {error}") from None


def _object(path: Path) -> dict[str, Any]:
    found = json.loads(read_text(path))
    return found if isinstance(found, dict) else {}
