"""Files of weights: what is in them is what was written; damaged ones give one line."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest

import jaxtransfer as jt
from jaxtransfer.formats import read_tensors, safetensors
from jaxtransfer.formats.checkpoint import no_tensors, passed_over, tensors_in

ARRAYS = {
    "fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.array([1.5, -2.0], np.float16),
    "brain": np.array([[1.5], [-2.0]], ml_dtypes.bfloat16),
    "scalar": np.array(3, np.int64),
    "none": np.zeros((0, 4), np.float64),
    "mask": np.array([True, False, True]),
    "bytes": np.array([1, 255], np.uint8),
}
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "float64": "F64", "bool": "BOOL"}
NAMES |= {"uint8": "U8"}


def written(arrays, **more):
    """The bytes of a file, as the format's page says; `more` replaces entries of the header."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, array in arrays.items():
        end = len(body) + array.nbytes
        kind = NAMES[array.dtype.name]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [len(body), end]}
        body += array.tobytes()
    text = json.dumps(header | more).encode()
    return struct.pack("<Q", len(text)) + text + body


def same(found, arrays):
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def save(path, data):
    path.write_bytes(data)
    return path


def test_safetensors_are_read(tmp_path):
    path = save(tmp_path / "model.safetensors", written(ARRAYS))
    same(safetensors.read(path), ARRAYS)
    same(read_tensors(tmp_path), ARRAYS)  # a folder
    same(read_tensors(save(tmp_path / "no-suffix", written(ARRAYS))), ARRAYS)  # told by its bytes
    assert safetensors.metadata(path) == {"format": "pt"}


def test_safetensors_of_their_library_are_read(tmp_path):
    theirs = pytest.importorskip("safetensors.numpy")
    plain = {name: array for name, array in ARRAYS.items() if name != "brain"}
    theirs.save_file(plain, tmp_path / "model.safetensors")
    same(read_tensors(tmp_path / "model.safetensors"), plain)


class TestWriting:
    """Safetensors that we write."""

    def test_are_read_again_by_us_and_by_their_library(self, tmp_path):
        path = tmp_path / "w.safetensors"
        safetensors.write(path, ARRAYS, {"format": "pt", "names": "ä"})
        same(safetensors.read(path), ARRAYS)
        assert safetensors.metadata(path) == {"format": "pt", "names": "ä"}
        safe_open = pytest.importorskip("safetensors").safe_open
        with safe_open(path, "np") as file:
            assert file.metadata() == {"format": "pt", "names": "ä"}
            plain = {name: array for name, array in ARRAYS.items() if name != "brain"}
            same({name: file.get_tensor(name) for name in plain}, plain)

    def test_values_are_laid_out_as_the_format_wants(self, tmp_path):
        path = tmp_path / "w.safetensors"
        swapped = {"big": np.arange(3, dtype=">i4"), "turned": np.arange(6.0).reshape(2, 3).T, "flag": np.array(True)}
        safetensors.write(path, swapped)
        found = safetensors.read(path)
        for name, array in swapped.items():
            np.testing.assert_array_equal(found[name], array)
        length = int.from_bytes(path.read_bytes()[:8], "little")
        assert length % 8 == 0
        entries = json.loads(path.read_bytes()[8 : 8 + length])
        for entry in entries.values():
            width = {"I32": 4, "F64": 8, "BOOL": 1}[entry["dtype"]]
            assert entry["data_offsets"][0] % width == 0

    def test_what_the_format_lacks_is_told_and_leaves_what_was_there(self, tmp_path):
        path = tmp_path / "w.safetensors"
        safetensors.write(path, {"a": np.ones(2)})
        before = path.read_bytes()
        with pytest.raises(jt.InputError, match="'b' is of type complex64, which safetensors lack"):
            safetensors.write(path, {"a": np.ones(2), "b": np.ones(2, np.complex64)})
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]


