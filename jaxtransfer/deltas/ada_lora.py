"""AdaLoRA: directions with a weight each, of which a budget keeps the important ones, whichever layer they are in."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtransfer import tree
from jaxtransfer.deltas.lora import dropping, scale_of
from jaxtransfer.deltas.part import Part, check_rank, described, leafwise
from jaxtransfer.errors import InputError
from jaxtransfer.objective import Mean, Objective
from jaxtransfer.parts.extra_arguments import taking


@described
def ada_lora(rank: int, *, alpha: float | None = None, dropout: float = 0.0) -> Part:
    """Returns W + s · a diag(e) b, with a [I, r], e [r], b [r, O] (Zhang et al. 2023, arXiv:2303.10512).

    a and b are drawn from N(0, 0.02²), e begins as zeros: the function is the base's to the bit. `within_budget` makes
    e zero where a direction matters little; `orthogonality` keeps a and b near orthonormal, as the paper does.

    Args:
      rank: r that each matrix begins with, 1.5 times what it is to have in the end, in the paper.
      alpha: s = α/r; r by default.
      dropout: as for `lora`.

    Raises:
      InputError: as `lora` does.
    """
    scale = scale_of(rank, alpha)

    def init(key, weight):
        check_rank(rank, weight)
        first, second = jax.random.split(key)
        return {
            "a": 0.02 * jax.random.normal(first, (weight.rows, rank), weight.dtype),
            "e": jnp.zeros(rank, weight.dtype),
            "b": 0.02 * jax.random.normal(second, (rank, weight.columns), weight.dtype),
        }

    def merge(weight, own):
        return weight.value + weight.shaped(scale * (own["a"] * own["e"][None]) @ own["b"])

    return leafwise(init, merge, drop=dropping(dropout))


def orthogonality(*, strength: float = 0.1) -> Objective:
    """Builds strength · mean (‖aᵀa − I‖² + ‖bbᵀ − I‖²) over the directions of all `ada_lora`.

    Args:
      strength: γ of the paper.

    Raises:
      InputError: in use, where nothing that trains is one.
    """

    def loss(outputs, params, state, batch, ctx):
        leaves = tree.leaves_by_path(params)
        above = _triples(leaves, "orthogonality")
        terms = [_from_one(leaves[f"{p}a"].T) + _from_one(leaves[f"{p}b"]) for p in above]
        value = strength * jnp.mean(jnp.stack(terms))
        return value, state, {"orthogonality": Mean(value, jnp.ones((), value.dtype))}

    return Objective("orthogonality", (), loss)


def _from_one(rows: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(rows @ rows.T - jnp.eye(rows.shape[0], dtype=rows.dtype)))


class Budget(NamedTuple):
    """The state of `within_budget`.

    Attributes:
      step: updates so far.
      importance: moving averages of |w ∂L/∂w|, by path.
      doubt: moving averages of how far it is from them.
      inner_state: of the optimiser.
    """

    step: Any
    importance: Any
    doubt: Any
    inner_state: Any


def within_budget(
    optimizer: optax.GradientTransformation,
    *,
    rank: float,
    steps: int,
    begin: int,
    settle: int,
    every: int = 1,
    decay: float = 0.85,
    decay_doubt: float = 0.85,
) -> optax.GradientTransformationExtraArgs:
    """Lets an optimiser keep the most important directions of all `ada_lora` alone, ever fewer of them.

    A direction's importance is s(e) + mean s(a) + mean s(b), with s = Ī · Ū, the moving averages of I = |w ∂L/∂w| and
    of |I − Ī|, w after the update. Of n directions in all

        n̄ + (n − n̄)(1 − (t − begin) / (steps − settle − begin))³

    stay, n̄ = `rank` for each matrix; the e of the others is set to zero, from which it may come back until update
    steps − settle. After that the importance stays as it is. As in peft; the state is that of the optimiser, so a run
    goes on exactly.

    Args:
      optimizer: makes the updates.
      rank: the mean rank in the end.
      steps: updates of the run.
      begin: updates before the budget falls.
      settle: updates at the end with the last budget.
      every: updates between two cuts while it falls.
      decay: of Ī.
      decay_doubt: of Ū.

    Raises:
      InputError: for numbers out of range; at its init, where no parameter is an `ada_lora`'s, or the rank is above
        theirs.
    """
    if not 0 <= begin < steps - settle or settle < 0 or every < 1 or rank <= 0:
        raise InputError(
            f"the budget falls from begin to steps − settle, cut every 1 or more, to a positive rank; got "
            f"begin={begin}, steps={steps}, settle={settle}, every={every}, rank={rank}"
        )
    if not (0 < decay < 1 and 0 < decay_doubt < 1):
        raise InputError(f"the decays must be in (0, 1); got {decay} and {decay_doubt}")
    inner = taking(optimizer)

    def parts(params):
        leaves = tree.leaves_by_path(params)
        return leaves, {f"{above}{name}" for above in _triples(leaves, "within_budget") for name in "aeb"}

    def init(params) -> Any:
        leaves, own = parts(params)
        above = _triples(leaves, "within_budget")
        if rank * len(above) > sum(leaves[f"{p}e"].size for p in above):
            raise InputError(f"within_budget: a mean rank of {rank} is above that of the parameters")
        zeros = {path: jnp.zeros_like(leaves[path]) for path in own}
        return Budget(jnp.zeros((), jnp.int32), zeros, dict(zeros), inner.init(params))

    def update(updates, state, params=None, **extra):
        if params is None:
            raise InputError("within_budget needs the parameters: optimizer.update(grads, state, params)")
        gradients = tree.leaves_by_path(updates)
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra)
        after = tree.leaves_by_path(optax.apply_updates(params, updates))
        step, moving = state.step + 1, state.step + 1 < steps - settle
        importance, doubt = {}, {}
        for path in state.importance:
            now = jnp.abs(after[path] * gradients[path])
            mean = decay * state.importance[path] + (1 - decay) * now
            off = decay_doubt * state.doubt[path] + (1 - decay_doubt) * jnp.abs(now - mean)
            importance[path] = jnp.where(moving, mean, state.importance[path])
            doubt[path] = jnp.where(moving, off, state.doubt[path])
        kept = _kept(importance, doubt, step)

        def cut(key_path, change, leaf):
            path = tree.path_of(key_path)
            return jnp.where(kept[path], change, -leaf).astype(change.dtype) if path in kept else change

        updates = jax.tree_util.tree_map_with_path(cut, updates, params)
        return updates, Budget(step, importance, doubt, inner_state)

    def _kept(importance, doubt, step):
        scores = {path: importance[path] * doubt[path] for path in importance}
        whole = {
            f"{p}e": scores[f"{p}e"] + scores[f"{p}a"].mean(0) + scores[f"{p}b"].mean(1)
            for p in _triples(scores, "within_budget")
        }
        ranked = jnp.sort(jnp.concatenate(list(whole.values())))
        last = round(rank * len(whole))
        left = jnp.clip(1 - (step - begin) / (steps - settle - begin), 0, 1)
        budget = jnp.floor((ranked.size - last) * left**3 + last).astype(jnp.int32)
        settled, falling = step > steps - settle, (step > begin) & (step % every == 0)
        budget = jnp.where(settled, last, jnp.where(falling, budget, ranked.size))
        least = jnp.where(budget < ranked.size, ranked[jnp.maximum(ranked.size - budget - 1, 0)], -jnp.inf)
        return {path: score > least for path, score in whole.items()}

    return optax.GradientTransformationExtraArgs(init, update)


def _triples(leaves: Any, what: str) -> list[str]:
    """Returns the paths, up to the last slash, under which a, e and b stand."""
    found = [path[:-1] for path in leaves if path.split("/")[-1] == "e"]
    found = [above for above in found if f"{above}a" in leaves and f"{above}b" in leaves]
    if not found:
        raise InputError(f"{what}: no parameter is an ada_lora's; there are {tree.listed(leaves)}")
    return found
