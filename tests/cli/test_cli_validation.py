"""The best step is chosen on other examples than it is tested on; several seeds come to a mean with its interval."""

import json

import numpy as np
import pytest

import jaxtransfer as jt
from jaxtransfer.runs.loggers import read_jsonl
from jaxtransfer.runs.result import Spread

DIGITS = ("--data", "digits/upright", "--eval-split", "test[:48]", "--batch-size", "16", "--model", "linear")
TINY = ("pretrain", *DIGITS, "--steps", "4", "--eval-every", "1", "--lr", "0.01")


@pytest.mark.slow
def test_several_seeds_and_a_share_held_out(run, refused, tmp_path):
    out = tmp_path / "out"
    words = (*TINY, "--split", "train[:200]", "--val-split", "0.2", "--out", out)
    lines = run(*words, "--seeds", "0", "3")[0]
    summary = json.loads((out / "summary.json").read_text())
    results = [json.loads((out / f"seed-{seed}" / "result.json").read_text()) for seed in (0, 3)]
    for seed, result in zip((0, 3), results, strict=True):
        records = read_jsonl(out / f"seed-{seed}" / "metrics.jsonl")
        best = max((one for one in records if "eval/accuracy" in one), key=lambda one: one["eval/accuracy"])
        assert result["step"] == best["step"]
        assert result["chosen by"]["accuracy"] == best["eval/accuracy"]
        assert result["chosen on"] == "digits/upright (0.2 of train[:200])"
        scores = json.loads(run("evaluate", out / f"seed-{seed}")[0][0])
        assert scores["split"] == "test[:48]"
        assert scores["accuracy"] == pytest.approx(result["test"]["accuracy"])
        report = (out / f"seed-{seed}" / "report.md").read_text()
        assert "On digits/upright (0.2 of train[:200])," in report
        assert f"## Test of step {result['step']}" in report
    one, other = (result["test"]["accuracy"] for result in results)
    found = summary["test"]["accuracy"]
    assert found["values"] == [one, other]
    assert found["mean"] == pytest.approx((one + other) / 2)
    assert found["interval"] == pytest.approx(12.7062 * abs(one - other) / 2, rel=1e-4)  # t of one degree of freedom
    assert summary["seeds"] == [0, 3]
    assert summary["made"]["options"]["seeds"] == [0, 3]
    assert lines[-2].startswith("2 seeds, mean ± 95 % interval: ")
    assert f"{one:.4g}" in (out / "report.md").read_text()
    # one seed more trains that one alone; another option is refused by the first that has another
    again = run(*words, "--seeds", "0", "3", "1")[0]
    assert sum(line.startswith("already done") for line in again) == 2
    assert len(json.loads((out / "summary.json").read_text())["test"]["accuracy"]["values"]) == 3
    assert "weight_decay: 0.0 there, 0.1 now" in refused(*words, "--seeds", "0", "3", "--weight-decay", "0.1")
    assert "val_split: '0.2' there, '0.3' now" in refused(*words, "--seeds", "3", "--val-split", "0.3")
    for words in (("evaluate", out), ("inspect", out), ("finetune", "--from", out, "--data", "digits/noisy")):
        more = ("--out", tmp_path / "other") if words[0] == "finetune" else ()
        told = f"{out} holds runs of several seeds: {out}/seed-0, seed-1, seed-3; name one"
        assert refused(*words, *more) == told
    assert "holds a run, and --seeds" in refused(*TINY, "--seeds", "1", "2", "--out", out / "seed-3")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--val-split 1.5", "a share of the training examples below 1; got 1.5"),
        ("--val-split 0", "a share of the training examples below 1; got 0"),
        ("--val-split train[90%:]", "--split train and --val-split train[90%:] have examples in common"),
        ("--split train[:60%] --val-split train[50%:]", "--split train[:60%] and --val-split train[50%:] have"),
        ("--val-split test", "--eval-split test[:48] and --val-split test have examples in common"),
        (
            "--split all[:40%] --eval-split train --val-split test",
            "--split all[:40%] and --val-split test have examples",
        ),
        ("--split train[:1_00] --val-split train[50:]", "nothing tells whether they have examples in common"),
        ("--val-split validation", "unknown split of digits/upright 'validation'"),
        ("--seed 3 --seeds 1 2", "--seed and --seeds both say the seed"),
        ("--seeds 1 1", "each once; got 1 1"),
        ("--seeds -1", "--seeds are whole numbers from 0 on"),
    ],
)
def test_what_can_not_be(refused, tmp_path, words, expected):
    assert expected in refused(*TINY, "--out", tmp_path / "out", *words.split())
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_share_of_each_class_is_held_out():
    labels = [0] * 10 + [1] * 5 + [2] + [3] * 2
    data = jt.data.Dataset.from_arrays(np.arange(18, dtype=np.uint8).reshape(18, 1, 1, 1), labels)
    rest, held = jt.data.hold_out(data, 0.3, seed=1)
    assert np.bincount(held.labels, minlength=4).tolist() == [3, 2, 0, 1]
    pixels = [one.read(np.arange(len(one)))["image"].ravel().tolist() for one in (rest, held)]
    assert sorted(pixels[0] + pixels[1]) == list(range(18))
    assert held.split == "0.3 of all"
    others = [jt.data.hold_out(data, 0.3, seed=seed)[1].rows.tolist() for seed in (1, 2)]
    assert others[0] == held.rows.tolist() != others[1]
    with pytest.raises(jt.InputError, match="above 0 and below 1"):
        jt.data.hold_out(data, 1.0)
    with pytest.raises(jt.InputError, match="no class of two examples"):
        jt.data.hold_out(data.select([0, 10]), 0.5)


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ("train", "test", False),
        ("train", "train", True),
        ("train[:50%]", "train[50%:]", False),
        ("train[:51]", "train[50:]", True),
        ("train[:-10]", "train[-10:]", False),
        ("train[:-9]", "train[-10:]", True),
        ("test+train[:10]", "train[5:20]", True),
        ("train[90:]", "train[:200]", True),
        ("all", "test", True),
        ("train[:5]", "test+all", True),
    ],
)
def test_splits_that_share_examples(one, other, shared):
    assert jt.data.share_examples(one, other, {"train": 100, "test": 10}.__getitem__) == shared


def test_an_interval_is_students():
    """Of four values: t(3) = 3.18245, s = 1.29099."""
    spread = Spread.of([1.0, 2.0, 3.0, 4.0])
    assert spread.mean == 2.5
    assert spread.half == pytest.approx(3.18245 * 1.29099 / 2, rel=1e-5)
    assert str(Spread.of([2.0])) == "2"
    with pytest.raises(jt.InputError, match="one run or more"):
        Spread.of([])
