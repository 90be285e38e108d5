"""What a full disk, a kill and a careless editor leave of a run's records, and what comes of it."""

import json
import os
import struct
import threading
import warnings

import jax
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.runs import checkpoints, files
from jaxtransfer.runs.events import tensorboard
from jaxtransfer.runs.loggers import jsonl, read_jsonl
from jaxtransfer.runs.report import write_report

OBJECTIVE = jt.classification(jt.models.mlp(3, hidden=()))
BATCHES = [
    {
        "image": np.random.default_rng(i).normal(size=(6, 4)).astype(np.float32),
        "label": np.arange(6, dtype=np.int32) % 3,
    }
    for i in range(8)
]


def fit(out, **options):
    options = {"steps": 8, "eval_data": BATCHES[:1], "eval_every": 2, "log_every": 2, **options}
    return jt.fit(OBJECTIVE, optax.sgd(0.1), BATCHES, out=out, **options)


def events(folder):
    """The events of a folder in the order of its files, after a look at their checksums."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(folder.glob("events*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            record = data[at + 12 : at + 12 + length]
            for part, place in ((data[at : at + 8], at + 8), (record, at + 12 + length)):
                assert struct.unpack_from("<I", data, place)[0] == masked_crc32c(part)
            found.append(Event.FromString(record))
            at += 16 + length
        assert at == len(data)
    return found


def masked_crc32c(data):
    """CRC-32C (Castagnoli), bit by bit, rotated and shifted as TFRecord wants it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def scalars(folder):
    return {(event.step, value.tag): value.simple_value for event in events(folder) for value in event.summary.value}


class FullDisk:
    """Lets so many bytes be appended to files whose path holds a word, and then no more, in part of a record."""

    def __init__(self, monkeypatch, word, room):
        self.room, write = room, files.Appended.write

        class Raw:
            def __init__(self, file, disk):
                self.file, self.disk = file, disk

            def write(self, record):
                some = record[: self.disk.room]
                if record and not some:
                    raise OSError(28, "No space left on device")
                self.disk.room -= len(some)
                return self.file.write(some)

            def __getattr__(self, name):
                return getattr(self.file, name)

        def limited(appended, record):
            if word in str(appended._file.name) and not isinstance(appended._file, Raw):
                appended._file = Raw(appended._file, self)
            write(appended, record)

        monkeypatch.setattr(files.Appended, "write", limited)


def test_events_are_there_as_soon_as_they_are_logged_and_no_thread_writes_them(tmp_path):
    before = threading.active_count()
    with tensorboard(tmp_path, up_to=0) as log:
        log({"step": 3, "train/loss": 1.5, "train/accuracy": 0.25})
        assert threading.active_count() == before
        assert scalars(tmp_path) == {(3, "train/loss"): 1.5, (3, "train/accuracy"): 0.25}
    with tensorboard(tmp_path, up_to=3) as log:
        log({"step": 4, "train/loss": 0.5})
    with tensorboard(tmp_path / "new", up_to=0) as log:
        log({"step": 1, "train/loss": 0.5})
    with tensorboard(tmp_path / "new", up_to=0):  # begun anew: the curve of the first attempt goes
        pass
    assert [event.session_log.status for event in events(tmp_path / "new")] == [0, 0, 0, 1]
    first, _, again, purged, last = events(tmp_path)
    assert first.file_version == again.file_version == "brain.Event:2"
    assert (purged.step, purged.session_log.status) == (4, 1)  # START: what is older from step 4 on is superseded
    assert (last.step, last.summary.value[0].simple_value) == (4, 0.5)


@pytest.mark.slow
def test_a_full_disk_costs_tensorboard_and_not_the_training(tmp_path, monkeypatch):
    whole = fit(tmp_path / "whole")
    FullDisk(monkeypatch, "tfevents", 333)
    with pytest.warns(UserWarning, match=r"tensorboard: No space left on device; TensorBoard gets no more") as told:
        fitted = fit(tmp_path / "run")
    assert len(told) == 1
    assert fitted.history == whole.history
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl") == whole.history
    left = scalars(tmp_path / "run" / "tensorboard")  # whole events only
    assert left
    assert left.items() < scalars(tmp_path / "whole" / "tensorboard").items()


def test_a_folder_where_tensorboard_should_be_is_a_file(tmp_path):
    (tmp_path / "tensorboard").write_text("")
    with (
        pytest.warns(UserWarning, match=r"TensorBoard gets no more"),
        tensorboard(tmp_path / "tensorboard", up_to=0) as log,
    ):
        log({"step": 1, "loss": 1.0})


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path):
    import subprocess

    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], check=False)
    if mounted.returncode:
        pytest.skip("may not mount")
    try:
        with tensorboard(place / "tb", up_to=0) as log:
            (place / "fill").write_bytes(b"x" * 40_000)
            with pytest.warns(UserWarning, match="No space left") as told:
                [log({"step": step, "train/loss": 1.0, "train/accuracy": 0.5}) for step in range(3000)]
        assert len(told) == 1
        assert 50 < len(scalars(place / "tb")) < 6000
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 100, 250])
def test_metrics_that_do_not_fit_end_the_run_and_cost_no_checkpoint(tmp_path, monkeypatch, room):
    whole = fit(tmp_path / "whole")
    metrics = tmp_path / "run" / "metrics.jsonl"
    with monkeypatch.context() as patched:
        FullDisk(patched, "metrics.jsonl", room)
        with pytest.raises(jt.InputError, match=r"could not write .*metrics.jsonl: No space left.*same command again"):
            fit(tmp_path / "run")
    assert metrics.read_bytes().endswith(b"\n") or not metrics.read_bytes()
    resumed = fit(tmp_path / "run")
    assert resumed.history == whole.history
    assert metrics.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_a_logger_that_fails_loses_no_checkpoint(tmp_path):
    def broken(record):
        if record["step"] == 4:
            raise RuntimeError("the tracking server went away")

    with pytest.raises(RuntimeError, match="went away"):
        fit(tmp_path / "run", log=broken)
    assert checkpoints.steps(tmp_path / "run" / "checkpoints") == [2, 4]
    assert fit(tmp_path / "run").history == fit(tmp_path / "whole").history


