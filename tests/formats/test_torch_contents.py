"""What scripts save by PyTorch: ordinary contents give the network's logits, harmful ones are refused and not run."""

import argparse
import collections
import datetime
import enum
import functools
import os
import pathlib
import pickle
import subprocess
import types
import uuid

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtransfer as jt
from jaxtransfer.formats import read_tensors

torch = pytest.importorskip("torch")

MODEL = jt.models.cifar_resnet(8, 3)
SHAPE = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])


class Block(torch.nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(width)
        self.conv2 = torch.nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(width)
        self.stride, self.more = stride, (width - inputs) // 2

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        short = torch.nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more, self.more))
        return torch.relu(y + short)


class Net(torch.nn.Module):
    """The CIFAR ResNet of 8 layers, shortcuts without parameters."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = torch.nn.Conv2d(3, 16, 3, 1, 1, bias=False), torch.nn.BatchNorm2d(16)
        self.layer1 = torch.nn.Sequential(Block(16, 16, 1))
        self.layer2 = torch.nn.Sequential(Block(16, 32, 2))
        self.layer3 = torch.nn.Sequential(Block(32, 64, 2))
        self.linear = torch.nn.Linear(64, 3)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def made(seed):
    """A network in inference mode whose every number counts."""
    draw = torch.Generator().manual_seed(seed)
    net = Net().eval()
    with torch.no_grad():
        for name, value in [*net.named_parameters(), *net.named_buffers()]:
            if name.endswith("running_var") or (name.endswith("weight") and value.ndim == 1):
                value.uniform_(0.5, 1.5, generator=draw)
            elif value.is_floating_point():
                value.normal_(0, 0.3 if value.ndim == 1 else (2 / value[0].numel()) ** 0.5, generator=draw)
    return net


NET, OTHER = made(0), made(1)
GOOD, BAD = NET.state_dict(), OTHER.state_dict()
IMAGES = np.random.default_rng(2).normal(size=SHAPE.shape).astype(np.float32)


def named(prefix, values=GOOD):
    return collections.OrderedDict((prefix + name, value) for name, value in values.items())


def optimizer():
    made = torch.optim.AdamW(OTHER.parameters(), 1e-3)
    OTHER(torch.ones(1, 3, 8, 8)).sum().backward()
    made.step()
    OTHER.load_state_dict(BAD)
    return made.state_dict()


def averaged():
    return torch.optim.swa_utils.AveragedModel(NET).state_dict()  # module. before names, and n_averaged


def options():
    return argparse.Namespace(lr=0.1, data=pathlib.Path("data"), steps=[1, 2], device=torch.device("cpu"), amp=None)


def half(kind):
    return {name: value.to(kind) if value.is_floating_point() else value for name, value in GOOD.items()}


def compiled():
    return named("_orig_mod.module.")


def parameters():
    """Tensors that want gradients, in a plain dict, with the statistics as buffers."""
    return {**dict(NET.named_parameters()), **dict(NET.named_buffers())}


def lightning():
    return {
        "epoch": 3,
        "global_step": 10,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": named("model."),
        "loops": {"fit_loop": {"state_dict": {}, "progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5), "dirpath": "x"}},
        "optimizer_states": [optimizer()],
        "lr_schedulers": [{"last_epoch": 3}],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1},
    }


def turned(value):
    return value.permute(tuple(range(value.ndim))[::-1])


def shared():
    """One flat tensor, of which each is a part, laid out in another order."""
    flat, out, end = torch.cat([turned(value).reshape(-1) for value in GOOD.values()]), {}, 0
    for name, value in GOOD.items():
        out[name] = turned(flat[end : end + value.numel()].view(value.shape[::-1]))
        end += value.numel()
    return out


ORDINARY = {  # what is saved, and the key of the state dict that is meant, where there are several
    "plain": (lambda: GOOD, None),
    "parameters that want gradients": (parameters, None),
    "state_dict beside the rest of a training": (
        lambda: {"state_dict": GOOD, "epoch": 3, "best_acc1": torch.tensor(0.5), "optimizer": optimizer()},
        None,
    ),
    "model beside options and a scaler": (
        lambda: {"model": GOOD, "optimizer": optimizer(), "args": options(), "scaler": {"scale": 65536.0}},
        None,
    ),
    "model, not its average": (lambda: {"model": GOOD, "model_ema": named("module.", BAD)}, None),
    "the average, asked for": (lambda: {"model": BAD, "model_ema": averaged()}, "model_ema"),
    "state_dict_ema, asked for": (lambda: {"state_dict": BAD, "state_dict_ema": GOOD, "arch": "x"}, "state_dict_ema"),
    "state_dict_ema alone": (lambda: {"state_dict_ema": GOOD, "epoch": 3}, None),
    "a teacher": (lambda: {"student": named("module.", BAD), "teacher": named("module.backbone.")}, "teacher"),
    "module.": (lambda: named("module."), None),
    "compiled": (compiled, None),
    "backbone.": (lambda: {"state_dict": named("backbone.")}, None),
    "lightning": (lightning, None),
    "bfloat16": (lambda: half(torch.bfloat16), None),
    "float16": (lambda: {"model": half(torch.float16)}, None),
    "double": (lambda: half(torch.float64), None),
    "numbers of NumPy": (
        lambda: {"net": GOOD, "acc": np.float64(0.9), "epoch": np.int64(3), "loss": np.float32(1), "ok": np.bool_(1)},
        None,
    ),
    "nested twice": (lambda: {"model": {"state_dict": GOOD, "epoch": 3}}, None),
    "states of generators": (
        lambda: {
            "model": GOOD,
            "rng": [np.random.default_rng(0).integers(9, size=3), torch.get_rng_state(), (3, (1,))],
        },
        None,
    ),
    "arrays of NumPy": (
        lambda: {"model": {name: value.numpy() for name, value in GOOD.items()}, "mean": np.array([0.4, 0.5])},
        None,
    ),
    "options of several kinds": (
        lambda: {
            "model": GOOD,
            "cfg": types.SimpleNamespace(lr=0.1, only=frozenset("a"), rows=slice(3), n=np.uint8(1)),
        },
        None,
    ),
    "what is no tensor among them": (
        lambda: {**GOOD, "epoch": 3, "best": 0.9, "optimizer": {"state": {}}, "bn1._extra_state": None},
        None,
    ),
    "signs that are pending": (
        lambda: {name: torch._neg_view(-value) if value.ndim > 1 else value for name, value in GOOD.items()},
        None,
    ),
    "views of one storage": (shared, None),
    "moments of the training": (
        lambda: {"state_dict": GOOD, "date": datetime.datetime(2026, 1, 2), "took": datetime.timedelta(1)},
        None,
    ),
}


@functools.cache
def ours():
    return jax.jit(functools.partial(MODEL.apply, train=False, key=None))


def logits_of(loaded):
    return np.asarray(ours()(loaded.variables, IMAGES)[0]["logits"])


@FORMATS
@pytest.mark.parametrize("kind", ORDINARY)
def test_ordinary_contents_give_the_networks_logits(kind, zipped, tmp_path):
    saved, part = ORDINARY[kind]
    torch.save(saved(), tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    loaded = jt.load_pretrained(tmp_path / "w.pth", MODEL, inputs=SHAPE, part=part)
    net = made(0)
    if kind in ("bfloat16", "float16"):  # of these numbers, not of those that were rounded
        net = net.to(getattr(torch, kind)).float()
    with torch.no_grad():
        wanted = net(torch.from_numpy(IMAGES).permute(0, 3, 1, 2)).numpy()
        other = OTHER(torch.from_numpy(IMAGES).permute(0, 3, 1, 2)).numpy()
    found = logits_of(loaded)
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
    assert np.abs(found - other).max() > 0.1 * np.abs(wanted).max()
    assert not loaded.report.fresh


class Harm:
    """Calls a function with arguments when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Built:
    """The same from `__setstate__`-like building: an object of a class that isn't known."""

    def __init__(self, marker):
        self.marker = marker

    def __setstate__(self, state):
        pathlib.Path(state["marker"]).touch()


