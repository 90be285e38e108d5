"""What stands beside the weights of a text encoder: its making, its pooling, its tokenizer; and a model that agrees."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxtransfer import models
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.pretrained.layouts import Shapes
from jaxtransfer.texts.saved import of_length
from jaxtransfer.texts.tokenizer import Tokenizer
from jaxtransfer.texts.word_pieces import lowered
from jaxtransfer.texts.words import Vocabulary

WORDS, POSITIONS = "params/stem_words/embedding", "params/stem_positions"
_FAMILY = ("bert", "distilbert")
_SAME = {"hidden_act": "gelu", "activation": "gelu", "position_embedding_type": "absolute", "layer_norm_eps": 1e-12}
_MODES = {"cls": "class", "cls_token": "class", "mean": "mean", "mean_tokens": "mean"}


class TextFacts(NamedTuple):
    """What is known of a text encoder besides its weights.

    Attributes:
      family: what `config.json` calls it, "bert" say; "" where nothing says it.
      differs: what of it is not as in our models: "hidden_act relu, not gelu".
      pooling: how one vector is made of a text's; None where nothing says it.
      normalized: whether it is brought to length 1; None where nothing says it.
      tokenizer: what makes its tokens; None where there is none.
    """

    family: str = ""
    differs: tuple[str, ...] = ()
    pooling: str | None = None
    normalized: bool | None = None
    tokenizer: Tokenizer | Vocabulary | None = None


def weights_folder(path: Path) -> Path:
    """Returns where the weights lie in a folder of sentence-transformers; the path itself of anything else.

    Args:
      path: of weights, or of their folder.
    """
    first = next((one for one in _modules(path) if _kind(one) == "Transformer"), None)
    inner = path / str(first.get("path", "")) if first is not None else path
    return inner if inner.is_dir() else path


def text_facts(path: Path) -> TextFacts:
    """Returns what stands beside the weights of a text encoder.

    Args:
      path: their file, or its folder, which may be one of sentence-transformers.

    Raises:
      InputError: for what can't be read, and for modules of sentence-transformers that we have not.
    """
    folder = path if path.is_dir() else path.parent
    inner = weights_folder(folder)
    config = _json(inner / "config.json")
    differs = [f"{name} {config[name]}, not {ours}" for name, ours in _SAME.items() if config.get(name, ours) != ours]
    tokenizer = None
    if any((inner / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        tokenizer = Tokenizer.read(inner)
        own = _json(inner / "sentence_bert_config.json")
        if own.get("do_lower_case"):
            tokenizer = Tokenizer(lowered(tokenizer.definition), tokenizer.length)
        if isinstance(own.get("max_seq_length"), int):
            tokenizer = tokenizer.of_length(own["max_seq_length"])
    pooling = normalized = None
    if modules := _modules(folder):
        kinds = [_kind(one) for one in modules]
        if strange := [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]:
            differs.append(f"a module {strange[0]} behind it, which our models have not")
        normalized = "Normalize" in kinds
        place = next((one.get("path", "") for one in modules if _kind(one) == "Pooling"), None)
        if place is not None:
            pooling = _pooling(_json(folder / str(place) / "config.json"), folder)
    return TextFacts(str(config.get("model_type", "")), tuple(differs), pooling, normalized, tokenizer)


def settled(model: Model, facts: TextFacts, shapes: Shapes, source: str) -> tuple[Model, tuple[str, ...]]:
    """Returns the text encoder that pools as the weights do where its maker left that open, and what to tell.

    Args:
      model: the model that was given.
      facts: of the weights.
      shapes: of the model's leaves.
      source: name of the weights, for errors.

    Raises:
      InputError: for another architecture, or a tokenizer with more tokens than the model.
    """
    if facts.family and facts.family not in _FAMILY:
        raise InputError(f"{source} is of the family {facts.family!r}; expected one of {', '.join(_FAMILY)}")
    if facts.differs:
        raise InputError(f"{source} has {'; '.join(facts.differs)}: the model would give something else in silence")
    known = shapes[WORDS][0]
    if facts.tokenizer is not None and len(facts.tokenizer) > known:
        raise InputError(
            f"the tokenizer of {source} has {len(facts.tokenizer)} tokens, the model {known}: make it vocabulary="
            f"{len(facts.tokenizer)}"
        )
    recipe = model.recipe
    if recipe is None or "pooling" not in recipe.arguments:
        return model, ()
    open_ones = {"pooling": facts.pooling, "normalized": facts.normalized}
    found = {name: value for name, value in open_ones.items() if value is not None}
    notes = [
        f"{name}: the weights say {value!r}, the model given {recipe.arguments[name]!r}, and is left so"
        for name, value in found.items()
        if recipe.arguments[name] not in (None, value)
    ]
    if recipe.arguments["pooling"] is None and facts.pooling is None and recipe.arguments["pooler"] is None:
        notes.append("pooling: nothing says how one vector is made of a text's; the class token is taken")
    told = {name: value for name, value in found.items() if recipe.arguments[name] is None}
    usual = {"pooling": "class", "normalized": False}
    if all(usual[name] == value for name, value in told.items()):
        return model, tuple(notes)
    described = models.describe(model)
    if described is None or not recipe.bare:
        says = " and ".join(f"{name}={value!r}" for name, value in told.items())
        raise InputError(f"{source} says {says}: say so where the model is made, and wrap that, or wrap loaded.model")
    made = models.rebuild({**described, "model_options": {**described.get("model_options", {}), **told}})
    return made, (*notes, *(f"{name}: {value!r}, as the weights say" for name, value in told.items()))


def cut(tokenizer: Tokenizer | Vocabulary, positions: int) -> Tokenizer | Vocabulary:
    """Returns the same tokenizer for no longer texts than there are positions.

    Args:
      tokenizer: what makes the tokens.
      positions: as many as the model has.
    """
    return tokenizer if tokenizer.length <= positions else of_length(tokenizer, (), positions)


def _modules(path: Path) -> list[Mapping[str, Any]]:
    found = _json(path / "modules.json") if path.is_dir() else []
    return [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []


def _kind(module: Mapping[str, Any]) -> str:
    return str(module.get("type", "")).rpartition(".")[2]


def _pooling(config: Mapping[str, Any], folder: Path) -> str:
    """Returns our name of a pooling, as old and new versions of sentence-transformers write it."""
    modes = [name.removeprefix("pooling_mode_") for name, on in config.items() if "pooling_mode_" in name and on]
    mode = config.get("pooling_mode", modes[0] if len(modes) == 1 else "+".join(modes) or "none")
    if mode not in _MODES:
        raise InputError(f"{folder} pools by {mode!r}; our models know {', '.join(sorted(_MODES))}")
    return _MODES[mode]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
