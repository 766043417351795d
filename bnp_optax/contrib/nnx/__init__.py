"""The other methods' layers for Flax NNX."""