class Colour(enum.Enum):
    RED = 1


def by_object_array(marker):
    array = np.empty(1, object)
    array[0] = Harm(os.system, f"touch {marker}")
    return array


def touching(marker):
    return f"__import__('pathlib').Path({str(marker)!r}).touch()"


HARMFUL = {
    "os.system": lambda marker: Harm(os.system, f"touch {marker}"),
    "beside weights": lambda marker: {"state_dict": GOOD, "args": Harm(os.system, f"touch {marker}")},
    "deep in options": lambda marker: {
        "model": GOOD,
        "args": argparse.Namespace(a=[{"b": Harm(os.mkdir, str(marker))}]),
    },
    "as a tensor's name": lambda marker: {"model": GOOD, Harm(eval, touching(marker)): 1},
    "eval": lambda marker: {"a": Harm(eval, touching(marker))},
    "exec": lambda marker: {"a": Harm(exec, touching(marker))},
    "subprocess": lambda marker: [Harm(subprocess.check_call, ["touch", str(marker)])],
    "pathlib": lambda marker: {"a": Harm(pathlib.Path.touch, pathlib.Path(marker))},
    "an array of objects": lambda marker: {"model": GOOD, "mean": by_object_array(marker)},
    "in an ordered dict": lambda marker: collections.OrderedDict(a=Harm(os.system, f"touch {marker}")),
    "in a default dict": lambda marker: collections.defaultdict(list, {"a": Harm(os.system, f"touch {marker}")}),
    "getattr of a module": lambda marker: {"a": Harm(getattr, Harm(__import__, "os"), "system")},
    "a class of its own": lambda marker: {"model": GOOD, "ema": Built(str(marker))},
}


