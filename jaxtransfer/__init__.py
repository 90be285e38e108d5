"""Transfer learning for JAX."""
