"""Tokenizers of pretrained text encoders: their pieces, lengths, files, and as columns of a table."""

import json
import sys

import numpy as np
import pytest

import jaxtransfer as jt
from jaxtransfer.data import Tokenizer, Vocabulary
from jaxtransfer.texts import saved

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "case", "##s", "a", "the", "!", ".", "it", "is"]
PIECES += ["cafe", "café", "broke", "日", "Good", "##x"]
TEXTS = ["Good cases!", "it BROKE.", "CAFÉ 日日", "", "[PAD] [SEP] unknown", "a" * 101]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    return tmp_path


def spelled(tokenizer, texts):
    return [" ".join(tokenizer.names[k] for k in row if k) for row in tokenizer(texts)]


def test_pieces_of_words(folder):
    pytest.importorskip("tokenizers")
    tokenizer = Tokenizer.read(folder, length=8)
    tokens = tokenizer(TEXTS)
    assert tokens.shape == (6, 8)
    assert tokens.dtype == np.int32
    assert spelled(tokenizer, TEXTS) == [
        "[CLS] good case ##s ! [SEP]",
        "[CLS] it broke . [SEP]",
        "[CLS] cafe 日 日 [SEP]",  # lower case, no accents, Chinese characters by themselves
        "[CLS] [SEP]",
        "[CLS] [UNK] [SEP] [UNK] [SEP]",  # the word for padding is none of the text
        "[CLS] [UNK] [SEP]",  # too long a word
    ]
    short = tokenizer.of_length(4)
    assert spelled(short, TEXTS[:2]) == ["[CLS] good case [SEP]", "[CLS] it broke [SEP]"]
    assert short.longer(TEXTS) == 4
    assert tokenizer.fitted(TEXTS[1:4]).length == 5
    assert tokenizer.fitted([""]).length == 3
    assert spelled(tokenizer.of_length(6), ["it it it it it it"]) == ["[CLS] it it it it [SEP]"]


def test_what_stands_beside_is_heeded(folder):
    pytest.importorskip("tokenizers")
    config = {"do_lower_case": False, "model_max_length": 7}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    cased = Tokenizer.read(folder)
    assert cased.length == 7
    assert spelled(cased, ["Good café BAD"]) == ["[CLS] Good café [UNK] [SEP]"]
    lower = json.loads(cased.definition)
    lower["normalizer"]["lowercase"] = True
    lower |= {"truncation": {"max_length": 3}, "padding": {"pad_id": 0}}
    (folder / "tokenizer.json").write_text(json.dumps(lower))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 1e30}))
    again = Tokenizer.read(folder)
    assert again.length == 512
    assert spelled(again, ["Good cases ! it"]) == ["[CLS] good case ##s ! it [SEP]"]  # neither cut nor filled up


def test_it_is_kept_in_a_file(folder, tmp_path):
    tokenizer, words = Tokenizer.read(folder, length=9), Vocabulary.of(["some words", "more words, ü"])
    for one in (tokenizer, words):
        path = tmp_path / "kept.json"
        path.write_text(saved.as_text(one), encoding="utf-8")
        again = saved.read(path)
        assert type(again) is type(one)
        assert (again.length, again.names) == (one.length, one.names)
        assert saved.digest(again) == saved.digest(one) != saved.digest(Tokenizer.read(folder, length=8))
    path.write_text("{}")
    with pytest.raises(jt.InputError, match="cannot read what makes the tokens of this run"):
        saved.read(path)


def test_columns_of_a_table(folder):
    pytest.importorskip("tokenizers")
    pytest.importorskip("pandas")
    frame = {"text": ["Good case!", "it broke.", "bad"], "label": [1, 0, 0]}
    tokenizer = Tokenizer.read(folder)
    train = jt.data.from_frame(frame, label="label", tokens="text", tokenizer=tokenizer)
    assert train.entries["tokens"].shape == (5,)
    assert train.entries["tokens"].class_names == tokenizer.names
    assert train.column("tokens")[2].tolist() == [2, 6, 3, 0, 0]
    assert train.column("tokens_mask")[2].tolist() == [True, True, True, False, False]
    test = jt.data.from_frame({"text": ["a good case is good"]}, like=train)
    assert test.column("tokens").tolist() == [[2, 9, 5, 7, 3]]
    assert jt.data.from_frame(frame, label="label", tokens="text", tokenizer=tokenizer, length=4).read([0])[
        "tokens"
    ].tolist() == [[2, 5, 7, 3]]
    words = Vocabulary.of(["good case"])
    assert jt.data.from_frame(frame, tokens="text", tokenizer=words, label="label").column("tokens")[2].tolist() == [
        1,
        0,
    ]
    for options, message in (
        ({"tokenizer": tokenizer}, "name their column: tokens="),
        ({"tokenizer": tokenizer, "tokens": "text", "words": 5}, "with tokenizer= leave it out"),
        ({"tokenizer": "bert", "tokens": "text"}, "got a str"),
        ({"tokenizer": tokenizer, "like": train}, "with like="),
    ):
        with pytest.raises(jt.InputError, match=message):
            jt.data.from_frame(frame, **options)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none", "", "there is no tokenizer at"),
        ("vocab.txt", "a\nb\n", r"lacks \[PAD\]"),
        ("tokenizer.json", "[1", "cannot read the tokenizer"),
        ("tokenizer.json", "{}", "has no vocabulary"),
        (
            "tokenizer.json",
            json.dumps({"model": {"vocab": {"<s>": 0, "<pad>": 1}}, "added_tokens": []}),
            "token 0 is padding.*token 0 is '<s>'",
        ),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path, name, content, message):
    if name != "none":
        (tmp_path / name).write_text(content)
    with pytest.raises(jt.InputError, match=message):
        Tokenizer.read(tmp_path)


def test_lengths_and_texts_are_checked(folder):
    for length, message in ((0, "at least one token"), (2.5, "at least one token"), (2, "no room beside 2 special")):
        with pytest.raises(jt.InputError, match=message):
            Tokenizer.read(folder, length=length)
    pytest.importorskip("tokenizers")
    for texts, message in (("one", "several texts, got one"), ([None], "text 0 is None")):
        with pytest.raises(jt.InputError, match=message):
            Tokenizer.read(folder)(texts)


def test_without_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(jt.InputError, match=r"pip install 'jaxtransfer\[text\]'"):
        Tokenizer.read(folder)(["good"])
