"""Writes what peft makes of layers with drawn weights: run by a Python that has it, `python peft_cases.py OUT.npz`.

For each kind and layer: the base's weight and bias, the adapter's parameters, inputs, outputs as peft runs them, and
the gradients of sum(outputs · direction) in the adapter's parameters.
"""

import sys

import numpy as np
import peft  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

KINDS = {
    "lora": lambda: peft.LoraConfig(r=2, lora_alpha=3),
    "rslora": lambda: peft.LoraConfig(r=2, lora_alpha=3, use_rslora=True),
    "dora": lambda: peft.LoraConfig(r=2, lora_alpha=3, use_dora=True),
    "ia3": lambda: peft.IA3Config(feedforward_modules=[]),
    "ia3 inputs": lambda: peft.IA3Config(feedforward_modules=["layer"]),
    "vera": lambda: peft.VeraConfig(r=3),
    "lo_ha": lambda: peft.LoHaConfig(r=2, alpha=3),
    "lo_kr": lambda: peft.LoKrConfig(r=2, alpha=3),
    "lo_ha tucker": lambda: peft.LoHaConfig(r=2, alpha=3, use_effective_conv2d=True),
    "lo_kr tucker": lambda: peft.LoKrConfig(r=1, alpha=2, use_effective_conv2d=True),
    "lo_kr both": lambda: peft.LoKrConfig(r=1, alpha=2, decompose_both=True, decompose_factor=4),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, use_cayley_neumann=False),
    "oft series": lambda: peft.OFTConfig(r=0, oft_block_size=2, use_cayley_neumann=True),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4),
    "fourier_ft": lambda: peft.FourierFTConfig(n_frequency=9, scaling=30.0),
    "ada_lora": lambda: peft.AdaLoraConfig(init_r=2, target_r=1, lora_alpha=3, total_step=10, tinit=1, tfinal=1),
}
DENSE_ONLY = {"vera", "fourier_ft"}


def layers():
    yield "dense", nn.Linear(12, 16), (5, 12)
    yield "conv", nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5)
    yield "grouped", nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 5, 5)


def main(out):
    found = {}
    for name, make in KINDS.items():
        for kind, layer, shape in layers():
            if kind != "dense" and name in DENSE_ONLY:
                continue
            if kind == "grouped" and name.removesuffix(" tucker") not in ("lo_ha", "lo_kr", "ia3"):
                continue
            torch.manual_seed(0)
            for weight in layer.parameters():
                nn.init.normal_(weight)
            box = nn.Module()
            box.layer, box.config = layer, {"model_type": "custom"}
            box.forward = lambda x, box=box: box.layer(x)
            base = {n: p.detach().numpy().copy() for n, p in layer.named_parameters()}
            config = make()
            config.target_modules = ["layer"]
            tuned = (
                peft.get_peft_model(box, config) if name != "ada_lora" else peft.AdaLoraModel(box, config, "default")
            )
            own = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
            torch.manual_seed(1)
            with torch.no_grad():
                for p in own.values():
                    p.add_(0.3 * torch.randn_like(p))
            x = torch.randn(*shape)
            tuned.eval()
            outer = tuned.base_model.model if hasattr(tuned, "base_model") else tuned.model
            y = outer.layer(x)
            direction = torch.randn_like(y)
            (y * direction).sum().backward()
            case = {"x": x, "y": y, "direction": direction}
            case |= {f"base/{n}": v for n, v in base.items()}
            for n, p in own.items():
                short = n.split("layer.", 1)[1].replace(".default", "").replace(".weight", "")
                case[f"own/{short}"] = p
                case[f"grad/{short}"] = p.grad
            inner = outer.layer
            if name == "vera":
                case |= {"fixed/a": inner.vera_A["default"], "fixed/b": inner.vera_B["default"]}
            if name == "fourier_ft":
                case["fixed/indices"] = inner.indices["default"]
            inner.merge()
            case["merged/weight"] = inner.get_base_layer().weight
            if inner.get_base_layer().bias is not None:
                case["merged/bias"] = inner.get_base_layer().bias
            for key, value in case.items():
                array = value.detach().numpy() if hasattr(value, "detach") else value
                found[f"{name}|{kind}|{key}"] = array
    np.savez(out, version=peft.__version__, **found)


if __name__ == "__main__":
    main(sys.argv[1])
