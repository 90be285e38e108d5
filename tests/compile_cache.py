"""JAX's persistent compilation cache for the tests: a second run compiles next to nothing.

It lies in the user's cache folder, apart for each processor and jaxlib, whose programs differ. JAX's own variables
choose: `JAX_COMPILATION_CACHE_DIR` another folder, `JAX_ENABLE_COMPILATION_CACHE=false` none.
"""

import hashlib
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

LARGEST = 2 * 2**30  # bytes


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns what to add to `environment`, for this process and those that it starts."""
    if environment.get("JAX_ENABLE_COMPILATION_CACHE", "true").lower() in ("false", "0", "no", "off"):
        return {}
    added = {
        "JAX_COMPILATION_CACHE_DIR": str(folder()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return {name: value for name, value in added.items() if name not in environment}


def folder() -> Path:
    """The tests' own cache of this machine's kind."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kind = f"{version('jaxlib')} {platform.machine()} {_features()}"
    return base / "jaxtransfer" / "compiled" / hashlib.sha256(kind.encode()).hexdigest()[:12]


def prune(path: Path | None = None, largest: int = LARGEST) -> None:
    """Deletes what was written longest ago until at most `largest` bytes of the tests' own cache are left."""
    entries = []
    for entry in (path or folder()).glob("*"):
        try:
            status = entry.stat()
        except FileNotFoundError:  # another run prunes too
            continue
        entries.append((status.st_mtime, status.st_size, entry))
    left = sum(size for _, size, _ in entries)
    for _, size, entry in sorted(entries):
        if left <= largest:
            return
        entry.unlink(missing_ok=True)
        left -= size


def _features() -> str:
    """What instructions the processor has, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())
