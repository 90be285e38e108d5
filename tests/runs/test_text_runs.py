"""A run on texts keeps its tokenizer, and gives it back with its model."""

import json

import numpy as np
import optax
import pytest

import jaxtransfer as jt

pytest.importorskip("pandas")

FRAME = {"text": ["fine and good", "bad", "good", "bad and dull"] * 4, "label": [1, 0, 1, 0] * 4}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a tiny encoder, two steps long, and the data set that it learned from."""
    train = jt.data.from_frame(FRAME, label="label", tokens="text")
    sizes = {"width": 8, "depth": 1, "heads": 2, "positions": 8, "vocabulary": len(train.tokenizer)}
    model = jt.models.text_encoder(train.classes, **sizes, pooling="mean")
    out = tmp_path_factory.mktemp("texts") / "run"
    objective, batches = jt.classification(model, view="tokens"), jt.data.pipeline(train, 8)
    jt.fit(objective, optax.adam(1e-2), batches, steps=2, out=out, model=model, dataset=train)
    return out, train


def test_the_tokenizer_is_kept_and_given_back(trained):
    out, train = trained
    run = jt.load_run(out)
    assert run.tokenizer == train.tokenizer
    assert run.config["tokenizer"]["length"] == 3
    again = jt.data.from_frame(FRAME, label="label", tokens="text", tokenizer=run.tokenizer)
    np.testing.assert_array_equal(again.column("tokens"), train.column("tokens"))
    outputs, _ = run.model.apply(run.variables, again.column("tokens"), train=False, key=None)
    assert outputs["logits"].shape == (16, 2)
    loaded = jt.load_pretrained(run, jt.models.rebuild(run.config))
    assert loaded.tokenizer == train.tokenizer
    assert not loaded.report.fresh


def test_another_tokenizer_in_its_place_is_refused(trained, tmp_path):
    out, _ = trained
    (tmp_path / "config.json").write_text((out / "config.json").read_text())
    (tmp_path / "checkpoints").symlink_to(out / "checkpoints")
    run = jt.load_run(tmp_path)
    with pytest.raises(jt.InputError, match="cannot read what makes the tokens of this run"):
        run.tokenizer  # noqa: B018
    kept = json.loads((out / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**kept, "words": kept["words"][::-1]}))
    with pytest.raises(jt.InputError, match="is not the tokenizer that the run was trained with"):
        run.tokenizer  # noqa: B018


def test_tokens_of_another_vocabulary_are_refused():
    train = jt.data.from_frame(FRAME, label="label", tokens="text")
    model = jt.models.minilm_l6(2)
    objective = jt.classification(model, view="tokens")
    with pytest.raises(jt.InputError, match=r"of 7 tokens, words of their own, and model 'model' knows 30522"):
        jt.fit(objective, optax.adam(1e-2), jt.data.pipeline(train, 8), steps=1, model=model, dataset=train)