NO_RECORDS = [b"7", b"{}", b'"step"', b"[1]", b"null", b'{"step": 1, "train/loss": "low"}', b'{"step": true}']
NO_RECORDS += [b"\xff\xfe\x00", b'{"step": 2.5, "train/loss": 1}', b"{", b""]


@pytest.mark.parametrize("line", NO_RECORDS)
@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl"])
def test_lines_that_are_no_records_are_left_out_and_told(tmp_path, line, name):
    path = tmp_path / name
    path.write_bytes(b'{"step": 1, "train/loss": 2}\n' + line + b'\n{"step": 2, "train/loss": 1}\n')
    with pytest.warns(UserWarning, match=rf"{name}: 1 of 3 lines are no records and left out, the first is line 2"):
        assert [record["step"] for record in read_jsonl(path)] == [1, 2]
    with pytest.warns(UserWarning, match="no records"), jsonl(path, up_to=1) as log:
        log({"step": 2, "train/loss": 3.0})
    assert path.read_text() == '{"step": 1, "train/loss": 2}\n{"step": 2, "train/loss": 3.0}\n'


def test_a_last_line_that_was_cut_off_is_no_surprise(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "train/loss": 2}\n{"step": 2, "tra\xc3')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == [1]


def test_a_run_with_spoiled_records_goes_on(tmp_path):
    fit(tmp_path / "run", steps=4)
    for name in ("metrics.jsonl", "timing.jsonl"):
        path = tmp_path / "run" / name
        path.write_bytes(b"7\n{}\n\xff\n" + path.read_bytes())
    with pytest.warns(UserWarning, match="3 of 7 lines are no records"):
        again = fit(tmp_path / "run", steps=4)
    assert [record["step"] for record in again.history] == [2, 2, 4, 4]


@pytest.mark.parametrize("text", ["{}", "[]", "7", '{"meta.json": "0"}', "null"])
def test_an_emptied_list_of_digests_does_not_switch_verification_off(tmp_path, text):
    store = checkpoints.Checkpoints(tmp_path)
    store.save(1, {"w": np.arange(3.0)}, {})
    store.close()
    assert checkpoints.read(tmp_path).leaves["w"].tolist() == [0, 1, 2]
    (tmp_path / "step_000000001" / "digests.json").write_text(text)
    with pytest.raises(checkpoints.DamagedCheckpointError, match="step_000000001 is damaged"):
        checkpoints.read(tmp_path)


def elsewhere(tmp_path):
    """A folder of somebody else, and a reading of all that is in it."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    return folder, lambda: {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("name", [".writing-6", ".writing-99", ".writing-pruned-2", "step_000000004"])
def test_a_link_among_the_checkpoints_is_refused_and_not_followed(tmp_path, name):
    fit(tmp_path / "run", steps=4)
    folder, now = elsewhere(tmp_path)
    before, link = now(), tmp_path / "run" / "checkpoints" / name
    if link.exists():
        link.rename(tmp_path / "moved")
    link.symlink_to(folder)
    with pytest.raises(jt.InputError, match=rf"{name} is a link to .*elsewhere.*Remove it") as error:
        fit(tmp_path / "run", steps=4)
    assert "\n" not in str(error.value)
    assert now() == before
    assert link.is_symlink()


def test_a_link_that_appears_during_the_run_is_not_followed_either(tmp_path):
    folder, now = elsewhere(tmp_path)
    before = now()

    def plant(record):
        if record["step"] == 2 and "eval/loss" in record:
            (tmp_path / "run" / "checkpoints").mkdir(exist_ok=True)  # which the save is about to do
            (tmp_path / "run" / "checkpoints" / ".writing-4").symlink_to(folder)

    with pytest.raises(jt.InputError, match=r"\.writing-4 is a link to"):
        fit(tmp_path / "run", log=plant)
    assert now() == before
    assert checkpoints.steps(tmp_path / "run" / "checkpoints") == [2]


def test_other_files_of_a_run_are_not_written_through_links(tmp_path):
    folder, now = elsewhere(tmp_path)
    before, run = now(), tmp_path / "run"
    run.mkdir()
    (run / ".lock").symlink_to(folder / "thesis.tex")
    with pytest.raises(jt.InputError, match="cannot write to the run directory"):
        fit(run)
    assert now() == before
    (run / ".lock").unlink()
    for name in ("config.json", "metrics.jsonl"):
        (run / f".{name}.{os.getpid()}").symlink_to(folder / "thesis.tex")
    fit(run, steps=2)
    assert now() == before
    assert json.loads((run / "config.json").read_text())["steps"] == 2
    assert jax.tree.leaves(checkpoints.read(run / "checkpoints").leaves)


def test_a_report_of_spoiled_records(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0, "note": 3}\n')
    (tmp_path / "timing.jsonl").write_text('{"step": 1}\n')
    text = write_report(tmp_path, "title", {}).read_text()
    assert "learning curves" in text
    assert "| seconds | – |" in text
