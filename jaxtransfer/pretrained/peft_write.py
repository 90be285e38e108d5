"""A delta as an adapter of Hugging Face's peft: its configuration, and its tensors by their names there."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtransfer import deltas, tree
from jaxtransfer.deltas import Delta, Weight, described_part
from jaxtransfer.deltas.weight import input_axes, weights_of
from jaxtransfer.errors import InputError, unknown
from jaxtransfer.pretrained.export_weights import LIBRARIES
from jaxtransfer.pretrained.layouts import Layout
from jaxtransfer.pretrained.peft_kinds import OUT
from jaxtransfer.pretrained.peft_names import fitting, module_of
from jaxtransfer.pretrained.scheme import Scheme

VERSION = "0.21.2"
"""Of peft, whose layout and parametrisations these are."""


class Adapter(NamedTuple):
    """What peft writes.

    Attributes:
      config: of `adapter_config.json`.
      tensors: by name.
      shared: which of them belong to no module.
    """

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    shared: tuple[str, ...]


def adapter_of(model: Any, variables: Any, scheme: str) -> Adapter:
    """Returns a delta in peft's form; see `save_peft`."""
    if not isinstance(model, Delta):
        raise InputError("save_peft takes a delta of weights, as jt.deltas.delta or jt.load_run gives it")
    if scheme not in LIBRARIES:
        raise unknown("scheme", scheme, LIBRARIES)
    schemes = [one for one in fitting(model.of) if scheme in one.libraries]
    if not schemes:
        raise InputError(f"{scheme} has no names for model {model.name!r}")
    if hasattr(variables, "state"):
        variables = {"params": variables.params[model.name]}
    own, weights = variables["params"], weights_of(deltas.base_of(model))
    read = model.frozen["fixed"].tree if "fixed" in model.frozen else {}
    description = described_part(model.part) or _undescribed(own)
    parts = {"": description} if description["kind"] != "chain" else description["parts"]
    merged = jax.device_get(deltas.merged(model, variables)["params"])
    errors = []
    for one in schemes:
        written = _Written(one, {f"params/{path}": weight.shape for path, weight in weights.items()})
        try:
            for name, part in parts.items():
                params = own if name == "" else own[name]
                if part["kind"] == "full":
                    written.whole(tree.leaves_by_path(params), tree.leaves_by_path(merged))
                else:
                    written.part(part, params, read if name == "" else read.get(name, {}), weights)
            return written.adapter()
        except InputError as error:
            errors.append(error)
    raise errors[0]


def _undescribed(params: Any) -> dict[str, Any]:
    """Returns what is known of a part that can't say how it was made: VeRA on matrices that were given."""
    if {path.rpartition("/")[2] for path in tree.leaves_by_path(params)} == {"d", "b"}:
        return {"kind": "vera"}
    raise InputError(
        "save_peft: this delta can't say how it was made, so that nothing tells its scale; make it by a constructor of "
        "jt.deltas with plain arguments"
    )


