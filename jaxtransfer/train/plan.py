"""When a run logs, evaluates, measures and saves."""

from typing import NamedTuple


class Plan(NamedTuple):
    """When to log, evaluate and save; a function of the step alone, so a resumed run does it at the same steps."""

    steps: int
    eval_every: int
    save_every: int
    log_every: int
    together: int  # steps in one call; the periods are multiples of it
    measure_every: int | None = None

    @classmethod
    def of(cls, steps, eval_every, save_every, log_every, evaluates, together=1, measure_every=None) -> "Plan":
        """Returns the plan of so many steps; a period that is None gets its default, but for `measure_every`."""
        eval_every = eval_every or max(1, steps // 10)
        save_every = save_every or eval_every

        def whole_calls(period: int) -> int:
            return -(-period // together) * together

        return cls(
            steps,
            whole_calls(eval_every if evaluates else steps + 1),
            whole_calls(save_every),
            whole_calls(log_every or max(1, steps // 50)),
            together,
            whole_calls(measure_every) if measure_every else None,
        )

    def size(self, number: int) -> int:
        """Steps of the call that follows step `number`."""
        return min(self.together - number % self.together, self.steps - number)

    def _every(self, number: int, period: int) -> bool:
        return number % period == 0 or number == self.steps

    def evaluates(self, number: int) -> bool:
        """Whether an evaluation follows step `number`."""
        return self._every(number, self.eval_every)

    def measures(self, number: int) -> bool:
        """Whether a measurement follows step `number`."""
        return self.measure_every is not None and self._every(number, self.measure_every)

    def saves(self, number: int) -> bool:
        """Whether a checkpoint follows step `number`: also after a measurement, which may find it the best."""
        return self._every(number, self.save_every) or self.measures(number)

    def logs(self, number: int) -> bool:
        """Whether a record follows step `number`: also before each save, so that no bad step is saved."""
        return self._every(number, self.log_every) or self.saves(number) or self.evaluates(number)

    def noted(self, up_to: int, *, evaluates: bool) -> dict[str, set[int]]:
        """Returns the steps of the records of training and of evaluation up to a step."""
        last = {self.steps} if up_to >= self.steps else set()
        evaluated = set(range(self.eval_every, up_to + 1, self.eval_every)) | last if evaluates else set()
        saved = set(range(self.save_every, up_to + 1, self.save_every))
        saved |= set(range(self.measure_every, up_to + 1, self.measure_every)) if self.measure_every else set()
        return {
            "train": set(range(self.log_every, up_to + 1, self.log_every)) | saved | evaluated | last,
            "eval": evaluated,
        }
