"""The settings of JAX that our numbers depend on, whatever a user's environment says."""

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import jax

T = TypeVar("T")


@contextlib.contextmanager
def standard() -> Iterator[None]:
    """JAX's defaults: 32-bit numbers, its usual promotion, random bits that do not depend on how an
    array is divided. Also a decorator."""
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.threefry_partitionable(True),
        jax.transfer_guard("allow"),
    ):
        yield


def each(items: Iterator[T]) -> Iterator[T]:
    """`items`, each of them made under `standard`; it does not hold between them."""
    while True:
        with standard():
            try:
                item = next(items)
            except StopIteration:
                return
        yield item
