"""Options that say over which devices weights are split."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import tyro

from jaxtransfer.devices import device_mesh, fsdp, processes
from jaxtransfer.devices.mesh import named_mesh
from jaxtransfer.devices.sharding import Rule
from jaxtransfer.errors import InputError

_FSDP, _WHOLE, _ROWS = "fsdp", "whole", "data"
_RULE = "fsdp, whole, an axis of --mesh, or one for each dimension with commas, - for none: kernel=-,model"
_FORMS = f"fsdp; or PATTERN=RULE, where a rule is {_RULE}"
_WORDS = {  # what the library says of rules, and how they are written here
    r"'\.\*': None say, which keeps it whole": "'.*=whole' say",
    "give it None before": "give it PATTERN=whole before",
    r"jt\.devices\.fsdp\('\w+'\)": "fsdp",
}


@dataclasses.dataclass(frozen=True)
class ShardOptions:
    """Where weights live."""

    shard: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="RULE ...", help_behavior_hint="(default: whole on each device)")
    ] = ()
    """Split the weights and what the optimiser keeps of them over the devices; a table says who holds what. fsdp splits
    each one's largest dimension. Or rules PATTERN=RULE, of which the first that selects a weight holds: fsdp, whole, an
    axis of --mesh, or an axis for each dimension, - for none: head/kernel=-,model .*=fsdp"""
    mesh: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="AXIS=SIZE ...", help_behavior_hint="(default: data, all devices)")
    ] = ()
    """Axes of the devices that --shard splits over: data=4 model=2. fsdp takes the first one."""

    def check_shard(self, mode: str) -> None:
        """Raises for rules that no run can have, before anything is loaded.

        Args:
          mode: of the run.
        """
        if not self.shard:
            if self.mesh:
                raise InputError("--mesh names the axes that --shard splits over; add --shard, or leave it out")
            return
        if mode != "jit":
            raise InputError(f"--shard splits weights in one program; leave --mode {mode} out")
        if (count := jax.device_count()) == 1:
            raise InputError("--shard splits weights over devices, and there is one; leave it out")
        sizes = self._sizes(count)
        if math.prod(sizes.values()) != count:
            told = " ".join(f"{name}={size}" for name, size in sizes.items())
            raise InputError(f"--mesh must name all {count} devices, the product of its sizes; got {told}")
        for pattern, rule in self._rules(next(iter(sizes))).items():
            _check_axes(pattern, rule, sizes)

    def placed(self, mode: str) -> dict[str, Any]:
        """Returns `mesh`, `shard` and `mode` of `jt.fit`; for a process alone, of several, its own devices."""
        if not self.shard or processes.count() < jax.process_count():
            return {"mesh": device_mesh() if mode == "jit" else None, "mode": mode}
        sizes = self._sizes(jax.device_count())
        return {"mesh": named_mesh(sizes), "shard": self._rules(next(iter(sizes))), "mode": mode}

    def _sizes(self, count: int) -> dict[str, int]:
        """Returns the axes with their sizes."""
        sizes: dict[str, int] = {}
        for word in self.mesh:
            name, _, size = word.partition("=")
            if not (name.isidentifier() and size.isdecimal() and int(size)) or name in {*sizes, _FSDP, _WHOLE}:
                raise InputError(f"--mesh takes AXIS=SIZE, each axis once, data=4 model=2 say; got {word!r}")
            sizes[name] = int(size)
        return sizes or {_ROWS: count}

    def _rules(self, first: str) -> dict[str, Rule]:
        """Returns the rules by pattern.

        Args:
          first: the first axis, that of fsdp.
        """
        rules: dict[str, Rule] = {}
        for word in self.shard:
            pattern, equals, text = word.rpartition("=")
            if not equals and word == _FSDP:
                pattern, text = ".*", _FSDP
            elif not pattern or not text:
                raise InputError(f"--shard takes {_FORMS}; got {word!r}")
            if pattern in rules:
                raise InputError(f"--shard: {pattern!r} is there twice")
            rules[pattern] = _rule(text, first)
        return rules


def in_shard_words(message: str) -> str:
    """Returns an error of the library about rules of `shard` as one about --shard, its remedies as they are written."""
    if not message.startswith("shard: "):
        return message
    for ours, written in _WORDS.items():
        message = re.sub(ours, written, message)
    return f"--{message}"


def _check_axes(pattern: str, rule: Rule, sizes: Mapping[str, int]) -> None:
    """Raises for a rule that splits by what is no axis, or by one twice."""
    entries = (rule,) if isinstance(rule, str) else rule if isinstance(rule, tuple) else ()
    used = [entry for entry in entries if entry is not None]
    for axis in used:
        if axis not in sizes:
            raise InputError(
                f"--shard {pattern}=...: {axis!r} is no axis of --mesh, which has {', '.join(sizes)}; a rule is {_RULE}"
            )
        if used.count(axis) > 1:
            raise InputError(f"--shard {pattern}=...: the axis {axis!r} splits one dimension of a weight, not two")


def _rule(text: str, first: str) -> Rule:
    if text == _FSDP:
        return fsdp(first)
    if text == _WHOLE:
        return None
    if "," not in text:
        return text
    return tuple(None if entry in ("-", "") else entry for entry in text.removesuffix(",").split(","))
