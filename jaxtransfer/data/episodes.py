"""Episodes of few-shot learning: N ways, K shots, drawn on the host or inside the compiled step."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtransfer.data.dataset import Dataset, check_dataset
from jaxtransfer.data.fingerprint import fingerprint
from jaxtransfer.data.pipeline import held, host_rows
from jaxtransfer.data.stream import ENDLESS, Stream
from jaxtransfer.data.transform import Rows
from jaxtransfer.errors import InputError

_CLASSES, _EPISODE = 3, 4  # first words of a seed, beside those of the pipelines
RIGHT_ANGLES = (0, 1, 2, 3)


@dataclass(frozen=True, eq=False)
class Episodes:
    """How episodes are drawn from a labelled data set; the face of a host pipeline and of a sampler on the device.

    An episode has `ways` classes, drawn without replacement and numbered 0 to ways - 1 in the order drawn, `shots`
    support examples of each and ways · queries query examples, none of them twice and none of them in the support.

    Attributes:
      dataset: labelled images; its classes are those that have examples.
      ways: classes of an episode, N, at least 2.
      shots: support examples per class, K.
      queries: query examples per class, exactly, or with `balance` on average.
      tasks: episodes of a batch, T, over all hosts.
      rotations: multiples of 90°, each once, that make a class each: `RIGHT_ANGLES` is the protocol of Omniglot
        (Santoro et al. 2016, arXiv:1605.06065), which gives four times as many classes.
      balance: None for as many queries of each class; else the concentration α of a Dirichlet distribution over the
        classes: each query's class is drawn by it, however many examples a class has, then an example of the class
        (unbalanced queries, Veilleux et al. 2021, arXiv:2204.11181; α = 2 there). A class whose examples are used up
        leaves its further queries to the others.
      seed: of the episodes; on the device the step's key takes its place.

    Raises:
      InputError: names the class that has too few examples, or says how many classes there are.
    """

    dataset: Dataset
    ways: int
    shots: int
    queries: int = 15
    tasks: int = 1
    rotations: tuple[int, ...] = (0,)
    balance: float | None = None
    seed: int = 0

    def __post_init__(self):
        check_dataset(self.dataset, "Episodes")
        for name, least in (("ways", 2), ("shots", 1), ("queries", 1), ("tasks", 1)):
            if (value := getattr(self, name)) < least:
                raise InputError(f"episodes need {name} of at least {least}, got {value}")
        if self.seed < 0 or (self.balance is not None and not self.balance > 0):
            raise InputError(f"episodes need seed >= 0 and balance > 0, got {self.seed} and {self.balance}")
        if not self.rotations or any(turn not in RIGHT_ANGLES for turn in self.rotations):
            raise InputError(f"rotations are quarter turns out of {RIGHT_ANGLES}, got {self.rotations}")
        if len(set(self.rotations)) < len(self.rotations):
            raise InputError(f"each rotation makes classes of its own and is named once, got {self.rotations}")
        height, width, _ = self.dataset.image_shape
        if height != width and any(turn % 2 for turn in self.rotations):
            raise InputError(f"quarter turns need square images, got {height} × {width}")
        title = f"{self.dataset.name} ({self.dataset.split})"
        if self.classes < self.ways:
            raise InputError(f"{title} has {self.classes} classes with examples, {self.ways} ways asked; ask for fewer")
        needed = self.shots + self.queries
        short = int(np.argmin(self.counts))
        if (have := int(self.counts[short])) < needed:
            label = self.dataset.labels[self.members[short][0]]
            raise InputError(
                f"{title}: class {self.dataset.class_names[label]!r} has {have} examples, an episode takes {needed} "
                f"({self.shots} shots and {self.queries} queries); ask for fewer, or leave the class out"
            )

    @property
    def classes(self) -> int:
        """Number of classes, each rotation one of its own."""
        return len(self.members) * len(self.rotations)

    @functools.cached_property
    def members(self) -> list[np.ndarray]:
        """The numbers of the examples of each class that has any."""
        order = np.argsort(self.dataset.labels, kind="stable")
        starts = np.flatnonzero(np.diff(self.dataset.labels[order], prepend=-1))
        return np.split(order, starts[1:]) if len(order) else []

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """Examples of each class, int32."""
        return np.array([len(rows) for rows in self.members], np.int32)

    def batches(self, *, cache: str | None = "auto", threads: int = 2, prefetch: int = 4, shard=None):
        """Returns the host pipeline: an endless stream of batches of T episodes, batch i a function of (seed, i).

        Args:
          cache: as in `jt.data.pipeline`, without "device".
          threads: threads that make batches; 0 makes each when it is asked for.
          prefetch: batches made ahead.
          shard: (index, count) of this host, which gets T / count of the episodes; JAX's by default.

        Returns:
          An `EpisodeBatches`: `batch(i)`, `iterate(start)`. A batch is `{"support": {"image": uint8 [T, N·K, H, W,
          C], "label": int32 [T, N·K]}, "query": {"image": [T, N·Q, H, W, C], "label": [T, N·Q]}}`, rows by class.
        """
        return EpisodeBatches(self, ENDLESS, held(self.dataset, cache), threads, prefetch, shard)

    def test_set(
        self, count: int = 1000, *, cache: str | None = "auto", threads: int = 2, prefetch: int = 4, shard=None
    ):
        """Returns a fixed, finite set of `count` episodes in batches of T; it can be iterated again and again.

        Args:
          count: number of episodes, a multiple of `tasks`.
          cache: as for `batches`.
          threads: likewise.
          prefetch: likewise.
          shard: likewise.

        Raises:
          InputError: where `count` does not divide by `tasks`.
        """
        if count < 1 or count % self.tasks:
            raise InputError(
                f"{count} episodes don't divide into batches of {self.tasks}; choose a divisor as the tasks"
            )
        return EpisodeBatches(self, count // self.tasks, held(self.dataset, cache), threads, prefetch, shard)

    def on_device(self) -> tuple[Any, Callable[[Any, Any], Any]]:
        """Returns `(data, sample)`: the images on the device, and `sample(key, data)`, which draws a batch of them.

        `sample` is pure and runs inside the compiled step, from which several steps can then run in one call:
        `jt.train_step(objective, optimizer, sample=sample, steps_per_call=100)(state, data)`. `data` holds `image`
        uint8 [N, H, W, C], sorted by class, and `start` and `count` int32 [classes].
        """
        import jax

        order = np.concatenate(self.members)
        images = self.dataset.decoded().read(order)["image"]
        start = (np.cumsum(self.counts) - self.counts).astype(np.int32)
        data = {"image": images, "start": start, "count": self.counts}
        return jax.device_put(data), functools.partial(_sample, self._plan)

    @property
    def _plan(self) -> "_Plan":
        most = int(self.counts.max())
        return _Plan(self.ways, self.shots, self.queries, self.tasks, self.rotations, self.balance, most)


class EpisodeBatches:
    """Batches of episodes by their number; made by `Episodes.batches` and `Episodes.test_set`.

    Attributes:
      episodes: how they are drawn.
      batch_size: T, the episodes of a batch over all hosts.
    """

    def __init__(self, episodes: Episodes, stop: int, dataset: Dataset, threads: int, prefetch: int, shard):
        if threads < 0 or prefetch < 1:
            raise InputError(f"needs threads >= 0 and prefetch >= 1, got {threads} and {prefetch}")
        self.episodes, self.batch_size = episodes, episodes.tasks
        host_rows(episodes.tasks, shard or (0, 1))  # raises
        self._shard, self._stop = shard, stop
        self._dataset, self._threads, self._prefetch = dataset, threads, prefetch

    def __len__(self) -> int:
        if self._stop == ENDLESS:
            raise TypeError("an endless stream of episodes has no length; iterate(start) gives its batches")
        return self._stop

    def __iter__(self) -> Stream:
        return self.iterate(0)

    def iterate(self, start: int = 0) -> Stream:
        """Returns an iterator over the batches from number `start` on, with `position`, `get_state` and `close`."""
        part = functools.partial(self._part, host_rows(self.batch_size, self._shard))  # of who iterates, in all threads
        return Stream(part, start, self._stop, self._threads, self._prefetch)

    def fingerprint(self) -> dict[str, Any]:
        """What the episodes are, to be compared with what they were: the data set's fingerprint and how they are drawn.

        Returns:
          By part, JSON types.
        """
        own = self.episodes
        drawn = {name: getattr(own, name) for name in ("ways", "shots", "queries", "tasks", "balance")}
        rotations = list(own.rotations)
        return {
            **fingerprint(self._dataset),
            **drawn,
            "rotations": rotations,
            "data seed": own.seed,
            "stop": self._stop,
        }

    def batch(self, i: int) -> dict[str, dict[str, np.ndarray]]:
        """Returns this host's episodes of batch `i`."""
        return self._part(host_rows(self.batch_size, self._shard), i)

    def _part(self, own: Rows, i: int) -> dict[str, dict[str, np.ndarray]]:
        if not 0 <= i < self._stop:
            raise InputError(f"batches of episodes are numbered from 0 to {self._stop - 1}, got {i}")
        tasks = [self._episode(int(i), task) for task in range(own.start, own.stop)]
        return {
            part: {key: np.stack([task[part][key] for task in tasks]) for key in ("image", "label")}
            for part in ("support", "query")
        }

    def _episode(self, i: int, task: int):
        own = self.episodes
        rng = np.random.default_rng([_EPISODE, own.seed, i, task])
        chosen = rng.choice(own.classes, own.ways, replace=False)
        kinds, turns = chosen % len(own.members), np.array(own.rotations)[chosen // len(own.members)]
        orders = [rng.permutation(own.members[kind]) for kind in kinds]
        support = [(way, row) for way in range(own.ways) for row in orders[way][: own.shots]]
        rest = [(way, row) for way in range(own.ways) for row in orders[way][own.shots :]]
        if own.balance is None:
            query = [(way, row) for way in range(own.ways) for row in orders[way][own.shots :][: own.queries]]
        else:  # the first ones by clocks, which ring at the rate of each class until it has no examples left
            weight = np.maximum(rng.dirichlet(np.full(own.ways, own.balance)), 1e-30)
            waits = [rng.exponential(size=len(order) - own.shots) for order in orders]
            rings = np.concatenate([np.cumsum(wait) / w for wait, w in zip(waits, weight, strict=True)])
            ranks = np.argsort(rings, kind="stable")
            query = [rest[rank] for rank in np.sort(ranks[: own.ways * own.queries])]
        return {"support": self._read(support, turns), "query": self._read(query, turns)}

    def _read(self, pairs, turns):
        ways, rows = np.array(pairs).T
        image = self._dataset.read(rows)["image"]
        image = np.stack([np.rot90(x, turn) for x, turn in zip(image, turns[ways], strict=True)])
        return {"image": image, "label": ways.astype(np.int32)}


def split_classes(dataset: Dataset, sizes: tuple[int, ...], *, seed: int | None = 0) -> tuple[Dataset, ...]:
    """Splits a data set by classes, so that the classes of one part are new to the others.

    Args:
      dataset: labelled images; classes without an example are left out.
      sizes: classes of each part; those that remain are in none.
      seed: of the order of the classes; None takes them as they are numbered.

    Returns:
      A data set for each size, with the class names of the whole, so that labels mean the same in all.

    Raises:
      InputError: where there are fewer classes.
    """
    present = np.unique(dataset.labels)
    if min(sizes, default=0) < 1 or sum(sizes) > len(present):
        raise InputError(
            f"{dataset.name} ({dataset.split}) has {len(present)} classes with examples; expected parts of at least 1 "
            f"class that add up to at most that, got {tuple(sizes)}"
        )
    if seed is not None:
        present = np.random.default_rng([_CLASSES, seed]).permutation(present)
    parts = np.split(present, np.cumsum(sizes))[: len(sizes)]
    return tuple(dataset.select(np.flatnonzero(np.isin(dataset.labels, part))) for part in parts)


@dataclass(frozen=True)
class _Plan:
    """The static numbers of a sampler."""

    ways: int
    shots: int
    queries: int
    tasks: int
    rotations: tuple[int, ...]
    balance: float | None
    most: int


def _sample(plan: _Plan, key, data):
    import jax
    import jax.numpy as jnp

    kinds = data["start"].shape[0]

    def episode(key):
        keys = jax.random.split(key, 4)
        chosen = jax.lax.top_k(jax.random.uniform(keys[0], (kinds * len(plan.rotations),)), plan.ways)[1]
        kind, turn = chosen % kinds, jnp.array(plan.rotations)[chosen // kinds]
        column = jnp.arange(plan.most)[None]
        draws = jax.random.uniform(keys[1], (plan.ways, plan.most))
        order = jnp.argsort(jnp.where(column < data["count"][kind][:, None], draws, 2.0), axis=1)
        rows = data["start"][kind][:, None] + order
        ways = jnp.arange(plan.ways)

        def read(way, row):
            image = jnp.take(data["image"], row, axis=0)
            turned = jnp.stack([jnp.rot90(image, quarter, axes=(1, 2)) for quarter in plan.rotations])
            pick = jnp.argmax(turn[way][None] == jnp.array(plan.rotations)[:, None], axis=0)
            return {"image": turned[pick, jnp.arange(len(row))], "label": way.astype(jnp.int32)}

        support = read(jnp.repeat(ways, plan.shots), rows[:, : plan.shots].reshape(-1))
        if plan.balance is None:
            rest = rows[:, plan.shots : plan.shots + plan.queries]
            return {"support": support, "query": read(jnp.repeat(ways, plan.queries), rest.reshape(-1))}
        weight = jnp.maximum(jax.random.dirichlet(keys[2], jnp.full(plan.ways, plan.balance)), 1e-30)
        waits = jax.random.exponential(keys[3], (plan.ways, plan.most - plan.shots))
        there = column[:, plan.shots :] < data["count"][kind][:, None]
        rings = jnp.where(there, jnp.cumsum(waits, axis=1) / weight[:, None], jnp.inf)
        first = jnp.sort(jnp.argsort(rings.reshape(-1))[: plan.ways * plan.queries])
        way = first // rings.shape[1]
        return {"support": support, "query": read(way, rows[way, plan.shots + first % rings.shape[1]])}

    return jax.vmap(episode)(jax.random.split(key, plan.tasks))
