"""Weights of text encoders with their pooling and tokenizer, from folders that are written here."""

import json
import re

import bert_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtransfer as jt

SIZES = {"width": 8, "depth": 2, "heads": 2, "hidden": 12, "vocabulary": 20, "positions": 10}
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "case", "##s", "a", "the", "!", ".", "it", "is"]
PIECES += ["cafe", "broke", "日", "e", "##x"]
TOKENS = np.array([[2, 5, 7, 3, 0], [2, 13, 16, 12, 3]], np.int32)


def model_of(classes=3, **options):
    return jt.models.text_encoder(classes, **{**SIZES, "dropout": 0.0, **options})


def written(folder, w, *, config=None, sentence=None, pieces=PIECES):
    """Writes weights as transformers does; `sentence` are modules of sentence-transformers behind them."""
    folder.mkdir(exist_ok=True)
    header, data = {}, b""
    for name, value in w.items():
        part = value.astype("<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": value.shape, "data_offsets": [len(data), len(data) + len(part)]}
        data += part
    head = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + data)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "num_attention_heads": 2, **(config or {})}))
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    if sentence is not None:
        kinds = ["Transformer", "Pooling", *sentence]
        modules = [
            {"idx": n, "path": f"{n}_{kind}" if n else "", "type": f"sentence_transformers.models.{kind}"}
            for n, kind in enumerate(kinds)
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        modes = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}
        (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 8, **modes}))
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 6}))
    return folder


BARE = bert_reference.weights(classes=0)


def features(model, variables):
    return jax.jit(lambda v: model.apply(v, TOKENS, train=False, key=None)[0]["features"])(variables)


def test_a_folder_of_sentence_transformers_brings_its_pooling_length_and_tokenizer(tmp_path):
    folder = written(tmp_path / "s", BARE, sentence=["Normalize"])
    loaded = jt.load_pretrained(folder, model_of(), reinit="head")
    found = features(loaded.model, loaded.variables)
    for row in range(2):
        mask = TOKENS[row] > 0
        mean = bert_reference.encode(BARE, TOKENS[row], mask, heads=2, start="")[-1][mask].mean(0)
        np.testing.assert_allclose(found[row], mean / np.linalg.norm(mean), atol=1e-5)
    arguments = loaded.model.recipe.arguments
    assert (arguments["pooling"], arguments["normalized"]) == ("mean", True)
    assert loaded.tokenizer.length == 6
    assert len(loaded.tokenizer) == len(PIECES)
    assert loaded.preprocessing is None
    assert loaded.report.fresh.keys() == {"params/head/kernel", "params/head/bias"}
    assert loaded.report.left == dict.fromkeys(["pooler.dense.bias", "pooler.dense.weight"], "the model has no pooler")
    for line in ("pooling: 'mean', as the weights say", "normalized: True", "tokenizer: Tokenizer(20 pieces"):
        assert line in str(loaded.report)


def test_a_file_of_ours_says_how_it_pools(tmp_path):
    model = model_of(pooling="mean", normalized=True)
    first = jt.load_pretrained(BARE, model, reinit="head")
    jt.export_weights((model, first.variables), tmp_path / "w.safetensors")
    loaded = jt.load_pretrained(tmp_path / "w.safetensors", model_of())
    arguments = loaded.model.recipe.arguments
    assert (arguments["pooling"], arguments["normalized"]) == ("mean", True)


def test_what_the_maker_of_the_model_says_goes_before(tmp_path):
    folder = written(tmp_path / "s", BARE, sentence=["Normalize"])
    loaded = jt.load_pretrained(folder, model_of(normalized=False), reinit="head")
    arguments = loaded.model.recipe.arguments
    assert (arguments["pooling"], arguments["normalized"]) == ("mean", False)
    assert "normalized: the weights say True, the model given False" in str(loaded.report)
    wrapped = jt.micro_batched(model_of(), 1)
    with pytest.raises(jt.InputError, match="says pooling='mean' and normalized=True: say so where the model is made"):
        jt.load_pretrained(folder, wrapped, reinit="head")
    jt.load_pretrained(folder, jt.micro_batched(model_of(pooling="mean", normalized=True), 1), reinit="head")


