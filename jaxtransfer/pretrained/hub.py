"""Weights by name: `hf:owner/name` and `timm:name`, fetched once and kept by huggingface_hub."""

from pathlib import Path

from jaxtransfer.errors import InputError
from jaxtransfer.formats.read import file_of

_FACTS = ("config.json", "preprocessor_config.json")
_TEXT = (  # what stands beside text encoders, and where sentence-transformers keeps it
    *("tokenizer.json", "tokenizer_config.json", "vocab.txt"),
    *("modules.json", "*_Pooling/config.json", "sentence_bert_config.json"),
)
_FILES = ("model*.safetensors", "model.safetensors.index.json")
_OLD_FILES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


def is_name(source: str) -> bool:
    """Whether a source is a name of a hub and no path.

    Args:
      source: "hf:owner/name", "timm:name", or a path.
    """
    return source.startswith(("hf:", "timm:"))


def fetch(source: str) -> Path:
    """Returns the folder with the weights of a name, fetched before or now.

    Args:
      source: `hf:owner/name` or `timm:name`, with `@revision` (a branch, a tag, a commit) to pin it.

    Raises:
      InputError: for a name of another form; without `huggingface_hub`; offline, where it was not fetched before; where
        there is no such name, or no weights under it.
    """
    hub, _, rest = source.partition(":")
    name, _, revision = rest.partition("@")
    repository = f"timm/{name}" if hub == "timm" and "/" not in name else name
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise InputError(f"expected hf:owner/name or timm:name, with @revision or without; got {source!r}")
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(f"fetching {source} needs huggingface_hub: pip install 'jaxtransfer[hub]'") from None
    for patterns in (_FILES, _OLD_FILES):
        try:
            folder = huggingface_hub.snapshot_download(
                repository, revision=revision or None, allow_patterns=[*_FACTS, *_TEXT, *patterns]
            )
        except Exception as error:  # of the network, of the hub, of the cache: many and changing kinds
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise InputError(
                f"cannot fetch {source}: {reason.rstrip('.')}; offline, fetch it elsewhere and pass the folder"
            ) from error
        try:
            file_of(Path(folder))
        except InputError:
            continue
        return Path(folder)
    raise InputError(f"{source} has no weights of a known kind: expected {', '.join(_FILES + _OLD_FILES)}")
