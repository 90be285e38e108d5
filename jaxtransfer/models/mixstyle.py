"""MixStyle: in training, the means and spreads of feature maps are mixed between examples, of several domains say."""

import dataclasses
import re
import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model, given


def mixstyle(
    model: Model,
    *,
    after: tree.Patterns,
    probability: float = 0.5,
    alpha: float = 0.1,
    domains: int = 1,
    epsilon: float = 1e-6,
) -> Model:
    """Returns the model with MixStyle after some of its layers; its weights are the same.

    (Zhou et al. 2021, arXiv:2104.02008.) x̂ᵢ = (λσᵢ + (1 − λ)σⱼ) (xᵢ − μᵢ)/σᵢ + λμᵢ + (1 − λ)μⱼ, where μ and σ are the
    mean and the standard deviation over the positions of an example's map, channel by channel, and j is an example that
    a permutation of the global batch gives it. λ is drawn for each example from Beta(α, α). Style is what varies
    between domains, so styles between those of the sources are seen in training. As in the authors' code each layer
    draws once for the batch whether it mixes at all, σ² is the unbiased variance plus ε, and no gradient flows through
    μ and σ. Inference is that of the model.

        model = jt.models.mixstyle(jt.models.resnet18(7), after=("stage1_block2", "stage2_block2"))
        erm = sum(jt.classification(model).on(name) for name in names) / len(names)
        objective = jt.together(erm)  # the batch of the model holds all domains

    All devices draw alike. Wrap a model last, around `with_heads` and not inside.

    Args:
      model: one of Flax Linen, such as those of `jt.models`.
      after: path patterns of the layers whose outputs [B, H, W, C] are mixed; a pattern matches a layer's whole path.
      probability: that a layer mixes in a step.
      alpha: α > 0; small values leave most styles nearly alone.
      domains: 1 permutes the whole batch. S says that the rows of the batch are of S domains by turns, as `together`
        joins S views of one size: each example is then mixed with one of another domain ("cross-domain").
      epsilon: ε.

    Raises:
      InputError: for a probability outside of [0, 1], α or ε that isn't positive, no domain; in training, where no
        layer matches, an output is no batch of maps, or the rows don't divide by the domains.
    """
    if not 0 <= probability <= 1:
        raise InputError(f"probability must be in [0, 1]; got {probability}")
    if not alpha > 0 or not epsilon > 0 or domains < 1:
        raise InputError(f"mixstyle needs alpha > 0, epsilon > 0, domains >= 1; got {alpha}, {epsilon}, {domains}")
    patterns = tree.as_patterns(after)

    def apply(variables, inputs, *, train, key, axis=None, still=None):
        if not train:
            return model.apply(variables, inputs, train=False, key=key, **given(axis=axis, still=still))
        if key is None:
            raise InputError(f"model {model.name!r} draws (mixstyle) when training: pass a key; got key=None")
        own = key if axis is None or model.shares_key else jax.random.fold_in(key, jax.lax.axis_index(axis))
        styles = _Styles(key, patterns, probability, alpha, domains, epsilon, axis)
        with nn.intercept_methods(styles.intercept):
            outputs = model.apply(variables, inputs, train=True, key=own, **given(axis=axis, still=still))
        if not styles.met:
            raise InputError(
                f"mixstyle: no layer of model {model.name!r} matches {', '.join(patterns)}; it has "
                f"{', '.join(dict.fromkeys(styles.seen)) or 'no layers of Flax Linen'}"
            )
        return outputs

    return dataclasses.replace(model, apply=apply, shares_key=True).made_from(model.recipe)


@dataclasses.dataclass
class _Styles:
    """Intercepts the layers of one forward pass in training."""

    key: jax.Array
    patterns: tuple[str, ...]
    probability: float
    alpha: float
    domains: int
    epsilon: float
    axis: str | None
    met: bool = False
    seen: list[str] = dataclasses.field(default_factory=list)

    def intercept(self, call, args, kwargs, context) -> Any:
        found = call(*args, **kwargs)
        path = "/".join(context.module.path)
        if context.method_name != "__call__" or not path:
            return found
        self.seen.append(path)
        if not any(re.fullmatch(pattern, path) for pattern in self.patterns):
            return found
        self.met = True
        return self.mixed(found, path)

    def mixed(self, x: Any, path: str) -> jax.Array:
        """Returns maps of mixed styles, or as they are, as it is drawn for the layer."""
        if jnp.ndim(x) != 4:
            raise InputError(f"mixstyle mixes maps [B, H, W, C]; layer {path!r} gives {jax.tree.map(jnp.shape, x)}")
        maps = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        count = max(x.shape[1] * x.shape[2] - 1, 1)
        mean = jnp.mean(maps, (1, 2))
        spread = jnp.sqrt(jnp.sum(jnp.square(maps - mean[:, None, None]), (1, 2)) / count + self.epsilon)
        styles = jax.lax.stop_gradient(jnp.stack([mean, spread], 1))  # [B, 2, C]
        every = styles if self.axis is None else jax.lax.all_gather(styles, self.axis, tiled=True)
        keys = jax.random.split(jax.random.fold_in(self.key, zlib.crc32(path.encode())), 3)
        partner = self.partners(keys[0], len(every))
        share = jax.random.beta(keys[1], self.alpha, self.alpha, (len(every), 1, 1)).astype(maps.dtype)
        share = jnp.where(jax.random.bernoulli(keys[2], self.probability), share, 1)
        target = share * every + (1 - share) * every[partner]
        if self.axis is not None:  # all devices draw for the whole batch, and each keeps its own rows
            first = len(x) * jax.lax.axis_index(self.axis)
            target = jax.lax.dynamic_slice_in_dim(target, first, len(x))
        own, new = styles[:, :, None, None], target[:, :, None, None]
        mixed = (maps - own[:, 0]) / own[:, 1] * new[:, 1] + new[:, 0]
        return mixed.astype(x.dtype)

    def partners(self, key: jax.Array, rows: int) -> jax.Array:
        """Returns the number of the example whose style each one is mixed with, a permutation [B]."""
        if self.domains == 1:
            return jax.random.permutation(key, rows)
        if rows % self.domains:
            raise InputError(f"mixstyle: {rows} rows don't divide into {self.domains} domains of one size")
        keys = jax.random.split(key)
        numbers = jnp.arange(rows).reshape(-1, self.domains)
        numbers = jax.random.permutation(keys[0], numbers, axis=0, independent=True)  # within each domain
        turn = jax.random.randint(keys[1], (), 1, self.domains)
        return jnp.roll(numbers, turn, axis=1).reshape(-1)