@pytest.mark.parametrize("change", ["none", "old norms", "distilled"])
def test_a_classifier_of_each_family(tmp_path, change):
    w = bert_reference.weights()
    model, activation = model_of(pooler="tanh"), np.tanh
    if change == "distilled":
        model, activation = model_of(pooler="relu", types=0), lambda x: np.maximum(x, 0)
    theirs = bert_reference.distilled(w) if change == "distilled" else dict(w)
    if change == "old norms":
        theirs = {re.sub(r"LayerNorm\.(weight|bias)", _old, name): value for name, value in w.items()}
        theirs |= {"cls.seq_relationship.weight": np.ones((2, 8)), "bert.embeddings.position_ids": np.ones((1, 10))}
    config = {"model_type": "distilbert"} if change == "distilled" else {}
    folder = written(tmp_path / "c", theirs, config={**config, "id2label": {"0": "no", "1": "so", "2": "yes"}})
    loaded = jt.load_pretrained(folder, model)
    found = jax.jit(lambda v: model.apply(v, TOKENS, train=False, key=None)[0]["logits"])(loaded.variables)
    for row in range(2):
        first = bert_reference.encode(w, TOKENS[row], TOKENS[row] > 0, heads=2)[-1][0]
        pooled = activation(w["bert.pooler.dense.weight"] @ first + w["bert.pooler.dense.bias"])
        logits = w["classifier.weight"] @ pooled + w["classifier.bias"]
        np.testing.assert_allclose(found[row], logits, atol=1e-5)
    assert loaded.class_names == ("no", "so", "yes")
    assert loaded.report.scheme == ("Hugging Face DistilBERT" if change == "distilled" else "Hugging Face BERT")
    assert not loaded.report.fresh


def _old(match):
    return "LayerNorm.gamma" if match[1] == "weight" else "LayerNorm.beta"


def test_shorter_texts_take_the_first_positions():
    loaded = jt.load_pretrained(BARE, model_of(positions=6), reinit="head")
    np.testing.assert_array_equal(
        loaded.variables["params"]["stem_positions"], BARE["embeddings.position_embeddings.weight"][:6].astype("f4")
    )
    assert loaded.report.adapted == {"params/stem_positions": "the first 6 of 10 positions"}


@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        ({"positions": 12}, {}, "have positions of 10, the model of 12; make it positions=10"),
        ({"vocabulary": 30}, {}, "have vocabulary of 20, the model of 30; make it vocabulary=20"),
        ({"vocabulary": 19}, {}, "tokenizer of .* has 20 tokens, the model 19: make it vocabulary=20"),
        ({"heads": 4}, {}, "has 2 attention heads, the model 4"),
        ({}, {"model_type": "roberta"}, "is of the family 'roberta'; expected one of bert, distilbert"),
        ({}, {"hidden_act": "gelu_new"}, "has hidden_act gelu_new, not gelu"),
        ({}, {"position_embedding_type": "relative_key"}, "has position_embedding_type relative_key"),
        ({"depth": 3}, {}, "16 missing: params/stage3"),
        ({"types": 0}, {}, "1 left over: embeddings.token_type_embeddings.weight"),
    ],
)
def test_another_architecture_is_one_line(tmp_path, options, config, message):
    folder = written(tmp_path / "w", BARE, config=config)
    with pytest.raises(jt.InputError, match=message):
        jt.load_pretrained(folder, model_of(**options), reinit="head")


def test_a_classifier_on_a_pooler_needs_one():
    with pytest.raises(jt.InputError, match=r"2 left over: bert.pooler.dense"):
        jt.load_pretrained(bert_reference.weights(), model_of())


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pools by 'max_tokens'"),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": 1, "pooling_mode_mean_tokens": 1}, r"cls_token\+mean"),
        ("modules.json", [{"path": "", "type": "x.Transformer"}, {"path": "2", "type": "x.Dense"}], "a module Dense"),
    ],
)
def test_other_poolings_and_modules_are_refused(tmp_path, file, content, message):
    folder = written(tmp_path / "s", BARE, sentence=[])
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(jt.InputError, match=message):
        jt.load_pretrained(folder, model_of(), reinit="head")


def test_newer_names_and_an_inner_folder_of_sentence_transformers(tmp_path):
    folder = written(tmp_path / "s", BARE, sentence=[])
    (folder / "1_Pooling/config.json").write_text(json.dumps({"embedding_dimension": 8, "pooling_mode": "cls"}))
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    written(folder / "0_Transformer", BARE)
    for name in ("model.safetensors", "config.json", "vocab.txt", "sentence_bert_config.json"):
        (folder / name).unlink()
    loaded = jt.load_pretrained(folder, model_of(), reinit="head")
    first = bert_reference.encode(BARE, TOKENS[1], TOKENS[1] > 0, heads=2, start="")[-1][0]
    np.testing.assert_allclose(features(loaded.model, loaded.variables)[1], first, atol=1e-5)
    assert loaded.tokenizer.length == 10  # as many as there are positions


def test_without_pooling_it_is_told_and_commands_have_no_use_for_it(tmp_path):
    loaded = jt.load_pretrained(BARE, model_of(), reinit="head")
    assert "nothing says how one vector is made of a text's; the class token is taken" in str(loaded.report)
    assert jnp.isfinite(loaded.variables["params"]["head"]["kernel"]).all()
    with pytest.raises(jt.InputError, match="is a text encoder, and commands are for images"):
        jt.pretrained.write_run(loaded, tmp_path / "run")
