"""Files of weights: tensors by name, whoever wrote them; no file's code is run."""

from jaxtransfer.formats.read import read_tensors as read_tensors
