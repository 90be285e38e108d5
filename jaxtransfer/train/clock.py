"""Where the time of a run goes."""

import time

import jax


class Clock:
    """Wall time, how much of it was spent waiting for data, and the compilation told apart."""

    def __init__(self, rows: int):
        self.rows, self.begin, self.waited, self.compiled = rows, time.perf_counter(), 0.0, 0.0
        self.steps = self.first = 0

    def waiting(self):
        """Returns a context whose time counts as waiting for data."""
        clock = self

        class Waiting:
            def __enter__(self):
                self.start = time.perf_counter()

            def __exit__(self, *_):
                clock.waited += time.perf_counter() - self.start

        return Waiting()

    def stepped(self, metrics, size: int) -> None:
        """Notes a call of `size` steps; waits for the first one, which compiles."""
        self.steps += size
        if self.first == 0:  # the first call compiles
            self.first = size
            jax.block_until_ready(metrics)
            self.compiled = time.perf_counter() - self.begin - self.waited

    def report(self) -> dict[str, float]:
        """Returns the record of the time so far."""
        seconds = time.perf_counter() - self.begin
        running = max(seconds - self.compiled, 1e-9)
        return {
            "seconds": seconds,
            "compile_seconds": self.compiled,
            "data_wait_fraction": self.waited / seconds,
            "examples_per_second": (self.steps - self.first) * self.rows / running,
        }