class _Written:
    """An adapter as it grows, part by part."""

    def __init__(self, scheme: Scheme, shapes: Mapping[str, tuple[int, ...]]):
        self.scheme, self.shapes, self.rules = scheme, shapes, scheme.table(shapes)
        self.config: dict[str, Any] = {}
        self.tensors: dict[str, np.ndarray] = {}
        self.shared: list[str] = []
        self.targets: list[str] = []
        self.saved: list[str] = []
        self.ranks: dict[str, int] = {}
        self.alphas: dict[str, float] = {}

    def adapter(self) -> Adapter:
        """Returns it whole."""
        if not self.targets:
            raise InputError("save_peft: the delta changes whole layers alone, which is no adapter; export_weights")
        if self.ranks:
            (rank, *others), (alpha, *_) = self.ranks.values(), self.alphas.values()
            name = "lora_alpha" if self.config["peft_type"] == "LORA" else "alpha"
            self.config |= {"r": rank, name: alpha}
            if others:
                self.config["rank_pattern"] = {k: v for k, v in self.ranks.items() if v != rank}
                self.config["alpha_pattern"] = {k: v for k, v in self.alphas.items() if v != alpha}
        usual = {"peft_version": VERSION, "inference_mode": True, "task_type": None, "base_model_name_or_path": None}
        saved = {"modules_to_save": self.saved} if self.saved else {}
        return Adapter(
            {**usual, **self.config, **saved, "target_modules": self.targets}, self.tensors, tuple(self.shared)
        )

    def part(self, part: Mapping[str, Any], params: Any, read: Any, weights: Mapping[str, Weight]) -> None:
        """Writes a part of weights."""
        kind, arguments = part["kind"], part.get("arguments", {})
        if kind not in OUT and kind != "ia3":
            raise InputError(f"save_peft: peft has no form for a delta {kind!r}; it has those of {', '.join(OUT)}, ia3")
        for path in dict.fromkeys(leaf.rpartition("/")[0] for leaf in tree.leaves_by_path(params)):
            name = self._named(path)
            if name in self.targets:
                raise InputError(f"save_peft: two parts change {path!r}, and peft's adapter is one; merge one of them")
            self.targets.append(name)
            axes = input_axes(path, weights, part.get("as_matrix"))
            weight = Weight(path, weights[path].held, axes)
            leaves = {k: np.asarray(v) for k, v in _at(params, path).items()}
            if kind == "ia3":
                self._ia3(name, leaves["factor"], path, weight, arguments)
                continue
            if begun := _at(read, path) if kind in ("lora", "dora") else {}:
                leaves = _from_zero(kind, leaves, begun)
            self._told(kind, name, arguments, leaves)
            self.tensors |= {f"{name}.{end}": value for end, value in OUT[kind][1](leaves, weight).items()}
        if kind == "vera":
            for end in "ab":
                self.tensors[f"vera_{end.upper()}"] = np.asarray(read[end]).T
                self.shared.append(f"vera_{end.upper()}")

    def whole(self, params: Mapping[str, Any], merged: Mapping[str, Any]) -> None:
        """Writes layers that train whole."""
        for layer in dict.fromkeys(path.rpartition("/")[0] for path in params):
            name = self._named(f"{layer}/kernel")
            how: Any = next(
                rule.how for rule in self.rules if isinstance(rule.how, Layout) and re.fullmatch(rule.pattern, name)
            )
            own = {f"params/{path}": np.asarray(merged[path]) for path in merged if path.startswith(f"{layer}/")}
            if missing := [path for path in own if path.removeprefix("params/") not in params]:
                raise InputError(
                    f"save_peft: peft saves whole layers, and {missing[0].removeprefix('params/')!r} is not trained"
                )
            self.tensors |= {f"{name}.{end}": value for end, value in how.write(layer, own).items()}
            self.saved.append(name)

    def _named(self, path: str) -> str:
        if (name := module_of(path, self.rules, self.shapes)) is None:
            raise InputError(f"save_peft: {self.scheme.name} has no module whose weight is {path!r}")
        return name

    def _told(self, kind: str, name: str, arguments: Mapping[str, Any], leaves: Mapping[str, np.ndarray]) -> None:
        """Notes what the configuration says of a module."""
        told: dict[str, Any] = {"peft_type": OUT[kind][0]}
        if kind in ("lora", "dora"):
            rank, asked = leaves["a"].shape[1], arguments["rank"]
            alpha = float(asked if arguments["alpha"] is None else arguments["alpha"])
            stable = arguments["rank_stabilized"]
            # The scale stays where the start was taken off, which doubles the rank.
            self.ranks[name], self.alphas[name] = rank, alpha * ((rank / asked) ** 0.5 if stable else rank / asked)
            told["lora_dropout"] = float(arguments.get("dropout", 0.0))
            told |= {"use_rslora": stable, "use_dora": kind == "dora", "bias": "none", "init_lora_weights": True}
        elif kind == "ada_lora":
            rank = arguments["rank"]
            alpha = rank if arguments["alpha"] is None else arguments["alpha"]
            told |= {
                "init_r": rank,
                "target_r": rank,
                "lora_alpha": alpha * (1 + 1e-5 / rank),
            }  # it divides by r + 1e-5
            told |= {"lora_dropout": float(arguments.get("dropout", 0.0)), "total_step": 1, "tinit": 0, "tfinal": 0}
        elif kind in ("lo_ha", "lo_kr"):
            self.ranks[name] = arguments["rank"]
            self.alphas[name] = float(arguments["rank"] if arguments["alpha"] is None else arguments["alpha"])
            told["use_effective_conv2d"] = bool(arguments.get("tucker", False))
            if kind == "lo_kr":
                factor = -1 if arguments["factor"] is None else arguments["factor"]
                told |= {"decompose_factor": factor, "decompose_both": arguments["both"]}
        elif kind == "vera":
            told |= {"r": leaves["d"].shape[0], "save_projection": True, "projection_prng_key": 0}
        elif kind == "oft":
            told |= {"r": 0, "oft_block_size": arguments["block"], "block_share": arguments["shared"], "coft": False}
            terms = arguments["terms"]
            told |= {"use_cayley_neumann": terms is not None, "num_cayley_neumann_terms": terms or 5}
        else:
            told |= {"boft_block_size": arguments["block"], "boft_block_num": 0}
            told |= {"boft_n_butterfly_factor": arguments["factors"]}
        if self.config and self.config != told:
            raise InputError("save_peft: the parts are of two kinds, and peft's adapter is of one")
        self.config = told

    def _ia3(self, name: str, factor: np.ndarray, path: str, weight: Weight, arguments: Mapping[str, Any]) -> None:
        inputs = tree.matches(path, arguments["feedforward"])
        shape = (1, -1) if inputs else (-1, 1)
        if len(weight.shape) == 4:
            shape = (1, -1, 1, 1)
        self.tensors[f"{name}.ia3_l"] = factor.reshape(shape)
        self.config.setdefault("peft_type", "IA3")
        if self.config["peft_type"] != "IA3":
            raise InputError("save_peft: the parts are of two kinds, and peft's adapter is of one")
        self.config.setdefault("feedforward_modules", []).extend([name] if inputs else [])


def _from_zero(kind: str, leaves: Mapping[str, np.ndarray], begun: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns a low-rank delta without its start: ab − a₀b₀ is of twice the rank."""
    a = np.concatenate([leaves["a"], np.asarray(begun["a"])], 1)
    b = np.concatenate([leaves["b"], -np.asarray(begun["b"])], 0)
    return {**leaves, "a": a, "b": b}


def _at(params: Any, path: str) -> dict[str, Any]:
    for key in path.split("/"):
        if not isinstance(params, Mapping) or key not in params:
            return {}
        params = params[key]
    return dict(params)
