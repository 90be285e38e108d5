"""What `--from` may name: a run of ours, a file or folder of somebody's weights, a name of a hub."""

from pathlib import Path

import jaxtransfer as jt
from jaxtransfer.cli.cache_teacher import teacher_identity
from jaxtransfer.cli.runs import Run, load_run
from jaxtransfer.cli.values import check_network
from jaxtransfer.errors import InputError
from jaxtransfer.files import expanded
from jaxtransfer.pretrained import hub
from jaxtransfer.runs.configuration import FEATURES

_WEIGHTS = (".safetensors", ".pth", ".pt", ".th", ".bin", ".ckpt", ".npz", ".onnx", ".index.json")


def network_of(source: str, model: str | None) -> str | None:
    """Returns the network that somebody's weights are of, as --model or their name says; None for a run.

    Raises:
      InputError: where neither says it; for --model beside a run, which says it itself.
    """
    if model is not None:
        check_network(model)
    if not is_weights(source):
        if model is not None:
            raise InputError(f"--model is of weights in a file; {source} is a run, which says its own; leave it out")
        return None
    network = model or jt.pretrained.told_network(source)
    if network is None:
        raise InputError(f"nothing says which network the weights {source} are of: --model NAME")
    return network


def read_source(source: str, network: str | None, *, needs_head: bool) -> Run:
    """Returns a run, or somebody's weights as one, at step 0.

    Args:
      source: what `--from` names.
      network: what `network_of` gave.
      needs_head: whether weights without a head are an error.
    """
    if network is None:
        run = load_run(Path(source))
        if run.model.frozen:
            raise InputError(
                f"{source} has new layers inside of a frozen network, which no other training goes on from; start from "
                f"its base, or in Python from jt.load_run({source!r})"
            )
        return run
    place = source if hub.is_name(source) else expanded(source)
    try:
        loaded = jt.pretrained.load_named(place, network, needs_head=needs_head)
        run = jt.pretrained.run_of(loaded)
    except InputError as error:
        if "are normalised; say it" not in str(error):
            raise
        raise InputError(
            f"nothing says how the images of {source} are normalised; make a run of them by jaxtransfer convert, with "
            f"--mean and --std, and start from that"
        ) from None
    entries = {"scheme": loaded.report.scheme, "weights": teacher_identity(run)["weights"][:16]}
    if loaded.report.fresh:
        entries["knows"] = [FEATURES]
    return run._replace(config={**run.config, **entries})


def is_weights(source: str) -> bool:
    """Whether a source is somebody's weights, of a file, a folder or a hub, and no run."""
    if hub.is_name(source):
        return True
    path = expanded(source)
    if path.is_dir():
        return not (path / "checkpoints").is_dir() and any(
            name.name.endswith(_WEIGHTS) for name in path.iterdir() if name.is_file()
        )
    return path.is_file() or source.endswith(_WEIGHTS)
