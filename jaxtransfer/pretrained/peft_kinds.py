"""The kinds of deltas that Hugging Face peft has too: how it lays out each one's tensors, there and back.

peft's matrices are of weights [O, I], ours [I, O]; kernels of convolutions are flat here, with inputs (C, k, k).
"""

import math
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jaxtransfer import deltas
from jaxtransfer.deltas import Part, Weight
from jaxtransfer.errors import InputError

Config = Mapping[str, Any]
Tensors = Mapping[str, np.ndarray]


class Module(NamedTuple):
    """An adapted module of peft's.

    Attributes:
      name: in the network.
      tensors: by what stands behind the name, without an ending `.weight`.
      shared: tensors of the whole adapter.
    """

    name: str
    tensors: Tensors
    shared: Tensors


class Read(NamedTuple):
    """What a module says.

    Attributes:
      kind: the constructor of the part, in `jt.deltas`.
      arguments: of it, plain data; modules with the same ones are one part.
      leaves: its parameters here.
      hidden: further arguments, arrays and functions, the same for all modules.
    """

    kind: Callable[..., Part]
    arguments: dict[str, Any]
    leaves: dict[str, np.ndarray]
    hidden: Mapping[str, Any] = MappingProxyType({})


def of_pattern(config: Config, entry: str, name: str, usual: Any) -> Any:
    """Returns a value of a module: of the first pattern that is its name's end, else the usual one."""
    for pattern, value in (config.get(entry) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return usual


def _t(tensor: np.ndarray) -> np.ndarray:
    """Returns [O, ...] as [..., O]: transposed, what a convolution has besides flat."""
    return tensor.reshape(tensor.shape[0], -1).T


def _lora(config: Config, module: Module) -> Read:
    t = module.tensors
    if "lora_embedding_A" in t:
        a, b = t["lora_embedding_A"].T, t["lora_embedding_B"].T
    else:
        a, b = _t(t["lora_A"]), _t(t["lora_B"])
    start = _start(config)
    arguments = {
        "rank": a.shape[1],
        "alpha": float(of_pattern(config, "alpha_pattern", module.name, config.get("lora_alpha", 8))),
        "rank_stabilized": bool(config.get("use_rslora")),
        "start": start,
        "dropout": float(config.get("lora_dropout") or 0),
    }
    if "lora_magnitude_vector" in t:
        return Read(deltas.dora, arguments, {"a": a, "b": b, "m": t["lora_magnitude_vector"].reshape(-1)})
    return Read(deltas.lora, arguments, {"a": a, "b": b})


def _ada_lora(config: Config, module: Module) -> Read:
    t = module.tensors
    rank = t["lora_A"].shape[0]
    # peft divides by the rank that training began with, and by 1e-5 more; what fell away has been left out of the file.
    began = float(config.get("init_r") or rank)
    alpha = float(config.get("lora_alpha", 8))
    alpha = (alpha if alpha > 0 else began) * rank / (began + 1e-5)
    arguments = {"rank": rank, "alpha": alpha, "dropout": float(config.get("lora_dropout") or 0)}
    return Read(deltas.ada_lora, arguments, {"a": _t(t["lora_A"]), "e": t["lora_E"].ravel(), "b": _t(t["lora_B"])})


_VARIANTS = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config"),
    *("use_bdlora", "use_qalora"),
)
"""Entries of a configuration with which LoRA's tensors mean another function."""


def _start(config: Config) -> Callable[..., Any]:
    """Returns what the factors began as, which peft takes off the base.

    Raises:
      InputError: for a start that can't be told again, and for a variant of LoRA.
    """
    if asked := [name for name in _VARIANTS if config.get(name)]:
        raise InputError(f"the adapter is a variant of LoRA, {asked[0]}, which there is no part for; train without")
    given = str(config.get("init_lora_weights", True)).lower()
    if given.startswith(("pissa_", "corda", "loftq")):
        raise InputError(
            f"the adapter stands on a base that its start, {given!r}, changed and nothing tells again; save it with "
            f"path_initial_model_for_weight_conversion, as peft's guide says"
        )
    return {"pissa": deltas.pissa, "olora": deltas.olora}.get(given, deltas.kaiming)


def _ia3(config: Config, module: Module) -> Read:
    asked = config.get("feedforward_modules") or ()
    inputs = (
        re.fullmatch(asked, module.name) is not None
        if isinstance(asked, str)
        else any(module.name == one or module.name.endswith(f".{one}") for one in asked)
    )
    return Read(deltas.ia3, {"inputs": inputs}, {"factor": module.tensors["ia3_l"].reshape(-1)})


def _vera(config: Config, module: Module) -> Read:
    if not {"vera_A", "vera_B"} <= module.shared.keys():
        raise InputError(
            "the adapter was saved without its random matrices, which PyTorch alone draws again; save it with "
            "save_projection=True"
        )
    a, b = module.shared["vera_A"].T, module.shared["vera_B"].T
    own = {"d": module.tensors["vera_lambda_d"], "b": module.tensors["vera_lambda_b"]}
    arguments = {"rank": a.shape[1], "initial": float(config.get("d_initial", 0.1))}
    return Read(deltas.vera, arguments, own, {"shared": (a, b)})