@FORMATS
@pytest.mark.parametrize("kind", HARMFUL)
def test_harmful_contents_are_refused_and_not_run(kind, zipped, tmp_path):
    marker, path = tmp_path / f"marker-{uuid.uuid4().hex}", tmp_path / "w.pth"
    torch.save(HARMFUL[kind](marker), path, _use_new_zipfile_serialization=zipped)
    for read in (read_tensors, functools.partial(jt.load_pretrained, model=MODEL, inputs=SHAPE)):
        with pytest.raises(jt.InputError, match="which would run code of the file") as caught:
            read(path)
        assert "\n" not in str(caught.value)
    assert not marker.exists()
    if kind != "getattr of a module":  # it is harmful indeed
        torch.load(path, weights_only=False)
        assert marker.exists()


@pytest.mark.parametrize(
    "text",
    [
        "cposix\nsystem\n(S'touch MARKER'\ntR.",
        'c__builtin__\neval\n(S\'__import__("pathlib").Path("MARKER").touch()\'\ntR.',
        "(ios\nsystem\n(S'touch MARKER'\n.",
        "(S'touch MARKER'\nios\nsystem\n.",
    ],
)
@pytest.mark.parametrize("name", ["w.pth", "w.bin", "w.pkl", "w"])
def test_bare_pickles_are_refused_and_not_run(text, name, tmp_path):
    """Written by hand, in the oldest format, which any name may hide."""
    marker, path = tmp_path / "marker", tmp_path / name
    path.write_text(text.replace("MARKER", str(marker)))
    with pytest.raises(jt.InputError) as caught:
        jt.load_pretrained(path, MODEL, inputs=SHAPE)
    assert "\n" not in str(caught.value)
    assert not marker.exists()
    if "(ios" not in text:
        pickle.loads(path.read_bytes())
        assert marker.exists()


def test_programs_and_whole_networks_are_refused(tmp_path):
    """Archives of TorchScript hold code, and a network that was pickled as a whole names its class."""
    torch.save(NET, tmp_path / "whole.pth")
    with pytest.raises(jt.InputError, match=r"pass the network's state_dict\(\)"):
        read_tensors(tmp_path / "whole.pth")
    torch.save({"model": GOOD, "colour": Colour.RED}, tmp_path / "enum.pth")
    with pytest.raises(jt.InputError, match=r"objects besides tensors \(test_torch_contents\.Colour\), which"):
        read_tensors(tmp_path / "enum.pth")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # PyTorch's, of its own format
def test_archives_of_torchscript_are_refused(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "w.pt")
    with pytest.raises(jt.InputError, match=r"it is a TorchScript program; load it by torch\.jit\.load") as caught:
        read_tensors(tmp_path / "w.pt")
    assert "\n" not in str(caught.value)


def test_objects_in_archives_of_numpy_are_not_run(tmp_path):
    marker = tmp_path / "marker"
    np.savez(tmp_path / "w.npz", a=by_object_array(marker))
    np.save(tmp_path / "w.npy", by_object_array(marker), allow_pickle=True)
    for name in ("w.npz", "w.npy"):
        with pytest.raises(jt.InputError):
            read_tensors(tmp_path / name)
    assert not marker.exists()


def test_files_that_onnx_names_elsewhere_are_not_read(tmp_path):
    onnx = pytest.importorskip("onnx")
    (tmp_path / "secret").write_bytes(b"12345678")
    (tmp_path / "in").mkdir()
    tensor = onnx.TensorProto(name="a", data_type=onnx.TensorProto.FLOAT, dims=[2], data_location=1)
    tensor.external_data.add(key="location", value="../secret")
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [tensor]))
    (tmp_path / "in" / "w.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(jt.InputError, match="cannot read the weights"):
        read_tensors(tmp_path / "in" / "w.onnx")
