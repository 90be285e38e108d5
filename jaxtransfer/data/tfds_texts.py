"""Texts of a tfds data set as tokens of a vocabulary of its training split."""

from typing import Any

import numpy as np

from jaxtransfer.data.builders import reason_of
from jaxtransfer.data.dataset import Dataset
from jaxtransfer.data.features import Names, is_picture, renamed
from jaxtransfer.data.quiet import quiet_tfds
from jaxtransfer.errors import InputError, unknown
from jaxtransfer.texts.saved import check_tokenizer, of_length
from jaxtransfer.texts.tokenizer import Tokenizer
from jaxtransfer.texts.words import PADDING, Vocabulary

OPTIONS = {"tokens": (), "length": None, "words": 20_000, "tokenizer": None, "train": "train"}


def with_tokens(
    dataset: Dataset,
    builder: Any,
    *,
    tokens: Names,
    length: int | None,
    words: int,
    tokenizer: Vocabulary | Tokenizer | None = None,
    train: str,
) -> Dataset:
    """Returns the data set with texts as columns of tokens, `tokens` and `tokens_mask`, say; see `from_frame`.

    Args:
      dataset: a split of the builder's, whole.
      builder: a tfds builder in array_record form.
      tokens: the feature that becomes `tokens`; or several, as for `from_frame`.
      length: tokens of each text; by default those of the longest training text, at most 256.
      words: words that are known at most.
      tokenizer: what makes the tokens, in place of words of the training texts.
      train: the split whose texts the words are taken from.

    Raises:
      InputError: for a feature that is no single text, and where the training split can't be read.
    """
    names = {"tokens": tokens} if isinstance(tokens, str) else renamed(tokens, "tokens")
    check_tokenizer(tokenizer, asked=True, words=words != OPTIONS["words"])
    known = dict(builder.info.features.items())
    for feature in names.values():
        if feature not in known:
            raise unknown(f"feature of {dataset.name}", feature, known)
        kind = known[feature]
        if isinstance(kind.shape, dict) or tuple(kind.shape) or np.dtype(kind.np_dtype).kind not in "OSU":
            raise InputError(f"{dataset.name}: {feature!r} is not one text per example, so it can't become tokens")
    texts = _texts(builder, dataset.split, list(names.values()), dataset.name)
    learned = texts if train == dataset.split else _texts(builder, train, list(names.values()), dataset.name)
    known_texts = [text for some in learned.values() for text in some]
    if tokenizer is None:
        vocabulary = Vocabulary.of(known_texts, length=length, size=words)
    else:
        vocabulary = of_length(tokenizer, known_texts, length)
    arrays = {new: vocabulary(texts[feature]) for new, feature in names.items()}
    masks = {f"{new}_mask": array != PADDING for new, array in arrays.items()}
    classes = dict.fromkeys(arrays, vocabulary.names)
    if not dataset.entries:
        return Dataset.from_columns(arrays | masks, class_names=classes, name=dataset.name, split=dataset.split)
    return dataset.with_columns(arrays | masks, class_names=classes)


def _texts(builder: Any, split: str, features: list[str], name: str) -> dict[str, list[str]]:
    known = dict(builder.info.features.items())
    with quiet_tfds() as tfds:
        try:
            skipped = {feature: tfds.decode.SkipDecoding() for feature, kind in known.items() if is_picture(kind)}
            source = builder.as_data_source(split, decoders=skipped)
            found: dict[str, list[str]] = {feature: [] for feature in features}
            for start in range(0, len(source), 1024):
                for example in source.__getitems__(list(range(start, min(start + 1024, len(source))))):
                    for feature in features:
                        text = example[feature]
                        found[feature].append(text.decode(errors="replace") if isinstance(text, bytes) else str(text))
        except Exception as error:  # readers raise many types on unknown splits and damaged files
            raise InputError(
                f"cannot read the texts of split {split!r} of {name}: {reason_of(error)}; name the split that training "
                f"is on by train="
            ) from error
    return found
