"""Mixtures of experts with a gate for each task: several encoders in one model."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.models.composition import composed, distinct, vectors_of
from jaxtransfer.models.linen import linen

Experts = Sequence[Model]
ALL = ""  # whose experts and gate are no task's


class Gate(nn.Module):
    """The shares of experts: the softmax of a linear layer on the flat inputs, in at least float32."""

    experts: int

    @nn.compact
    def __call__(self, x):
        """Returns the shares [B, E] for `x` [B, ...]."""
        if not hasattr(x, "ndim") or x.ndim < 2:
            raise InputError("the gates of experts read one array [B, ...], which is what the model must be given")
        x = x.reshape(x.shape[0], -1)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return {"output": nn.softmax(nn.Dense(self.experts, name="shares")(x))}


def mmoe(experts: Experts, /, **heads: Model) -> Model:
    """Returns a multi-gate mixture of experts: each task reads its own mixture of encoders that all share.

    f_k(x) = Σ_i softmax(W_k x + b_k)_i e_i(x), and the output `k` is head_k(f_k(x)). (Ma et al. 2018, "Modeling task
    relationships in multi-task learning with multi-gate mixture-of-experts", KDD.) As in LibMTL a gate reads the flat
    inputs, and has a bias.

        digits = jt.models.head(10, batch_norm=False)
        net = jt.models.mmoe([jt.models.lenet(10)] * 4, left=digits, right=digits)
        objective = jt.balance(tasks, jt.multitask.pcgrad, shared="model/expert.*")

    Its parameters are `expert0`, ..., `<task>_gate` and `<task>`; its outputs `<task>`, `<task>_features` [B, D] and
    `<task>_gate` [B, E], the shares of the experts.

    Args:
      experts: encoders that give `features` [B, D]; one object may stand there several times, each place has weights of
        its own. The result has the name of the first.
      **heads: by task.

    Raises:
      InputError: for no experts, no tasks, names that collide; at init, for features of different shapes.
    """
    return ple([(experts, ())], **heads)


def cgc(shared: Experts, own: Experts, /, **heads: Model) -> Model:
    """Returns customised gate control: each task mixes encoders that all share with encoders of its own.

    As `mmoe`, but a gate reaches the task's own experts too. (Tang et al. 2020, "Progressive layered extraction",
    RecSys.) Further parameters are `<task>_expert0`, ...; the first shares are those of `expert0`, ...

    Args:
      shared: encoders of all tasks.
      own: encoders of one task; each task has these with weights of its own.
      **heads: by task.

    Raises:
      InputError: as for `mmoe`.
    """
    return ple([(shared, own)], **heads)


def ple(levels: Sequence[tuple[Experts, Experts]], /, **heads: Model) -> Model:
    """Returns progressive layered extraction: levels of shared and own experts, mixed for each task after each level.

    (Tang et al. 2020, "Progressive layered extraction", RecSys.) A task's own experts read what its gate mixed a level
    below; the shared ones read what a gate of the experts of all tasks did. The gates of the first level read the flat
    inputs, those of the others the mixture of the level below. (LibMTL runs the shared experts anew on each task's
    mixture, and has no shared gate.) The parts of the second level are called `level2_expert0` and so on.

        encoder, middle = jt.models.lenet(10), jt.models.head(64)
        net = jt.models.ple([([encoder] * 2, [encoder]), ([middle] * 2, [middle])], left=digits, right=digits)

    Args:
      levels: pairs (shared, own) of experts: encoders in the first, models of vectors after it.
      **heads: by task.

    Raises:
      InputError: as for `mmoe`.
    """
    layers = [(tuple(shared), tuple(own)) for shared, own in levels]
    if not layers or not heads or any(not shared for shared, _ in layers):
        raise InputError("a mixture of experts needs a shared expert on each level, and a head for each task")
    tasks, parts, rooms = tuple(heads), [], []
    for number, (shared, own) in enumerate(layers, 1):
        before = "" if number == 1 else f"level{number}_"
        room = {ALL: [f"{before}expert{k}" for k in range(len(shared))]}
        parts += list(zip(room[ALL], shared, strict=True))
        for task in tasks:
            room[task] = [f"{before}{task}_expert{k}" for k in range(len(own))]
            parts += list(zip(room[task], own, strict=True))
        gates = {task: f"{before}{task}_gate" for task in tasks}
        parts += [(gate, _gate(len(shared) + len(own))) for gate in gates.values()]
        if number < len(layers):
            gates[ALL] = f"{before}gate"
            parts.append((gates[ALL], _gate(len(shared) + len(own) * len(tasks))))
        rooms.append((room, gates))
    distinct(*(name for name, _ in parts), *tasks)

    def run(call, inputs):
        reads, outputs = dict.fromkeys((ALL, *tasks), inputs), {}
        for room, gates in rooms:
            found = {part: vectors_of(part, call(part, reads[who])) for who, names in room.items() for part in names}
            mixed = {}
            for who, gate in gates.items():
                seen = [*room[ALL], *room[who]] if who in tasks else list(found)
                share = call(gate, reads[who])["output"]
                mixed[who] = _mixed(share, {part: found[part] for part in seen})
                if who in tasks:
                    outputs |= {f"{who}_features": mixed[who], f"{who}_gate": share}  # the last level's stay
            reads = mixed
        for task in tasks:
            outputs[task] = vectors_of(task, call(task, reads[task]))
        return outputs

    below = [f"level{number}_.*" for number in range(2, len(layers) + 1)]
    first = "|".join(name for name, _ in parts if not name.startswith("level"))
    stages = (first, *below, "|".join(tasks))
    return composed(layers[0][0][0], {**dict(parts), **heads}, run, stages=stages)


def _gate(experts: int) -> Model:
    return linen(Gate(experts), name="gate")


def _mixed(share: jax.Array, found: dict[str, jax.Array]) -> jax.Array:
    """Returns Σ_e share[b, e] · vectors_e[b], in the type of the vectors."""
    shapes = {part: jnp.shape(vectors) for part, vectors in found.items()}
    if len(set(shapes.values())) > 1:
        raise InputError(f"experts must give vectors of one shape to be mixed; got {shapes}")
    stacked = jnp.stack(list(found.values()))
    return jnp.einsum("eb...,be->b...", stacked, share.astype(stacked.dtype))
