"""The initialisers of an ONNX file, under the names that its exporter kept."""

from pathlib import Path

import numpy as np

from jaxtransfer.errors import InputError


def read(path: Path) -> dict[str, np.ndarray]:
    """Returns the constants of the graph by name.

    PyTorch's exporter keeps the names of parameters; where it folds batch norm into convolutions the names are lost:
    export with `do_constant_folding=False` and `training=torch.onnx.TrainingMode.PRESERVE`.

    Args:
      path: the file; values that it keeps in other files are read from beside it.

    Raises:
      InputError: where `onnx` is missing, and where the file can't be read.
    """
    try:
        import onnx  # pyright: ignore[reportMissingImports]
        import onnx.numpy_helper  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(f"reading {path} needs onnx: pip install 'jaxtransfer[onnx]'") from None
    try:
        graph = onnx.load(path).graph
        folder = str(path.parent)
        return {one.name: np.asarray(onnx.numpy_helper.to_array(one, folder)) for one in graph.initializer}
    except Exception as error:  # whatever protobuf and file systems raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"cannot read the weights {path}: {reason}") from error