def _lo_ha(config: Config, module: Module) -> Read:
    t = module.tensors
    own = {}
    for number in "12":
        own |= _with_core(number, t[f"hada_w{number}_b"], t[f"hada_w{number}_a"], t.get(f"hada_t{number}"))
    alpha = float(of_pattern(config, "alpha_pattern", module.name, config.get("alpha", 8)))
    tucker = bool(config.get("use_effective_conv2d"))
    return Read(deltas.lo_ha, {"rank": own["a1"].shape[1], "alpha": alpha, "tucker": tucker}, own)


def _with_core(number: str, inside: np.ndarray, outside: np.ndarray, core: np.ndarray | None) -> dict[str, np.ndarray]:
    """Returns a and b of peft's [r, I] and [O, r]; beside a core [r, r, k, k] the second is [r, O]."""
    if core is None:
        return {f"a{number}": inside.T, f"b{number}": outside.T}
    return {f"a{number}": inside.T, f"b{number}": outside, f"t{number}": core.reshape(*core.shape[:2], -1)}


def _lo_kr(config: Config, module: Module) -> Read:
    t, own = module.tensors, {}
    for number in "12":
        if f"lokr_w{number}" in t:
            own[f"w{number}"] = _t(t[f"lokr_w{number}"])
        else:
            own |= _with_core(number, t[f"lokr_w{number}_b"], t[f"lokr_w{number}_a"], t.get(f"lokr_t{number}"))
    factor = config.get("decompose_factor", -1)
    arguments = {
        "rank": of_pattern(config, "rank_pattern", module.name, config.get("r", 8)),
        "alpha": float(of_pattern(config, "alpha_pattern", module.name, config.get("alpha", 8))),
        "factor": None if factor == -1 else factor,
        "both": bool(config.get("decompose_both")),
        "tucker": bool(config.get("use_effective_conv2d")),
    }
    return Read(deltas.lo_kr, arguments, own)


def _oft(config: Config, module: Module) -> Read:
    if config.get("coft"):
        raise InputError("the adapter's rotations are constrained (coft), which there is no part for; train without")
    skew = module.tensors["oft_R"]
    terms = config.get("num_cayley_neumann_terms", 5) if config.get("use_cayley_neumann") else None
    arguments = {
        "block": round((1 + math.sqrt(1 + 8 * skew.shape[1])) / 2),
        "shared": bool(config.get("block_share")),
        "terms": terms,
    }
    return Read(deltas.oft, arguments, {"skew": skew})


def _boft(config: Config, module: Module) -> Read:
    skew, scale = module.tensors["boft_R"], module.tensors["boft_s"].reshape(-1)
    return Read(deltas.boft, {"block": skew.shape[2], "factors": skew.shape[0]}, {"skew": skew, "scale": scale})


def _fourier_ft(config: Config, module: Module) -> Read:
    spectrum, seed = module.tensors["fourierft_spectrum"], int(config.get("random_loc_seed", 777))
    arguments = {"entries": spectrum.shape[0], "scale": float(config.get("scaling", 150.0))}

    def places(columns: int, rows: int) -> np.ndarray:
        return torch_permutation(columns * rows, spectrum.shape[0], seed)

    return Read(deltas.fourier_ft, arguments, {"spectrum": spectrum}, {"places": places})


KINDS: dict[str, Callable[[Config, Module], Read]] = {
    "LORA": _lora,
    "ADALORA": _ada_lora,
    "IA3": _ia3,
    "VERA": _vera,
    "LOHA": _lo_ha,
    "LOKR": _lo_kr,
    "OFT": _oft,
    "BOFT": _boft,
    "FOURIERFT": _fourier_ft,
}
"""How the tensors of a module are read, by `peft_type`."""

