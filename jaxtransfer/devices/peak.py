"""What a device could do at most, beside which a run's own speed says how well it is used; and the memory it took."""

import resource
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

_TERA = 1e12
PEAKS = {  # dense bfloat16 (float16 where there is no other) of one JAX device, from the makers' data sheets
    "TPU v2": 22.5 * _TERA,
    "TPU v3": 61.5 * _TERA,
    "TPU v4": 275 * _TERA,
    "TPU v5 lite": 197 * _TERA,
    "TPU v5e": 197 * _TERA,
    "TPU v5": 459 * _TERA,
    "TPU v6 lite": 918 * _TERA,
    "TPU v6e": 918 * _TERA,
    "Tesla T4": 65 * _TERA,
    "Tesla V100": 125 * _TERA,
    "NVIDIA A10G": 70 * _TERA,
    "NVIDIA A100": 312 * _TERA,
    "NVIDIA L4": 121 * _TERA,
    "NVIDIA L40S": 362 * _TERA,
    "NVIDIA H100 PCIe": 756 * _TERA,
    "NVIDIA H100": 989 * _TERA,
    "NVIDIA H200": 989 * _TERA,
    "NVIDIA B200": 2250 * _TERA,
}


def peak_of(kind: str) -> float | None:
    """Returns the operations per second of a device by the table, None for one that isn't there.

    Args:
      kind: the device's `device_kind`, such as "NVIDIA H100 80GB HBM3": the longest name of the table that it begins
        with, up to a blank or its end, counts.
    """
    found = [name for name in PEAKS if f"{kind} ".startswith((f"{name} ", f"{name}-"))]
    return PEAKS[max(found, key=len)] if found else None


def measured_peak(size: int | None = None, dtype: jnp.dtype | type | None = None) -> float:
    """Measures the operations per second of a product of two matrices on the default device, the best of five.

    Args:
      size: of the square matrices; by default 1,024 on a CPU, else 8,192.
      dtype: by default float32 on a CPU, else bfloat16.
    """
    on_cpu = jax.default_backend() == "cpu"
    size, dtype = size or (1024 if on_cpu else 8192), dtype or (jnp.float32 if on_cpu else jnp.bfloat16)
    factor = jnp.full((size, size), 1 / size, dtype)
    product = jax.jit(jnp.matmul)
    product(factor, factor).block_until_ready()
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        product(factor, factor).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds)


def peak_memory() -> dict[str, float]:
    """Returns the most bytes that were in use so far: `peak_memory_bytes` of the fullest local device, where it tells;
    else `peak_host_memory_bytes`, of this process."""
    told = [stats["peak_bytes_in_use"] for one in jax.local_devices() if (stats := _stats(one))]
    if told:
        return {"peak_memory_bytes": float(max(told))}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_host_memory_bytes": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)}


def _stats(device: Any) -> dict[str, int]:
    stats = device.memory_stats() or {}
    return stats if "peak_bytes_in_use" in stats else {}
