"""The definition of a tokenizer in the form of `tokenizer.json`: as it is there, or made for a BERT `vocab.txt`."""

import json
from collections.abc import Mapping
from typing import Any

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def definition_of(text: str, config: Mapping[str, Any], *, pieces: bool) -> dict[str, Any]:
    """Returns the definition of a tokenizer, that neither cuts nor fills up.

    Args:
      text: of the file.
      config: what `tokenizer_config.json` beside it says. As in transformers, it goes before what the file says of
        lower case, accents and Chinese characters.
      pieces: whether the file is a list of word pieces, one a line, and no `tokenizer.json`.

    Raises:
      ValueError: for a file that is none.
    """
    found = _of_pieces(text.removesuffix("\n").split("\n")) if pieces else json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("expected a JSON object")
    normalizer = found.get("normalizer")
    if isinstance(normalizer, dict) and normalizer.get("type") == "BertNormalizer":
        named = {
            "do_lower_case": "lowercase",
            "strip_accents": "strip_accents",
            "tokenize_chinese_chars": "handle_chinese_chars",
        }
        normalizer |= {ours: config[theirs] for theirs, ours in named.items() if theirs in config}
    return {**found, "truncation": None, "padding": None}


def lowered(definition: str) -> str:
    """Returns the definition of the same tokenizer on texts in lower case.

    Args:
      definition: in JSON.
    """
    found = json.loads(definition)
    steps = [{"type": "Lowercase"}, *([found["normalizer"]] if found.get("normalizer") else [])]
    return json.dumps({**found, "normalizer": {"type": "Sequence", "normalizers": steps}}, ensure_ascii=False)


def _of_pieces(pieces: list[str]) -> dict[str, Any]:
    """Returns the definition of BERT's tokenizer: lower case unless the configuration says otherwise."""
    vocabulary = {piece.rstrip("\r"): number for number, piece in enumerate(pieces)}
    if missing := [name for name in _SPECIAL[:4] if name not in vocabulary]:
        raise ValueError(f"the list of word pieces lacks {missing[0]}")

    def special(name: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": 0}}

    def sequence(name: str, kind: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": kind}}

    ends = ("[CLS]", "[SEP]")
    pair = [special("[CLS]"), sequence("A", 0), special("[SEP]"), sequence("B", 1)]
    pair.append({"SpecialToken": {"id": "[SEP]", "type_id": 1}})
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": name, **flags}
            for number, name in sorted((vocabulary[name], name) for name in _SPECIAL if name in vocabulary)
        ],
        "normalizer": {
            **{"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True},
            **{"strip_accents": None, "lowercase": True},
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [special("[CLS]"), sequence("A", 0), special("[SEP]")],
            "pair": pair,
            "special_tokens": {name: {"id": name, "ids": [vocabulary[name]], "tokens": [name]} for name in ends},
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            **{"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"},
            **{"max_input_chars_per_word": 100, "vocab": vocabulary},
        },
    }
