import json
import os
import subprocess
import sys

import numpy as np
import pytest

from jaxtransfer.data import (
    Dataset,
    attach_outputs,
    eval_batches,
    load,
    open_outputs,
    outputs_note,
    pipeline,
    teacher_cache,
    teacher_writer,
    write_outputs,
)
from jaxtransfer.errors import InputError

TEACHER = {"model": "m", "weights": "0" * 64}
N = 50


@pytest.fixture
def outputs(rng):
    return {
        "logits": rng.normal(size=(N, 3)).astype(np.float32),
        "features": rng.normal(size=(N, 2, 2)).astype(np.float16),
    }


@pytest.fixture
def dataset(numbered):
    return numbered(N)


def batches_of(outputs, size=16):
    for start in range(0, N, size):
        yield {name: values[start : start + size] for name, values in outputs.items()}


def note_of(dataset, outputs, teacher=TEACHER):
    return outputs_note(dataset, {name: values[0] for name, values in outputs.items()}, teacher)


@pytest.fixture
def written(dataset, outputs, tmp_path):
    assert write_outputs(tmp_path / "caches" / "a", note_of(dataset, outputs), batches_of(outputs))
    return tmp_path / "caches" / "a"


def shard_of(directory):
    (shard,) = directory.glob("*array_record*")
    return shard


def test_what_was_written_is_read(dataset, outputs, written):
    cache = open_outputs(written)
    assert cache.note == note_of(dataset, outputs)
    assert (len(cache), cache.nbytes) == (N, N * (3 * 4 + 4 * 2))
    attached = attach_outputs(dataset, cache)
    for name, values in outputs.items():
        np.testing.assert_array_equal(attached.columns[f"teacher_{name}"], values)
        assert attached.columns[f"teacher_{name}"].dtype == values.dtype
    assert attached.of_image == {"teacher_logits", "teacher_features"}
    assert [child.name for child in written.parent.iterdir()] == ["a"]
    batch = pipeline(attached.subset(per_class=3), 4, seed=1).batch(0)
    rows = [int(np.flatnonzero((dataset.source.images == image).all((1, 2, 3)))[0]) for image in batch["image"]]
    np.testing.assert_array_equal(batch["teacher_logits"], outputs["logits"][rows])


def test_several_files_keep_the_order(dataset, outputs, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_writer, "_SHARD", 200)
    assert write_outputs(tmp_path / "a", note_of(dataset, outputs), batches_of(outputs))
    assert len(list((tmp_path / "a").glob("*array_record*"))) == 5
    attached = attach_outputs(dataset, open_outputs(tmp_path / "a"))
    for name, values in outputs.items():
        np.testing.assert_array_equal(attached.columns[f"teacher_{name}"], values)


def test_large_caches_are_read_from_their_files(dataset, outputs, written, monkeypatch):
    monkeypatch.setattr(teacher_cache, "_MEMORY_LIMIT", 0)
    attached = attach_outputs(dataset, open_outputs(written))
    assert not isinstance(attached.columns["teacher_logits"], np.ndarray)
    part = attached.select([7, 3, 3, 40])
    np.testing.assert_array_equal(part.read([3, 0])["teacher_features"], outputs["features"][[40, 7]])
    assert part.read([])["teacher_logits"].shape == (0, 3)
    seen = np.concatenate([batch["teacher_logits"][batch["mask"] == 1] for batch in eval_batches(attached, 16)])
    np.testing.assert_array_equal(seen, outputs["logits"])


