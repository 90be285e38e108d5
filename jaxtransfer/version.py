"""The version of the library, as it was installed."""

import importlib.metadata

try:
    VERSION = importlib.metadata.version("jaxtransfer")
except importlib.metadata.PackageNotFoundError:  # imported from a folder that nobody installed
    VERSION = "unknown"
