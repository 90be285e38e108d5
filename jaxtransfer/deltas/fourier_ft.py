"""FourierFT: a few entries of the difference's spectrum."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.deltas.part import Part, check_whole, described, leafwise
from jaxtransfer.errors import InputError

Places = Callable[..., Any]


@described
def fourier_ft(entries: int, *, scale: float = 150.0, seed: int = 0, places: Places | None = None) -> Part:
    """Returns W + s · Re(F⁻¹ S), S with n entries that train (Gao et al. 2024, arXiv:2405.03003).

    F⁻¹ is the inverse discrete Fourier transform in two dimensions, divided by I · O. The entries are drawn once for
    each shape of a matrix; they begin as zeros, so the function is the base's to the bit.

    Args:
      entries: n, of each matrix.
      scale: s; peft's by default.
      seed: of the places.
      places: `places(O, I) -> [n]`, integers o · I + i, in place of drawn ones.

    Raises:
      InputError: for n below 1; on a base for more entries than a matrix has, and for places that it has not.
    """
    check_whole(entries, "fourier_ft: the number of entries")

    def fixed(weight):
        size = weight.rows * weight.columns
        if entries > size:
            raise InputError(f"fourier_ft: {weight.path!r} has {size} entries, fewer than {entries}")
        if places is not None:
            chosen = np.asarray(places(weight.columns, weight.rows))
            if (
                chosen.shape != (entries,)
                or set(chosen.tolist()) - set(range(size))
                or len(set(chosen.tolist())) < entries
            ):
                raise InputError(
                    f"fourier_ft: the places of {weight.path!r} must be {entries} integers from 0 to {size - 1}, each "
                    f"once; got {chosen.tolist()[:6]}"
                )
            return {"places": jnp.asarray(chosen, jnp.int32)}
        return {"places": jax.random.permutation(jax.random.key(seed), size)[:entries].astype(jnp.int32)}

    def merge(weight, own, read):
        shape = (weight.columns, weight.rows)
        spectrum = jnp.zeros(weight.rows * weight.columns, weight.dtype).at[read["places"]].set(own["spectrum"])
        return weight.value + weight.shaped(scale * jnp.fft.ifft2(spectrum.reshape(shape)).real.T)

    return leafwise(lambda key, weight: {"spectrum": jnp.zeros(entries, weight.dtype)}, merge, fixed=fixed)
