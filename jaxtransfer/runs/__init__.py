"""A run as a thing of the library: its directory, its checkpoints, what it noted, its report; `load_run` reads it."""

from jaxtransfer.runs.load import Preprocessing as Preprocessing
from jaxtransfer.runs.load import Run as Run
from jaxtransfer.runs.load import load_run as load_run
