"""When a run logs, evaluates and saves."""

from typing import NamedTuple


class Plan(NamedTuple):
    """When to log, evaluate and save; a function of the step alone, so a resumed run does it at the same steps."""

    steps: int
    eval_every: int
    save_every: int
    log_every: int
    together: int  # steps in one call; the periods are multiples of it

    @classmethod
    def of(cls, steps, eval_every, save_every, log_every, evaluates, together=1) -> "Plan":
        """Returns the plan of so many steps; a period that is None gets its default."""
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
        )

    def size(self, number: int) -> int:
        """Steps of the call that follows step `number`."""
        return min(self.together - number % self.together, self.steps - number)

    def _every(self, number: int, period: int) -> bool:
        return number % period == 0 or number == self.steps

    def evaluates(self, number: int) -> bool:
        """Whether an evaluation follows step `number`."""
        return self._every(number, self.eval_every)

    def saves(self, number: int) -> bool:
        """Whether a checkpoint follows step `number`."""
        return self._every(number, self.save_every)

    def logs(self, number: int) -> bool:
        """Whether a record follows step `number`: also before each save, so that no bad step is saved."""
        return self._every(number, self.log_every) or self.saves(number) or self.evaluates(number)

    def noted(self, up_to: int, *, evaluates: bool) -> dict[str, set[int]]:
        """Returns the steps of the records of training and of evaluation up to a step."""
        last = {self.steps} if up_to >= self.steps else set()
        evaluated = set(range(self.eval_every, up_to + 1, self.eval_every)) | last if evaluates else set()
        saved = set(range(self.save_every, up_to + 1, self.save_every))
        return {
            "train": set(range(self.log_every, up_to + 1, self.log_every)) | saved | evaluated | last,
            "eval": evaluated,
        }
