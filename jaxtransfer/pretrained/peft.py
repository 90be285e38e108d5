"""Deltas in the layout of Hugging Face's peft, in and out: `adapter_config.json`, `adapter_model.safetensors`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtransfer import deltas, tree
from jaxtransfer.deltas import Delta, Part
from jaxtransfer.deltas.weight import weights_of
from jaxtransfer.errors import InputError, unknown
from jaxtransfer.files import expanded, read_text
from jaxtransfer.formats import safetensors
from jaxtransfer.formats.read import read_file
from jaxtransfer.model import Model
from jaxtransfer.pretrained.peft_kinds import KINDS, TENSORS, Module, Read, third
from jaxtransfer.pretrained.peft_names import kernels_of, table_for
from jaxtransfer.pretrained.peft_write import Adapter, adapter_of
from jaxtransfer.pretrained.scheme import translate

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _SHARED = "base_model.model.", "base_model."
_WRAPPED = (".base_layer", ".modules_to_save.default", ".modules_to_save")


class PeftDelta(NamedTuple):
    """A delta that was read.

    Attributes:
      model: the base's network with the delta, its base beneath it.
      variables: the delta's parameters, and the base's running state.
    """

    model: Delta
    variables: dict[str, Any]

    @property
    def params(self) -> dict[str, Any]:
        """The parameters by model name: `jt.fit(..., params=found.params)` trains on."""
        return {self.model.name: self.variables["params"]}


def load_peft(path: str | Path, model: Model, base: Any) -> PeftDelta:
    """Reads an adapter of Hugging Face's peft as a delta: LoRA (rsLoRA, PiSSA, OLoRA), DoRA, AdaLoRA, (IA)³, VeRA,
    LoHa, LoKr, OFT, BOFT, FourierFT.

        loaded = jt.load_pretrained("vit", jt.models.vit_b(2))       # the base, as peft's was
        found = jt.load_peft("adapter", loaded.model, loaded.variables)
        whole = jt.deltas.merged(found.model, found.variables)

    Its modules are told by the names by which `load_pretrained` reads weights: vision transformers and ResNets of
    Hugging Face, timm and torchvision, BERT and DistilBERT. Modules saved whole (`modules_to_save`) and biases are a
    part of their own, `whole`. A fused `qkv` becomes three.

    Args:
      path: the folder with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).
      model: of the base, with outputs as the adapter's.
      base: its variables `{"params": ..., **state}`.

    Returns:
      The model of the delta, and its variables.

    Raises:
      InputError: where the folder is none of peft's, for a kind or a form that is not known here, and for modules or
        shapes that the model does not have.
    """
    folder = expanded(Path(path))
    config, tensors = _config(folder), _tensors(folder)
    kind = config.get("peft_type")
    if kind not in KINDS:
        raise unknown("peft_type", str(kind), KINDS)
    if config.get("fan_in_fan_out"):
        raise InputError(f"{folder} is of layers whose weights are [I, O] (fan_in_fan_out), which no network here has")
    weights = weights_of(base["params"])
    shapes = {f"params/{name}": weight.shape for name, weight in weights.items()}
    modules, whole = _apart(tensors, folder)
    scheme, rules = table_for(model, [*modules], shapes, str(folder))
    groups: dict[str, tuple[Read, dict[str, Any], dict[str, bool]]] = {}
    for name, module in modules.items():
        read, places = KINDS[kind](config, module), kernels_of(name, rules, shapes)
        scaled = read.arguments.pop("inputs", False)
        group = groups.setdefault(repr((read.kind.__name__, read.arguments)), (read, {}, {}))
        for number, place in enumerate(places):
            own = read.leaves if len(places) == 1 else third(read.leaves, read.kind.__name__, number)
            group[1].update({f"{place}/{leaf}": np.ascontiguousarray(value) for leaf, value in own.items()})
            group[2][place] = scaled
    parts: dict[str, Part] = {}
    params: dict[str, Any] = {}
    for number, (read, leaves, where) in enumerate(groups.values(), 1):
        asked = {"feedforward": [_exactly(p) for p, scaled in where.items() if scaled]} if kind == "IA3" else {}
        name = "peft" if len(groups) == 1 else f"peft{number}"
        parts[name] = read.kind(**read.arguments, **read.hidden, **asked).on([_exactly(place) for place in where])
        params[name] = tree.nested(leaves)
    if own := _whole(whole, rules, shapes, weights, f"{folder} ({scheme.name})"):
        parts["whole"] = deltas.full().on([_exactly(place) for place in own])
        params["whole"] = tree.nested(own)
    if not parts:
        raise InputError(f"{folder / WEIGHTS} holds no adapter")
    alone = len(parts) == 1
    net = deltas.delta(model, base, next(iter(parts.values())) if alone else deltas.chain(**parts))
    variables = {**{kind: value for kind, value in base.items() if kind not in ("params", "frozen")}}
    variables["params"] = next(iter(params.values())) if alone else params
    deltas.merged(net, variables)  # raises where a shape is another
    return PeftDelta(net, variables)


def save_peft(path: str | Path, model: Delta, variables: Any, *, scheme: str = "huggingface") -> Path:
    """Writes a delta as an adapter that Hugging Face's peft loads: `PeftModel.from_pretrained(network, path)`.

    LoRA (of any start), DoRA, AdaLoRA, (IA)³, VeRA, LoHa, LoKr, OFT, BOFT; beside it `full()` of whole layers, a head
    say, which are peft's `modules_to_save`. Names are those of transformers 5.

    Args:
      path: the folder to write, made where there is none.
      model: as `jt.deltas.delta` made it, of a network that has names in that library.
      variables: its variables, or a training state with them.
      scheme: whose names: "huggingface", or another of `jaxtransfer.pretrained.LIBRARIES`.

    Returns:
      The folder.

    Raises:
      InputError: for a delta that peft has no form for, or layers without a name there; where it can't be written.
    """
    found: Adapter = adapter_of(model, variables, scheme)
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        named = {
            f"{_SHARED if name in found.shared else _PREFIX}{name}": value for name, value in found.tensors.items()
        }
        arrays = {name: np.ascontiguousarray(value) for name, value in jax.device_get(named).items()}
        safetensors.write(folder / WEIGHTS, arrays, {"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(found.config, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from None
    return folder


def _exactly(path: str) -> str:
    return f"^{path}$"


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(folder / CONFIG))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"expected a folder of peft's, with {CONFIG} in it; cannot read {folder / CONFIG}: {reason}"
        ) from None
    if not isinstance(found, dict):
        raise InputError(f"{folder / CONFIG} should hold a JSON object; got {found!r:.40}")
    return found


def _tensors(folder: Path) -> Mapping[str, np.ndarray]:
    for name in (WEIGHTS, "adapter_model.bin"):
        if (folder / name).is_file():
            return {key: np.asarray(value) for key, value in read_file(folder / name).items()}
    raise InputError(f"{folder} has no {WEIGHTS}")


def _apart(tensors: Mapping[str, np.ndarray], folder: Path) -> tuple[dict[str, Module], dict[str, np.ndarray]]:
    """Returns the adapted modules by name, and the tensors that are the network's own."""
    shared = {n.removeprefix(_SHARED): v for n, v in tensors.items() if not n.startswith(_PREFIX)}
    found: dict[str, dict[str, np.ndarray]] = {}
    whole: dict[str, np.ndarray] = {}
    for full, value in tensors.items():
        if not full.startswith(_PREFIX):
            continue
        name = full.removeprefix(_PREFIX).removesuffix(".weight")
        module, _, last = name.rpartition(".")
        if last in TENSORS and not value.size:
            continue  # AdaLoRA left it no direction
        if last in TENSORS:
            found.setdefault(module, {})[last] = value
        elif any(
            word.startswith(("lora_", "hada_", "lokr_", "oft_", "boft_", "ia3_", "vera_")) for word in name.split(".")
        ):
            raise InputError(f"{folder} has a tensor {full!r}, a form of adapter that is not known here")
        else:
            short = full.removeprefix(_PREFIX)
            for word in _WRAPPED:
                short = short.replace(word, "")
            whole[short] = value
    return {name: Module(name, own, shared) for name, own in found.items()}, whole


def _whole(
    tensors: Mapping[str, np.ndarray], rules: Sequence[Any], shapes: Any, weights: Mapping[str, Any], what: str
) -> dict[str, np.ndarray]:
    """Returns the differences of parameters that an adapter holds whole, by path."""
    own = {}
    for name, value in tensors.items():
        for path, leaf in (translate(name, value, rules, shapes) or {name: value}).items():
            place = path.removeprefix("params/")
            if place not in weights or weights[place].shape != leaf.shape:
                have = f"has {list(weights[place].shape)}" if place in weights else "has no such parameter"
                raise InputError(f"{what} holds {name!r} {list(value.shape)}, and the model {have}")
            own[place] = leaf.astype(np.float32) - np.asarray(weights[place].value)
    return own
