"""As `peft_reference.py`, of a BERT: `make FOLDER` writes adapters of each kind and their outputs, `read` runs ours."""

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
ATTENTION, WORDS, TYPES = ["query", "value"], "word_embeddings", "token_type_embeddings"
KINDS = {
    "lora": peft.LoraConfig(
        task_type="SEQ_CLS",  # which saves the classifier whole
        r=2,
        lora_alpha=5,
        lora_dropout=0.1,
        target_modules=[*ATTENTION, "intermediate.dense", "pooler.dense"],
    ),
    "embeddings": peft.LoraConfig(r=2, lora_alpha=3, target_modules=["query", WORDS, TYPES]),
    "dora embeddings": peft.LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["key", WORDS]),
    "adalora": peft.AdaLoraConfig(
        init_r=3, target_r=2, lora_alpha=5, total_step=10, tinit=1, tfinal=1, target_modules=ATTENTION
    ),
    "biases": peft.LoraConfig(r=2, lora_alpha=3, bias="all", target_modules=ATTENTION),
    "ia3": peft.IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]),
    "vera": peft.VeraConfig(r=4, target_modules=ATTENTION),
    "loha": peft.LoHaConfig(r=2, alpha=3, target_modules=ATTENTION),
    "lokr": peft.LoKrConfig(r=2, alpha=3, target_modules=["key", "intermediate.dense"]),
    "oft": peft.OFTConfig(r=0, oft_block_size=4, target_modules=["query", "intermediate.dense"]),
    "boft": peft.BOFTConfig(boft_block_size=4, target_modules=ATTENTION),
    "fourierft": peft.FourierFTConfig(n_frequency=10, scaling=20.0, target_modules=ATTENTION),
}


def network():
    """A small BERT at random weights, larger than those that are drawn usually."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    words = {"vocab_size": 30, "max_position_embeddings": 12, "num_labels": 3}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **words))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.eval()


def outputs(model, folder):
    found = np.load(folder / "x.npz")
    given = {name: torch.tensor(found[name].astype(np.int64)) for name in found.files}
    with torch.no_grad():
        return model(
            input_ids=given["tokens"], attention_mask=given["mask"], token_type_ids=given["types"]
        ).logits.numpy()


def make(folder):
    network().save_pretrained(folder / "base")
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 30, (5, 9))
    mask = (np.arange(9)[None] < np.array([[9], [4], [7], [1], [8]])).astype(np.int32)
    np.savez(folder / "x.npz", tokens=(tokens * mask).astype(np.int32), mask=mask, types=rng.integers(0, 2, (5, 9)))
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
