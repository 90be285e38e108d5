"""Contrastive representation distillation: the student's embedding is told from those of all other examples."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import losses
from jaxtransfer.errors import InputError
from jaxtransfer.forward import Forward
from jaxtransfer.losses._numerics import check_share, check_temperature
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective, named_key, view_of
from jaxtransfer.objectives.distillation.teachers import Source, Teacher, peers_of
from jaxtransfer.parts.outputs import pick, shapes_of
from jaxtransfer.parts.rows import gathered, mean_of_all


def crd(
    student: Model,
    teacher: Teacher,
    *,
    examples: int,
    dim: int = 128,
    negatives: int = 16384,
    temperature: float = 0.07,
    momentum: float = 0.5,
    tap: str = "features",
    teacher_tap: str | None = None,
    view: str = "image",
) -> Objective:
    """Builds contrastive representation distillation (Tian et al. 2020, arXiv:1910.10699): see `jt.losses.crd`.

    Both networks' features pass a linear head each, which trains along, and meet in a memory of all training examples
    that lives in the state: 2 · examples · dim numbers. The batch holds each example's number as `index`:
    `dataset.with_columns({"index": np.arange(len(dataset))})`. Negatives are drawn uniformly among the other examples;
    the released code can also draw them among other classes, which needs labels. In evaluation the draw is fixed and
    the memory stays.

    Args:
      student: what trains.
      teacher: as for `distillation`.
      examples: N, how many there are; `index` is in [0, N).
      dim: of the embeddings.
      negatives: K, examples that each one is told from.
      temperature: τ.
      momentum: share of the old embedding in the memory.
      tap: the student's output [B, D] that is embedded.
      teacher_tap: the teacher's; the same name by default.
      view: the entry of the batch that both see.

    Returns:
      An objective with the metric `crd`.

    Raises:
      InputError: for counts below one, a temperature or momentum out of range; at init, without `index` in the batch or
        with one out of range, and for an output that does not exist.
    """
    for name, value in (("examples - 1", examples - 1), ("dim", dim), ("negatives", negatives)):
        if value < 1:
            raise InputError(f"crd: {name} must be at least 1; got {value}")
    check_temperature(temperature)
    check_share(momentum)
    run, source = Forward.of(student, view), Source.of(teacher, view)
    name = f"{student.name}_{tap}_crd_{source.name}"
    forwards = (run, *((source.forward,) if source.forward is not None else ()))

    def features(outputs, batch):
        mine = pick(f"student {student.name!r}", outputs[run], tap)
        return mine, source.pick(source.outputs(outputs, batch), teacher_tap or tap)

    def setup(key, batch):
        mine, other = features({forward: shapes_of(forward, batch) for forward in forwards}, batch)
        initial, keys = jax.nn.initializers.lecun_normal(), jax.random.split(named_key(key, name), 3)
        heads = {
            side: {"kernel": initial(k, (rows.shape[-1], dim)), "bias": jnp.zeros(dim)}
            for side, k, rows in zip(("student", "teacher"), keys, (mine, other), strict=False)
        }
        return {name: heads}, {name: losses.crd_memory(keys[2], examples, dim)._asdict()}

    def loss(outputs, params, state, batch, ctx):
        mine, other = features(outputs, batch)
        found = {"student": mine, "teacher": jax.lax.stop_gradient(other), "index": view_of(batch, ("index",))}
        rows, mask = gathered(found, batch, ctx)  # the memory is of the global batch

        def embed(side):
            x, head = rows[side], params[name][side]
            return x.astype(jnp.promote_types(x.dtype, jnp.float32)) @ head["kernel"] + head["bias"][None]

        key, index = ctx.shared_key(name), rows["index"]
        if key is None:  # in evaluation the draw is fixed
            key = named_key(jax.random.key(0), name)
        drawn = jax.random.randint(key, (len(index), negatives), 0, examples - 1, jnp.int32)
        drawn = drawn + (drawn >= index[:, None])  # all but the example itself
        values, memory = losses.crd(
            embed("student"),
            embed("teacher"),
            losses.CRDMemory(**state[name]),
            index,
            drawn,
            temperature=temperature,
            momentum=momentum,
            mask=mask,
        )
        total = mean_of_all(values, mask)
        return total.value, {**state, name: memory._asdict()} if ctx.train else state, {"crd": total}

    def check(outputs, batch):
        features(outputs, batch)
        if "index" not in batch:
            raise InputError(
                "crd reads the number of each example as batch['index']; add it to the data: "
                "dataset.with_columns({'index': np.arange(len(dataset))})"
            )
        index = np.asarray(batch["index"])
        if index.size and not 0 <= index.min() <= index.max() < examples:
            raise InputError(f"crd: index must be in [0, {examples}); got {index.min()} to {index.max()}")

    peers = peers_of((teacher,), student)
    return Objective("crd", forwards, loss, setup=setup, check=check, peers=peers)
