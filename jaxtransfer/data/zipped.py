"""Several streams of batches as one: two domains, labelled and unlabelled examples, several tasks."""

from collections.abc import Iterator, Mapping
from typing import Any

from jaxtransfer.data.fingerprint import of_array
from jaxtransfer.data.stream import ENDLESS
from jaxtransfer.errors import InputError


def zipped(parts: Mapping[str, Any] | None = None, /, **more: Any) -> "Zipped":
    """Joins pipelines: batch i is a dict of batch i of each, by name.

        both = jt.data.zipped(source=jt.data.pipeline(source, 16), target=jt.data.pipeline(target, 8))
        both.batch(3)  # {"source": the fourth batch of the one, "target": the fourth of the other}
        jt.fit(jt.classification(model).on("source") + 0.1 * entropy(model).on("target"), optimizer, both, steps=1000)

    Each part goes through its own epochs at its own pace, and its batches may be of any size. The position is the
    number of the next batch, for all of them, so a run resumes exactly. What one of the parts forbids, such as a
    transform of images whose teacher's outputs are cached, the whole forbids. Finite parts, `jt.data.eval_batches`, are
    filled up to the longest one by batches of padding, whose mask is 0.

    Args:
      parts: by name, pipelines of `jt.data.pipeline`, evaluation batches, batches of episodes, zipped ones, or anything
        else with `batch(i)`, or with `iterate(start)`; or as keywords. All of them are finite, or none.

    Returns:
      A `Zipped`: `batch(i)`, `iterate(start)`, `fingerprint()`; with a length where its parts have one.

    Raises:
      InputError: for no parts, or what is none.
    """
    return Zipped({**(parts or {}), **more})


class Zipped:
    """Batches of several parts; made by `zipped`.

    Attributes:
      parts: the streams by name.
    """

    def __init__(self, parts: Mapping[str, Any]):
        if not parts:
            raise InputError("zipped joins one part or more, got none: zipped(source=pipeline, target=pipeline)")
        for name, part in parts.items():
            if isinstance(part, Mapping) or not (hasattr(part, "batch") or hasattr(part, "iterate")):
                made = "jt.data.pipeline(dataset, batch_size) makes one"
                raise InputError(f"zipped: {name!r} must have batch(i) or iterate(start), got {_kind(part)}; {made}")
        self.parts = dict(parts)
        lengths = {name: _length(part) for name, part in parts.items()}
        finite = [name for name, length in lengths.items() if length is not None]
        if finite and len(finite) < len(parts):
            raise InputError(
                f"zipped: {finite[0]!r} ends after {lengths[finite[0]]} batches, and others never do; join pipelines, "
                "or evaluation batches"
            )
        self._stop = max((length for length in lengths.values() if length is not None), default=None)

    @property
    def steps_per_epoch(self) -> int:
        """Batches until each example of every part was seen once: that of the largest one."""
        return max(part.steps_per_epoch for part in self.parts.values())

    def __len__(self) -> int:
        if self._stop is None:
            raise TypeError("an endless stream of batches has no length; iterate(start) gives its batches")
        return self._stop

    def __iter__(self) -> "ZippedStream":
        return self.iterate(0)

    def __repr__(self):
        return f"Zipped({', '.join(self.parts)})"

    def batch(self, i: int) -> dict[str, Any]:
        """Returns batch `i` of each part, by name."""
        return {name: _batch(part, i) for name, part in self.parts.items()}

    def iterate(self, start: int = 0) -> "ZippedStream":
        """Returns an iterator over the batches from number `start` on, which reads ahead as its parts do."""
        return ZippedStream(self, start)

    def fingerprint(self) -> dict[str, Any]:
        """What the batches are, to be compared with what they were: what each part says, under `name/`.

        Of a part that has no `fingerprint`, its first batch.
        """
        told: dict[str, Any] = {}
        for name, part in self.parts.items():
            if hasattr(part, "fingerprint"):
                found = part.fingerprint()
            else:
                first = _batch(part, 0)
                found = {"first batch": {key: of_array(value) for key, value in sorted(first.items())}}
            own = found if isinstance(found, Mapping) else {"data": found}
            told |= {f"{name}/{key}": value for key, value in own.items()}
        return told


class ZippedStream:
    """An iterator over zipped batches that knows its position; a context manager, which ends the threads of the parts.

    Attributes:
      position: number of the next batch; when one batch is one step, the step.
    """

    def __init__(self, data: Zipped, start: int):
        if start < 0:
            raise InputError(f"a position is the number of the next batch, at least 0, got {start}")
        self._data = data
        self._open(start)

    def get_state(self) -> dict[str, int]:
        """The position as a dictionary that fits into a checkpoint."""
        return {"position": self.position}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues from the position that `get_state` gave."""
        self.close()
        self._open(int(state["position"]))

    def close(self) -> None:
        """Ends the parts' threads; the iterator is then at its end."""
        for stream in self._streams.values():
            if end := getattr(stream, "close", None):
                end()
        self._ended = True

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, Any]:
        if self._ended or self.position >= self._stop:
            self.close()
            raise StopIteration
        try:
            batch = {name: next(stream) for name, stream in self._streams.items()}
        except BaseException:
            self.close()
            raise
        self.position += 1
        return batch

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _open(self, position: int) -> None:
        stop = self._data._stop
        self.position, self._stop, self._ended = position, ENDLESS if stop is None else stop, False
        self._streams = {name: _stream(part, position) for name, part in self._data.parts.items()}


def _stream(part: Any, start: int) -> Iterator[Any]:
    """The batches of a part from a position on; a finite one goes on with padding."""
    if _length(part) is None and hasattr(part, "iterate"):
        return iter(part.iterate(start))
    return _numbered(part, start)


def _numbered(part: Any, start: int) -> Iterator[Any]:
    number = start
    while True:
        yield part.batch(number)
        number += 1


def _batch(part: Any, i: int) -> Any:
    if hasattr(part, "batch"):
        return part.batch(i)
    stream = iter(part.iterate(i))
    try:
        return next(stream)
    finally:
        if end := getattr(stream, "close", None):
            end()


def _length(part: Any) -> int | None:
    """How many batches a part has; None of one without an end."""
    try:
        return len(part) if hasattr(part, "batch") else None
    except TypeError:
        return None


def _kind(part: Any) -> str:
    return f"a {type(part).__name__}"
