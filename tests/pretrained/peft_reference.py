"""Run by a Python that has peft: `make FOLDER` writes adapters of each kind and their outputs, `read` runs ours."""

import os
import sys
import warnings
from pathlib import Path

import numpy as np
import peft  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.simplefilter("ignore")
ATTENTION, MLP, PATCHES = ["q_proj", "v_proj"], "fc2", "projection"  # names of transformers 5
KINDS = {
    "lora": peft.LoraConfig(r=3, lora_alpha=5, target_modules=[*ATTENTION, MLP, PATCHES]),
    "rslora": peft.LoraConfig(
        r=2, lora_alpha=5, use_rslora=True, target_modules=ATTENTION, modules_to_save=["classifier"]
    ),
    "ranks": peft.LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=[*ATTENTION, "classifier"],
        rank_pattern={"q_proj": 3},
        alpha_pattern={"v_proj": 7},
        bias="lora_only",
    ),
    "dora": peft.LoraConfig(r=2, lora_alpha=5, use_dora=True, target_modules=[*ATTENTION, PATCHES]),
    "adalora": peft.AdaLoraConfig(
        init_r=3, target_r=2, lora_alpha=5, total_step=10, tinit=1, tfinal=1, target_modules=[*ATTENTION, MLP]
    ),
    "pissa": peft.LoraConfig(r=2, lora_alpha=5, init_lora_weights="pissa", target_modules=ATTENTION),
    "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", MLP], feedforward_modules=[MLP]),
    "vera": peft.VeraConfig(r=4, target_modules=ATTENTION),
    "loha": peft.LoHaConfig(r=2, alpha=3, target_modules=[*ATTENTION, PATCHES]),
    "loha core": peft.LoHaConfig(r=2, alpha=3, use_effective_conv2d=True, target_modules=[*ATTENTION, PATCHES]),
    "lokr core": peft.LoKrConfig(r=1, alpha=3, use_effective_conv2d=True, target_modules=[PATCHES, MLP]),
    "lokr": peft.LoKrConfig(r=2, alpha=3, target_modules=[*ATTENTION, PATCHES, MLP]),
    "oft": peft.OFTConfig(r=0, oft_block_size=4, target_modules=[*ATTENTION, MLP]),
    "boft": peft.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=2, target_modules=ATTENTION),
    "fourierft": peft.FourierFTConfig(n_frequency=10, scaling=20.0, target_modules=ATTENTION),
}


def network():
    """A small transformer at random weights, larger than those that are drawn usually."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    images = {"image_size": 8, "patch_size": 4, "num_channels": 3, "num_labels": 3, "layer_norm_eps": 1e-6}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, **images))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.eval()


def outputs(model, folder):
    with torch.no_grad():
        return model(torch.tensor(np.load(folder / "x.npy"))).logits.numpy()


def make(folder):
    network().save_pretrained(folder / "base")
    np.save(folder / "x.npy", torch.randn(4, 3, 8, 8).numpy())
    np.save(folder / "base.npy", outputs(network(), folder))
    for name, config in KINDS.items():
        model = peft.get_peft_model(network(), config)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model.eval().save_pretrained(folder / name)
        np.save(folder / f"{name}.npy", outputs(model, folder))


def read(folder):
    for config in sorted((folder / "ours").glob("*/adapter_config.json")):
        model = peft.PeftModel.from_pretrained(network(), config.parent).eval()
        np.save(folder / "ours" / f"{config.parent.name}.npy", outputs(model, folder))


if __name__ == "__main__":
    {"make": make, "read": read}[sys.argv[1]](Path(sys.argv[2]))
