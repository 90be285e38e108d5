"""Compilation ahead of the first call: on a thread of its own, so that a signal needn't wait for it, and told."""

import atexit
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

_UNDER_WAY: set[threading.Thread] = set()


class CompilationCut(BaseException):
    """A compilation that was not waited for; a signal's handler may raise it while the program is traced."""


class Cost(NamedTuple):
    """What a compiled program takes, on each device that it runs on.

    Attributes:
      flops: floating-point operations of a call by XLA's own count, a loop's body once; None where it isn't told.
      arguments: bytes of what it is given.
      outputs: bytes of what it gives back beyond the arguments that it overwrites.
      temporaries: bytes of what it computes in between.
      program: bytes of the program itself.
    """

    flops: float | None
    arguments: int | None = None
    outputs: int | None = None
    temporaries: int | None = None
    program: int | None = None

    @property
    def bytes(self) -> int | None:
        """Bytes in all, None where the device doesn't tell."""
        parts = [part for part in self[1:] if part is not None]
        return sum(parts) if parts else None


def compile_ahead(
    lowered: Any, *, stop: Callable[[], bool] = lambda: False, told: Callable[[float], None] | None = None
) -> Any:
    """Compiles what `jax.jit(f).lower(...)` gave; the function called likewise finds the program then.

    Args:
      lowered: what to compile.
      stop: asked several times a second whether to wait no longer.
      told: called each second with the seconds that it takes so far.

    Returns:
      The compiled program.

    Raises:
      CompilationCut: where `stop()` said so.
    """
    done, results, errors = threading.Event(), [], []

    def work() -> None:
        try:
            results.append(lowered.compile())
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()
            _UNDER_WAY.discard(thread)

    thread = threading.Thread(target=work, name="compilation", daemon=True)
    _UNDER_WAY.add(thread)
    begin = second = time.perf_counter()
    thread.start()
    while not done.wait(0.1):
        if stop():
            raise CompilationCut
        if told is not None and (now := time.perf_counter()) - second >= 1:
            second = now
            told(now - begin)
    if errors:
        raise errors[0]
    return results[0]


def compiling() -> bool:
    """Whether a compilation that nobody waits for is under way: an ordinary end of the process waits for it."""
    return bool(_UNDER_WAY)


@atexit.register
def _finish() -> None:
    """Waits for compilations: the end of the interpreter takes away what they stand on, and they crash."""
    for thread in list(_UNDER_WAY):
        thread.join()


def cost_of(compiled: Any) -> Cost:
    """Returns what a compiled program takes, as far as its device tells."""
    analysed = compiled.cost_analysis()
    first = analysed[0] if isinstance(analysed, list) and analysed else analysed
    flops = first.get("flops") if isinstance(first, dict) else None
    memory = compiled.memory_analysis()
    if memory is None:
        return Cost(flops)
    return Cost(
        flops,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
    )