def test_it_is_a_tfds_source_without_tensorflow(outputs, written):
    script = (
        "import sys, tensorflow_datasets as tfds\n"
        f"source = tfds.builder_from_directory({str(written)!r}).as_data_source('examples')\n"
        "print(len(source), source[7]['example'], source[7]['logits'].tolist(), 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == f"{N} 7 {outputs['logits'][7].tolist()} False\n", done.stderr


def test_already_there(dataset, outputs, written):
    assert not write_outputs(written, note_of(dataset, outputs), iter(lambda: 1 / 0, None))
    for other in (note_of(dataset, outputs, {**TEACHER, "weights": "1" * 64}), note_of(dataset.take(9), outputs)):
        with pytest.raises(InputError, match=r"holds another teacher cache \(.* there, .* now\)"):
            write_outputs(written, other, batches_of(outputs))
    (written.parent / "foreign").mkdir()
    (written.parent / "foreign" / "thesis.tex").write_text("x")
    for place in (written.parent / "foreign", written.parent / "foreign" / "thesis.tex"):
        with pytest.raises(InputError, match="is there and is no teacher cache"):
            write_outputs(place, note_of(dataset, outputs), batches_of(outputs))
    with pytest.raises(InputError, match="cannot write the teacher cache"):
        write_outputs("/proc/caches/a", note_of(dataset, outputs), batches_of(outputs))


@pytest.mark.parametrize("damage", ["cut", "gone", "flipped", "note", "fewer"])
def test_damage_is_told_and_mended_by_the_same_command(dataset, outputs, written, damage):
    shard = shard_of(written)
    data = bytearray(shard.read_bytes())
    if damage == "cut":
        shard.write_bytes(data[: len(data) // 2])
    elif damage == "gone":
        shard.unlink()
    elif damage == "flipped":
        data[data.index(outputs["logits"][20].tobytes())] ^= 255
        shard.write_bytes(data)
    elif damage == "note":
        (written / "teacher_cache.json").write_text('{"format": 1}')
    else:
        note = {**note_of(dataset, outputs), "examples": N + 1}
        (written / "teacher_cache.json").write_text(json.dumps(note))
    with pytest.raises(teacher_cache.DamagedCacheError, match=r"is damaged: .* writes it anew"):
        attach_outputs(dataset, open_outputs(written))
    if damage != "fewer":
        assert write_outputs(written, note_of(dataset, outputs), batches_of(outputs))
        attached = attach_outputs(dataset, open_outputs(written))
        np.testing.assert_array_equal(attached.columns["teacher_logits"], outputs["logits"])
        assert [child.name for child in written.parent.iterdir()] == ["a"]


EDITS = {
    "outputs": [3, [], {}, {"logits": 3}, {"logits": {"shape": [3]}}, {"logits": {"shape": ["3"], "dtype": "float32"}}],
    "examples": ["50", 0, -1, 1.5, None, True, 10**30],
    "image_shape": [7, "6x5x3", [6, 5, "3"], None],
    "data": [3, None, {}],
    "fingerprint": [None, 4],
    "teacher": [[], "m"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in EDITS.items() for value in values])
def test_an_edited_note_is_damage(dataset, outputs, written, key, value):
    note = {**note_of(dataset, outputs), key: value}
    (written / "teacher_cache.json").write_text(json.dumps(note))
    with pytest.raises(teacher_cache.DamagedCacheError, match=r"is damaged: .* writes it anew"):
        open_outputs(written)


@pytest.mark.parametrize(
    "output",
    [{"shape": [4], "dtype": "float32"}, {"shape": [3], "dtype": "float16"}, {"shape": [3, 1], "dtype": "float32"}],
)
def test_a_note_of_other_outputs_than_the_records_is_damage(dataset, outputs, written, output):
    note = note_of(dataset, outputs)
    (written / "teacher_cache.json").write_text(json.dumps({**note, "outputs": {**note["outputs"], "logits": output}}))
    with pytest.raises(teacher_cache.DamagedCacheError, match=r"is damaged: .* for the output 'logits'"):
        open_outputs(written)


@pytest.mark.parametrize("content", ["", "7", "[]", "null", '"text"', "{", "[" * 100_000, b"\xff\xfe"])
def test_a_note_that_is_other_json_is_damage_and_mended(dataset, outputs, written, content):
    (written / "teacher_cache.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(teacher_cache.DamagedCacheError, match=r"is damaged: .* writes it anew"):
        open_outputs(written)
    assert write_outputs(written, note_of(dataset, outputs), batches_of(outputs))
    assert len(open_outputs(written)) == N


def test_what_is_not_the_cache_s_is_not_written_over(dataset, outputs, written):
    (written / "teacher_cache.json").write_text("7")
    (written / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"files that are no part of a cache \(thesis\.tex\)"):
        write_outputs(written, note_of(dataset, outputs), batches_of(outputs))
    assert (written / "thesis.tex").read_text() == "x"


def test_a_cache_that_names_a_class_of_someone_elses_is_not_opened(dataset, outputs, written):
    spec = json.loads((written / "features.json").read_text())
    spec["pythonClassName"] = "someone.elses.Features"
    (written / "features.json").write_text(json.dumps(spec))
    with pytest.raises(InputError, match=r"features\.json names the class 'someone\.elses\.Features'"):
        open_outputs(written)


def test_folders_that_are_no_cache(dataset, outputs, written, tmp_path):
    for place in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match=r"is no teacher cache.* write one: jaxtransfer cache-teacher"):
            open_outputs(place)
    (written / "teacher_cache.json").write_text(json.dumps({**note_of(dataset, outputs), "format": 2}))
    with pytest.raises(InputError, match="of format 2, expected 1; write it anew"):
        open_outputs(written)


def test_other_data_is_refused(numbered, dataset, outputs, written):
    cache = open_outputs(written)
    images, labels = dataset.source.images, dataset.labels
    relabelled = Dataset.from_arrays(images, (labels + 1) % 3, class_names=dataset.class_names)
    brighter = Dataset.from_arrays(np.maximum(images, 1), labels, class_names=dataset.class_names)
    renamed = Dataset.from_arrays(images, labels, class_names=dataset.class_names, name="others")
    for other, says in [
        (relabelled, "of that name with other labels or images"),
        (brighter, "of that name with other labels or images"),
        (renamed, r"got others \(all\), 50 images \(6, 5, 3\); write it anew: jaxtransfer cache-teacher"),
        (numbered(N + 1), r"written for arrays \(all\), 50 images \(6, 5, 3\); got arrays \(all\), 51 images"),
        (dataset.take(10), "attach the cache before choosing examples"),
        (dataset.select(np.arange(N)[::-1]), "attach the cache before choosing examples"),
    ]:
        with pytest.raises(InputError, match=says):
            attach_outputs(other, cache)
    same = attach_outputs(dataset.select(np.arange(N)), cache)
    assert set(same.columns) == {"teacher_logits", "teacher_features"}


@pytest.mark.parametrize("failure", ["batches", "full", "short"])
def test_a_write_that_fails_leaves_nothing(dataset, outputs, tmp_path, monkeypatch, failure):
    out, note = tmp_path / "caches" / "a", note_of(dataset, outputs)

    def broken():
        yield next(batches_of(outputs))
        assert list((tmp_path / "caches").iterdir())
        if failure == "batches":
            raise InputError("the image x.png can't be read")

    def fail(*_):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        if failure == "full":
            patch.setattr(teacher_writer.os, "fsync", fail)
        batches = batches_of(outputs) if failure == "full" else broken()
        says = {"batches": "^the image x.png", "short": "16 records, its note says 50"}
        with pytest.raises(InputError, match=says.get(failure, "No space left on device; nothing is left of it")):
            write_outputs(out, note, batches)
    assert list((tmp_path / "caches").iterdir()) == []
    assert write_outputs(out, note, batches_of(outputs))


@pytest.mark.slow
def test_a_killed_write_leaves_no_cache_and_is_cleared(dataset, outputs, tmp_path):
    script = (
        "import os, sys, json, numpy as np\n"
        "from jaxtransfer.data import write_outputs\n"
        "note = json.load(sys.stdin)\n"
        "def batches():\n"
        "    yield {n: np.zeros((4, *o['shape']), o['dtype']) for n, o in note['outputs'].items()}\n"
        "    os.kill(os.getpid(), 9)\n"
        "write_outputs(sys.argv[1], note, batches())"
    )
    out, note = tmp_path / "a", note_of(dataset, outputs)
    command = [sys.executable, "-c", script, str(out)]
    done = subprocess.run(command, input=json.dumps(note), text=True, capture_output=True)
    assert done.returncode == -9, done.stderr
    assert [child.name for child in tmp_path.iterdir()] == [".a.writing"]
    assert write_outputs(out, note, batches_of(outputs))
    assert [child.name for child in tmp_path.iterdir()] == ["a"]


def test_one_process_writes_at_a_time(dataset, outputs, tmp_path):
    out, note = tmp_path / "a", note_of(dataset, outputs)

    def meanwhile():
        yield from batches_of(outputs)
        with pytest.raises(InputError, match="another process is writing the teacher cache"):
            write_outputs(out, note, batches_of(outputs))

    assert write_outputs(out, note, meanwhile())
    np.testing.assert_array_equal(open_outputs(out).read("logits", np.arange(N)), outputs["logits"])


def test_the_fingerprint_of_tfds_data(outputs, tmp_path):
    train = load("digits/upright", "train")
    values = np.arange(len(train) * 2, dtype=np.float32).reshape(-1, 2)
    note = outputs_note(train, {"logits": values[0]}, TEACHER)
    write_outputs(tmp_path / "a", note, [{"logits": values}])
    cache = open_outputs(tmp_path / "a")
    for same in (load("digits/upright", "train"), train.decoded()):
        np.testing.assert_array_equal(attach_outputs(same, cache).columns["teacher_logits"], values)
    for name, split in (("digits/noisy", "train"), ("digits/upright", "test"), ("digits/upright", "train[:100]")):
        with pytest.raises(InputError, match=r"was written for digits/upright \(train\), 1201 images \(8, 8, 1\); got"):
            attach_outputs(load(name, split), cache)
