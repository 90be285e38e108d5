"""Compiled programs kept on disk: a command that starts for the second time compiles next to nothing."""

import hashlib
import importlib
import platform
import sys
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

LARGEST = 2 * 2**30  # bytes
_DIRECTORY = "jax_compilation_cache_dir"
_ENABLED = "jax_enable_compilation_cache"
_KEEP_ALL = {  # a run has a hundred small programs, initialisers say, which take longer to compile than to read
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
_UNREADABLE = "Error reading persistent compilation cache entry"


@contextmanager
def programs_kept(folder: Path, *, largest: int = LARGEST) -> Iterator[Path | None]:
    """Keeps what JAX compiles in a folder, and reads it from there; afterwards JAX is set as it was.

    Programs lie apart for each jaxlib and processor: one that was compiled for another may hold instructions that this
    one lacks. Entries that can't be read, as one that a killed process left half written, are compiled anew and
    removed, in silence. At the end what was used longest ago is deleted until `largest` bytes are left.

    Nothing is done, and None given, where JAX has a folder already (`JAX_COMPILATION_CACHE_DIR`), where its cache is
    turned off (`JAX_ENABLE_COMPILATION_CACHE=false`), or, with a warning, where the folder can't be written.

    Args:
      folder: of the kept programs; made where it isn't there.
      largest: bytes to leave in the folder of this kind of machine.
    """
    where = folder / _kind()
    if not _free(where):
        yield None
        return
    before = {name: getattr(jax.config, name) for name in (_DIRECTORY, *_KEEP_ALL)}
    for name, value in {_DIRECTORY: str(where), **_KEEP_ALL}.items():
        jax.config.update(name, value)
    reset_cache()  # else JAX goes on as it decided at its first compilation
    shown, unreadable = warnings.showwarning, []

    def show(message, *rest, **more):
        if str(message).startswith(_UNREADABLE):
            unreadable.append(message)
        else:
            shown(message, *rest, **more)

    warnings.showwarning = show
    try:
        yield where
    finally:
        if warnings.showwarning is show:
            warnings.showwarning = shown
        for name, value in before.items():
            jax.config.update(name, value)
        reset_cache()
        if unreadable:
            _remove_broken(where)
        prune(where, largest)


def prune(folder: Path, largest: int = LARGEST) -> None:
    """Deletes the files that were used longest ago until at most `largest` bytes are left; others may prune as well."""
    entries = []
    for entry in folder.glob("*"):
        try:
            status = entry.stat()
        except FileNotFoundError:  # another process prunes too
            continue
        entries.append((max(status.st_mtime, status.st_atime), status.st_size, entry))
    left = sum(size for _, size, _ in entries)
    for _, size, entry in sorted(entries):
        if left <= largest:
            return
        entry.unlink(missing_ok=True)
        left -= size


def _free(where: Path) -> bool:
    """Whether JAX keeps its programs nowhere yet, and they can be kept here."""
    if getattr(jax.config, _DIRECTORY) or not getattr(jax.config, _ENABLED):
        return False
    try:
        where.mkdir(parents=True, exist_ok=True)
        probe = where / f".{platform.node()}-probe"
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"compiled programs are not kept, {error.strerror}: {where}", stacklevel=4)
        return False
    return True


def _kind() -> str:
    """A name of what programs depend on that JAX doesn't tell apart in its own names of them."""
    kind = f"{version('jaxlib')} {platform.machine()} {_instructions()}"
    return hashlib.sha256(kind.encode()).hexdigest()[:12]


def _instructions() -> str:
    """What instructions the processor has, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())


def _remove_broken(folder: Path) -> None:
    """Removes entries that end too early or are damaged; JAX never writes one again that is there."""
    for entry in folder.glob("*-cache"):
        try:
            whole = _whole(entry.read_bytes())
        except FileNotFoundError:  # another process prunes
            continue
        if not whole:
            entry.unlink(missing_ok=True)


def _whole(held: bytes) -> bool:
    """Whether an entry can be decompressed, by the library that JAX compressed it with."""
    try:
        if held[:4] != b"\x28\xb5\x2f\xfd":
            zlib.decompress(held)
        elif sys.version_info >= (3, 14):
            importlib.import_module("compression.zstd").decompress(held)
        else:
            importlib.import_module("zstandard").ZstdDecompressor().decompress(held)
    except Exception:  # each library has an error of its own
        return False
    return True
