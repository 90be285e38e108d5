"""Programs compiled without optimisation, in a fifth of the time, for tests of which nothing hangs on it.

`pytest --unoptimised` turns it on, for this process and those that it starts, and leaves out the tests marked
`optimised`: those that hold compiled derivatives against others. What an optimised program gets wrong, numbers computed
again in a fusion or contracted to a multiply-add, is seen by them alone, so they run as users' programs do. `make test`
runs first the ones and then the others; without the switch, and in `make test-all`, everything is optimised.
"""

import os
from importlib.metadata import version

FLAGS = {  # XLA ends the process at a flag that it doesn't know
    "0.10": (
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_use_fusion_emitters=false",  # half of what is left; later versions have no other way
    ),
}
FLAGS["0.11"] = FLAGS["0.12"] = FLAGS["0.10"][:-1]


def flags() -> tuple[str, ...]:
    """XLA's flags, none of a version whose flags are not known here."""
    return FLAGS.get(".".join(version("jaxlib").split(".")[:2]), ())


def turn_on() -> None:
    """Adds the flags to the environment, before JAX makes its devices."""
    os.environ["XLA_FLAGS"] = with_flags(*flags())


def with_flags(*flags: str) -> str:
    """Returns XLA_FLAGS with those of `flags` that aren't there yet, as in workers, which inherit them.

    Programs are kept under the flags as they stand, so that a worker's and a single process's are the same.
    """
    known = os.environ.get("XLA_FLAGS", "").split()
    return " ".join([*known, *(flag for flag in flags if flag not in known)])


def is_on() -> bool:
    """Whether this process compiles without optimisation."""
    return bool(flags()) and flags()[0] in os.environ.get("XLA_FLAGS", "")


def of_one_device() -> str:
    """XLA_FLAGS for a process that has one device, as a user's has, and compiles as this one does."""
    return " ".join(word for word in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in word)