TENSORS = (
    *("lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "ia3_l"),
    *("vera_lambda_d", "vera_lambda_b", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "oft_R"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "hada_t1", "hada_t2", "lokr_t2"),
    *("boft_R", "boft_s", "fourierft_spectrum"),
)
"""What is read of a module."""


def torch_permutation(size: int, count: int, seed: int) -> np.ndarray:
    """Returns the first numbers of `torch.randperm` on a CPU: a shuffle forward by the Mersenne twister, 32 bits each.

    Args:
      size: numbers from 0 on.
      count: how many of them.
      seed: of the generator, from 0 on; its lower 32 bits count.
    """
    draws = np.random.RandomState(seed % 2**32).randint(0, 2**32, count, np.uint32).astype(np.int64)
    moved: dict[int, int] = {}
    found = np.zeros(count, np.int64)
    for place in range(count):
        other = place + int(draws[place]) % (size - place) if place < size - 1 else place
        found[place] = moved.get(other, other)
        moved[other] = moved.get(place, place)
    return found


def third(leaves: Mapping[str, np.ndarray], kind: str, number: int) -> dict[str, np.ndarray]:
    """Returns what a delta of a fused kernel [I, 3·O] is for one of its three parts.

    Args:
      leaves: of the whole, as `Read` has them.
      kind: the name of the part's constructor.
      number: of the third, 0 to 2.

    Raises:
      InputError: for a kind whose difference does not split by outputs.
    """
    outputs = {"lora": ("b",), "dora": ("b", "m"), "vera": ("b",), "lo_ha": ("b1", "b2"), "oft": (), "boft": ("scale",)}
    if kind not in outputs:
        raise InputError(f"a {kind} of query, key and value in one kernel does not split into three; adapt them apart")
    return {name: np.split(leaf, 3, -1)[number] if name in outputs[kind] else leaf for name, leaf in leaves.items()}


def lora_out(leaves: Tensors, weight: Weight) -> dict[str, np.ndarray]:
    """Returns LoRA's and DoRA's tensors of a kernel."""
    a, b = leaves["a"].T, leaves["b"].T
    m = {"lora_magnitude_vector": leaves["m"]} if "m" in leaves else {}
    if weight.path.endswith("embedding"):
        return {"lora_embedding_A": a, "lora_embedding_B": b, **m}
    if len(weight.shape) == 4:
        height, width, channels, _ = weight.shape
        a, b = a.reshape(-1, channels, height, width), b[:, :, None, None]
        m = {name: value.reshape(1, -1, 1, 1) for name, value in m.items()}
    return {"lora_A.weight": a, "lora_B.weight": b, **m}


def ada_lora_out(leaves: Tensors, weight: Weight) -> dict[str, np.ndarray]:
    """Returns AdaLoRA's tensors of a kernel."""
    return {"lora_A": leaves["a"].T, "lora_B": leaves["b"].T, "lora_E": leaves["e"][:, None]}


def vera_out(leaves: Tensors, weight: Weight) -> dict[str, np.ndarray]:
    """Returns VeRA's vectors of a kernel."""
    return {"vera_lambda_d": leaves["d"], "vera_lambda_b": leaves["b"]}


def lo_ha_out(leaves: Tensors, weight: Weight) -> dict[str, np.ndarray]:
    """Returns LoHa's tensors of a kernel."""
    names = {"hada_w1_a": "b1", "hada_w1_b": "a1", "hada_w2_a": "b2", "hada_w2_b": "a2"}
    cores = {f"hada_t{n}": _core_out(leaves[f"t{n}"], weight) for n in "12" if f"t{n}" in leaves}
    return {t: leaves[o] if cores and o[0] == "b" else leaves[o].T for t, o in names.items()} | cores


def _core_out(core: np.ndarray, weight: Weight) -> np.ndarray:
    return core.reshape(*core.shape[:2], *weight.shape[:2])


def lo_kr_out(leaves: Tensors, weight: Weight) -> dict[str, np.ndarray]:
    """Returns LoKr's tensors of a kernel."""
    names = {
        "lokr_w1_a": "b1",
        "lokr_w1_b": "a1",
        "lokr_w2_a": "b2",
        "lokr_w2_b": "a2",
        "lokr_w1": "w1",
        "lokr_w2": "w2",
    }
    out = {theirs: leaves[ours].T for theirs, ours in names.items() if ours in leaves}
    if "t2" in leaves:
        out |= {"lokr_t2": _core_out(leaves["t2"], weight), "lokr_w2_a": leaves["b2"]}
    if len(weight.shape) == 4 and "lokr_w2" in out:
        height, width, *_ = weight.shape
        out["lokr_w2"] = out["lokr_w2"].reshape(out["lokr_w2"].shape[0], -1, height, width)
    return out


def oft_out(leaves: Tensors, weight: Weight) -> dict[str, np.ndarray]:
    """Returns OFT's rotations of a kernel."""
    return {"oft_R.weight": leaves["skew"]}


def boft_out(leaves: Tensors, weight: Weight) -> dict[str, np.ndarray]:
    """Returns BOFT's factors and scale of a kernel."""
    scale = leaves["scale"][:, None]
    return {"boft_R": leaves["skew"], "boft_s": scale if len(weight.shape) < 4 else scale[..., None, None]}


OUT: dict[str, tuple[str, Callable[[Tensors, Weight], dict[str, np.ndarray]]]] = {
    "lora": ("LORA", lora_out),
    "dora": ("LORA", lora_out),
    "ada_lora": ("ADALORA", ada_lora_out),
    "vera": ("VERA", vera_out),
    "lo_ha": ("LOHA", lo_ha_out),
    "lo_kr": ("LOKR", lo_kr_out),
    "oft": ("OFT", oft_out),
    "boft": ("BOFT", boft_out),
}
"""peft's type, and how the tensors of a kernel are written, by kind; (IA)³ apart, which asks which side it scales."""
