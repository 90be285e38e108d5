"""Virtual adversarial training on the target."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import losses
from jaxtransfer.adaptation.domain import Domain
from jaxtransfer.context import Context, named_key
from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import check_strength, check_temperature
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective, view_of
from jaxtransfer.parts.masking import mask_of
from jaxtransfer.parts.outputs import pick


def vat(
    model: Model,
    *,
    radius: float = 8.0,
    iterations: int = 1,
    xi: float | None = None,
    output: str = "logits",
    view: str = "image",
    target: str = "target",
) -> Objective:
    """Builds KL(p(x) ‖ p(x + r)) on the target, r the direction of length ε that changes p most (Miyato et al. 2018).

    arXiv:1704.03976; see `jt.losses.vat`. The model runs again on the moved inputs, in training mode, and these runs
    leave its statistics as they are. It drops in them what it drops in the run that stands alone. With entropy
    minimisation it is VADA (Shu et al. 2018) without its discriminator:

        objective = jt.classification(model).on("source") + jt.adaptation.vat(model) + 0.1 * jt.adaptation.tent(model)

    Args:
      model: what trains.
      radius: ε, in the units of the inputs: 8 is much for images in [0, 1] and little for ones of unit variance.
      iterations: of the search for r.
      xi: None, or the step of finite differences of the released code.
      output: the model's output that holds the logits [B, C].
      view: the entry of the target's batch, floating, or uint8, which is taken as its 255th.
      target: the entry of the batch that holds the target's, with `mask` where examples are left out.

    Returns:
      An objective with the metric `vat`.

    Raises:
      InputError: for numbers out of range; at init, for a batch without the target, and inputs that are no numbers to
        be moved.
    """
    check_strength(radius, "radius")
    if iterations < 1:
        raise InputError(f"vat needs an iteration or more; got {iterations}")
    if xi is not None:
        check_temperature(xi, "xi")
    domain = Domain.of(model, target, view)
    name = f"{model.name}_{target}_vat"

    def loss(outputs, params, state, batch, ctx):
        part = domain.part(batch)
        inputs, mask = view_of(part, (view,)), mask_of(part)
        if inputs.dtype == jnp.uint8:
            inputs = inputs.astype(jnp.float32) / 255

        def forward(x):
            found, _ = ctx.run(model, params, state, x, view=f"{target}/{view}")
            return pick(f"model {model.name!r}", found, output)

        values = losses.vat(
            inputs, _noise(inputs, name, ctx), forward=forward, radius=radius, iterations=iterations, xi=xi, mask=mask
        )
        value = ctx.mean(values, mask)
        return value.value, state, {"vat": value}

    def check(outputs, batch):
        inputs = view_of(domain.part(batch), (view,))
        if not hasattr(inputs, "dtype") or not (inputs.dtype == np.uint8 or jnp.issubdtype(inputs.dtype, jnp.floating)):
            raise InputError(f"vat moves its inputs, batch[{target!r}][{view!r}]: images or other floating numbers")
        domain.read(outputs, output)

    return Objective("vat", (domain.forward,), loss, check=check, pooled=True)


def _noise(inputs: jax.Array, name: str, ctx: Context) -> jax.Array:
    """Returns normal numbers like the inputs, of each row's own key: the same on any devices."""
    key = ctx.shared_key(name)
    if key is None:  # in evaluation the draw is fixed
        key = named_key(jax.random.key(0), name)
    first = 0 if ctx.axis is None else len(inputs) * jax.lax.axis_index(ctx.axis)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(first + jnp.arange(len(inputs)))
    dtype = jnp.promote_types(inputs.dtype, jnp.float32)
    return jax.vmap(lambda own: jax.random.normal(own, inputs.shape[1:], dtype))(keys)
