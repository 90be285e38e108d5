"""What neither names nor shapes of weights show, and `config.json` beside them says: how layers pad, activations."""

import re
from collections.abc import Mapping
from typing import Any

_OPTIONS: tuple[tuple[str, str, Mapping[str, Any]], ...] = (  # timm's architectures that we have with other options
    (r"tf_efficientnet_lite(\d)", "efficientnet-lite{0}", {"same_padding": True, "epsilon": 1e-3}),
    (r"efficientnet_lite(\d)", "efficientnet-lite{0}", {"same_padding": False, "epsilon": 1e-5}),
)
_STRANGE = {  # timm's whose leaves are those of another network, and that we lack
    r"resnet(?:aa|blur)\d.*": "smooths its maps before it takes every second of them",
}
_USUAL: tuple[tuple[str, str, str], ...] = (  # of timm's architectures: how ours pool, and what they activate by
    (r"(?:vit|deit)_.*", "token", "gelu"),
    (r"(?:wide_)?resnet\d.*|vgg\d.*", "avg", "relu"),
    (r"(?:tf_)?efficientnet_lite\d.*|mobilenetv2_.*", "avg", "relu6"),
)
_SAME: Mapping[str, Mapping[str, Any]] = {  # of transformers, by family, as our models are
    "resnet": {"hidden_act": "relu", "downsample_in_first_stage": False, "downsample_in_bottleneck": False},
    **{family: {"hidden_act": "gelu"} for family in ("vit", "vit_mae", "vit_msn")},
}


def network(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the network of the zoo and its options that timm's `config.json` tells; None where names tell all.

    Args:
      config: what it holds.
    """
    for pattern, name, options in _OPTIONS:
        if found := re.fullmatch(pattern, str(config.get("architecture", ""))):
            return {"model": name.format(*found.groups()), "model_options": dict(options)}
    return None


def differs(config: Mapping[str, Any]) -> str:
    """Returns in which way a network is not as ours, though its weights fit; "" where it is.

    Args:
      config: what `config.json` beside its weights holds, timm's or transformers'.
    """
    name = str(config.get("architecture", ""))
    told = [f"{name}, which {why}" for pattern, why in _STRANGE.items() if re.fullmatch(pattern, name)]
    told += _of_timm(name, config)
    same = _SAME.get(str(config.get("model_type", "")), {})
    told += [f"{key} {config[key]}, not {ours}" for key, ours in same.items() if config.get(key, ours) != ours]
    return "; ".join(told)


def _of_timm(name: str, config: Mapping[str, Any]) -> list[str]:
    usual = next(((pool, act) for pattern, pool, act in _USUAL if re.fullmatch(pattern, name)), None)
    if usual is None:
        return []
    made = config.get("model_args")
    made = made if isinstance(made, Mapping) else {}
    pool = made.get("global_pool", config.get("global_pool"))
    pairs = {
        "global_pool": (pool if pool != "fast" else "avg", usual[0]),
        "act_layer": (made.get("act_layer"), usual[1]),
        "output_stride": (made.get("output_stride"), 32),
    }
    return [f"{key} {theirs}, not {ours}" for key, (theirs, ours) in pairs.items() if theirs not in (None, "", ours)]
