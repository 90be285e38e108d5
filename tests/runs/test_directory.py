"""A run directory that nothing was written into leaves nothing behind."""

import pytest

import jaxtransfer as jt
from jaxtransfer.runs.directory import open_run


def no(directory, writing):
    if writing is not None:
        (directory / writing).write_text("")
    raise jt.InputError("no")


def refused_in(directory, *, writing=None):
    with pytest.raises(jt.InputError, match="no"), open_run(directory, {"steps": 1}):
        no(directory, writing)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_what_is_refused_before_it_wrote_anything_leaves_nothing(tmp_path):
    refused_in(tmp_path / "runs" / "deep" / "a")
    assert names(tmp_path) == []
    with open_run(tmp_path / "runs" / "a", {"steps": 1}):  # a command that checks,
        pass
    refused_in(tmp_path / "runs" / "a")  # and then trains
    assert names(tmp_path) == []


def test_folders_and_files_of_others_stay(tmp_path):
    (own := tmp_path / "own").mkdir()
    refused_in(own)
    assert names(own) == []
    refused_in(tmp_path / "runs" / "a", writing="metrics.jsonl")
    refused_in(tmp_path / "runs" / "b")
    assert names(tmp_path / "runs") == ["a"]
    assert names(tmp_path / "runs" / "a") == [".lock", "config.json", "metrics.jsonl"]


def test_a_begun_run_stays_as_it_was(tmp_path):
    out = tmp_path / "run"
    with open_run(out, {"steps": 1, "lr": 1}):
        (out / "checkpoints" / "step_1").mkdir(parents=True)
    before = (out / "config.json").read_text()
    with pytest.raises(jt.InputError, match="lr: 1 there, 2 now"), open_run(out, {"steps": 1, "lr": 2}):
        pass
    assert (out / "config.json").read_text() == before


def test_a_run_that_is_held_is_left_alone(tmp_path):
    out = tmp_path / "run"
    with open_run(out, {"steps": 1}):
        with pytest.raises(jt.InputError, match="another process is training"), open_run(out, {"steps": 1}):
            pass
        assert names(out) == [".lock", "config.json"]
