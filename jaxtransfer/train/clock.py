"""Where the time of a run goes, and how much of what the devices could do it used."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from jaxtransfer.devices.ahead import Cost
from jaxtransfer.devices.peak import measured_peak, peak_memory, peak_of


class Clock:
    """Wall time, how much of it was spent waiting for data, and the compilation told apart.

    Args:
      rows: examples in a batch, over all devices.
      measure: whether to measure the peak of a device that the table of `devices/peak.py` lacks.
    """

    def __init__(self, rows: int, *, measure: bool = False):
        self.rows, self.begin = rows, time.perf_counter()
        self.waited = self.compiled = self.apart = 0.0
        self.steps = self.first = 0
        self.flops: float | None = None
        self._measure, self._peak = measure, {}

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time of a block as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leaves the time of a block, an evaluation say, out of the speed of the steps."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.apart += time.perf_counter() - start

    def costs(self, cost: Cost | None) -> None:
        """Notes what the compiled step costs on each device."""
        self.flops = None if cost is None else cost.flops
        if self.flops:
            self._peak = _peak(measure=self._measure)

    def stepped(self, metrics, size: int) -> None:
        """Notes a call of `size` steps; waits for the first one, until which all time is the compilation's."""
        self.steps += size
        if self.first == 0:
            self.first = size
            jax.block_until_ready(metrics)
            self.compiled = time.perf_counter() - self.begin - self.waited

    def report(self) -> dict[str, float]:
        """Returns the record of the time so far.

        `seconds` in all, `compile_seconds` until the first step was made, `data_wait_fraction` of all, and of the time
        after the compilation, evaluations left out, `steps_per_second` and `examples_per_second`. Where the compiler
        tells, `flops_per_step` on each device, a loop inside of the step counted once; where the device is known,
        `flop_utilisation`, their share of `peak_flops` (its data sheet's, for bfloat16) or, where it was measured, of
        `matmul_flops`. The most memory that was taken, as `peak_memory` tells it.
        """
        seconds = time.perf_counter() - self.begin
        running = max(seconds - self.compiled - self.apart, 1e-9)
        rate = (self.steps - self.first) / running
        told = {
            "seconds": seconds,
            "compile_seconds": self.compiled,
            "data_wait_fraction": self.waited / seconds,
            "steps_per_second": rate,
            "examples_per_second": rate * self.rows,
        }
        if self.flops:
            told["flops_per_step"] = self.flops
        for name, peak in self._peak.items():
            told |= {name: peak, "flop_utilisation": (self.flops or 0.0) * rate / peak}
        return {**told, **peak_memory()}


def _peak(*, measure: bool) -> dict[str, float]:
    if (peak := peak_of(jax.devices()[0].device_kind)) is not None:
        return {"peak_flops": peak}
    return {"matmul_flops": measured_peak()} if measure else {}