def test_a_file_cut_off_anywhere_gives_one_line(tmp_path):
    whole = written(ARRAYS)
    for size in range(0, len(whole), 7):
        path = save(tmp_path / "cut.safetensors", whole[:size])
        with pytest.raises(jt.InputError, match=r"cut\.safetensors") as caught:
            read_tensors(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 23]}, "takes 24 bytes, they have 23"),
        ({"dtype": "F32", "shape": [2, -3], "data_offsets": [0, 24]}, "says shape"),
        ({"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 24]}, "takes 4,835,"),
        ({"dtype": "F32", "shape": [2.0, 3], "data_offsets": [0, 24]}, "says shape"),
        ({"dtype": "F32", "shape": [6], "data_offsets": [24, 0]}, "says shape"),
        ({"dtype": "F32", "shape": [6], "data_offsets": [4, 28]}, "share bytes"),
        ({"dtype": "Q4", "shape": [6], "data_offsets": [0, 24]}, "of type 'Q4'; known are F64"),
        ({"dtype": ["F32"], "shape": [6], "data_offsets": [0, 24]}, r"of type \['F32'\]"),
        ({"dtype": "F32", "shape": [6]}, "says 'data_offsets'"),
        ([], "says"),
        (None, "says"),
    ],
)
def test_headers_that_lie_are_told(entry, told, tmp_path):
    data = written({"fc.weight": ARRAYS["fc.weight"], "b": ARRAYS["half"]}, **{"fc.weight": entry})
    with pytest.raises(jt.InputError, match=told):
        safetensors.read(save(tmp_path / "x.safetensors", data))


def test_a_name_that_stands_twice_is_told(tmp_path):
    text = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    with pytest.raises(jt.InputError, match="stands twice"):
        safetensors.read(save(tmp_path / "x.safetensors", struct.pack("<Q", len(text)) + text + b"\0"))


class TestPieces:
    """Weights in several files under an index."""

    @pytest.fixture
    def folder(self, tmp_path):
        save(tmp_path / "model-1.safetensors", written({"a": ARRAYS["half"], "b": ARRAYS["mask"]}))
        save(tmp_path / "model-2.safetensors", written({"c": ARRAYS["brain"]}))
        return tmp_path

    def index(self, folder, **places):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        return folder

    def test_are_joined(self, folder):
        self.index(folder, a="model-1.safetensors", b="model-1.safetensors", c="model-2.safetensors")
        wanted = {"a": ARRAYS["half"], "b": ARRAYS["mask"], "c": ARRAYS["brain"]}
        same(read_tensors(folder), wanted)
        same(read_tensors(folder / "model.safetensors.index.json"), wanted)

    def test_that_are_not_there_are_told(self, folder):
        with pytest.raises(jt.InputError, match=r"model-2.safetensors lacks 'a'"):
            read_tensors(self.index(folder, a="model-2.safetensors"))
        with pytest.raises(jt.InputError, match=r"model-3.safetensors: No such file"):
            read_tensors(self.index(folder, a="model-3.safetensors"))
        with pytest.raises(jt.InputError, match=r"not beside it: '\.\./x'"):
            read_tensors(self.index(folder, a="../x"))
        (folder / "model.safetensors.index.json").write_text("[]")
        with pytest.raises(jt.InputError, match="cannot read the index"):
            read_tensors(folder)


def test_archives_of_numpy(tmp_path):
    plain = {name: array for name, array in ARRAYS.items() if name != "brain"}  # NumPy's own types
    np.savez(tmp_path / "w.npz", **plain)
    same(read_tensors(tmp_path / "w.npz"), plain)
    (tmp_path / "w.npz").rename(tmp_path / "renamed")
    same(read_tensors(tmp_path / "renamed"), plain)
    np.savez(tmp_path / "objects.npz", a=np.array([{}]))
    cut = save(tmp_path / "cut.npz", (tmp_path / "renamed").read_bytes()[:300])
    for path in (tmp_path / "objects.npz", cut, save(tmp_path / "empty.npz", b"")):
        with pytest.raises(jt.InputError, match="cannot read the weights"):
            read_tensors(path)


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(jt.InputError, match="nowhere: No such file"):
        read_tensors(tmp_path / "nowhere")
    with pytest.raises(jt.InputError, match=r"has no weights: expected model\.safetensors"):
        read_tensors(tmp_path)


@pytest.mark.parametrize(
    ("start", "told"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS.*git lfs pull"),
        (b"<!DOCTYPE html>", "a page of the web"),
        (b"\x1f\x8b\x08\x00", "compressed by gzip; unpack it"),
    ],
)
def test_what_lies_in_place_of_weights_is_told(start, told, tmp_path):
    for name in ("w.safetensors", "w.pth"):
        with pytest.raises(jt.InputError, match=told):
            read_tensors(save(tmp_path / name, start + b" " * 20))


