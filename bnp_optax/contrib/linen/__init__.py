"""The other methods' layers for Flax Linen."""
