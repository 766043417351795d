"""Strict JAX for every test: nothing is broadcast across ranks or promoted across dtypes in silence."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def strict():
    """Rank promotion raises, dtype promotion is strict."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="module")
def x64():
    """Float64 for the whole module, for tests of exact statements."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def standard_promotion():
    """JAX as users have it, for examples, and for Optax's own transformations, which mix dtypes and ranks."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