def test_a_folder_with_a_file_of_another_name(tmp_path):
    plain = {"a": ARRAYS["half"]}
    np.savez(tmp_path / "b.npz", **plain)
    same(read_tensors(tmp_path), plain)
    save(tmp_path / "c.pth", b"")
    with pytest.raises(jt.InputError, match=r"has 2 files of weights, b\.npz, c\.pth; pass the one that is meant"):
        read_tensors(tmp_path)
    save(tmp_path / "d.safetensors", written(plain))
    same(read_tensors(tmp_path), plain)


def test_what_is_no_tensor_is_left_out_and_told():
    given = {"a.weight": np.ones(2), "a._extra_state": None, "epoch": 3, "optimizer": {"state": {}}}
    same(tensors_in(given), {"a.weight": np.ones(2)})
    assert no_tensors(given) == no_tensors({"model": given, "acc": 0.9}) == ("epoch", "optimizer")
    assert no_tensors({"a": np.ones(2)}) == ()
    two = {"a.weight": np.ones(2), "ema": {"a.weight": np.zeros(2)}}
    with pytest.raises(jt.InputError, match=r"found 2 \(ema\); part='ema' takes that"):
        tensors_in(two)
    same(tensors_in(two, "ema"), {"a.weight": np.zeros(2)})
    same(tensors_in({"ema": two["ema"], "best": np.float64(0.5)}), {"a.weight": np.zeros(2)})


def test_a_part_of_a_checkpoint(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "w.pth"
    torch.save({"teacher": {"module.a": torch.ones(2)}, "student": {"module.a": torch.zeros(2)}}, path)
    same(read_tensors(path, "teacher"), {"a": np.ones(2, np.float32)})
    with pytest.raises(jt.InputError, match=r"found 2 \(teacher, student\)"):
        read_tensors(path)
    with pytest.raises(jt.InputError, match="no part 'model_ema'; it may be one of teacher, student"):
        read_tensors(path, "model_ema")


def test_state_dicts_that_are_passed_over_are_told():
    weights, nested = {"a": np.ones(2)}, {"module": {"a": np.ones(2)}, "updates": 3}
    told = passed_over({"model": weights, "model_ema": weights, "optimizer": {"state": {}, "lr": 0.1}, "epoch": 3})
    assert told == "of its state dicts 'model' was taken; there is model_ema, too: part='model_ema' takes that"
    assert "'state_dict' was taken; there is ema, model, too" in passed_over(
        {"ema": nested, "model": weights, "state_dict": weights}
    )
    assert "'module' was taken; there is teacher" in passed_over({"model": {"module": weights, "teacher": weights}})
    for plain in (weights, {"model": weights}, {"teacher": weights}, [], {"model": nested}):
        assert passed_over(plain) == ""


def test_both_formats_of_pytorch_cut_off_anywhere(tmp_path):
    torch = pytest.importorskip("torch")
    for zipped in (True, False):
        torch.save({"a": torch.arange(8.0)}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        same(read_tensors(tmp_path / "w.pth"), {"a": np.arange(8, dtype=np.float32)})
        whole = (tmp_path / "w.pth").read_bytes()
        for size in range(0, len(whole) - 1, max(1, len(whole) // 20)):
            with pytest.raises(jt.InputError, match=r"cut\.pth") as caught:
                read_tensors(save(tmp_path / "cut.pth", whole[:size]))
            assert "\n" not in str(caught.value)


def test_onnx(tmp_path):
    onnx = pytest.importorskip("onnx")
    constants = [onnx.numpy_helper.from_array(ARRAYS[name], name) for name in ("fc.weight", "half")]
    graph = onnx.helper.make_graph([], "g", [], [], constants)
    onnx.save(onnx.helper.make_model(graph), tmp_path / "w.onnx")
    same(read_tensors(tmp_path / "w.onnx"), {name: ARRAYS[name] for name in ("fc.weight", "half")})
    cut = save(tmp_path / "cut.onnx", (tmp_path / "w.onnx").read_bytes()[:30])
    with pytest.raises(jt.InputError, match="cannot read the weights"):
        read_tensors(cut)
