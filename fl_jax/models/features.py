"""What a network makes of its input before its last layer: the representation."""

from collections.abc import Callable
from typing import Any, TypeVar

import flax.linen as nn

from fl_jax.errors import FlJaxError
from fl_jax.types import Array

T = TypeVar("T")


def entering(head: str, call: Callable[[], T]) -> tuple[T, Array]:
    """What `call()` returns, and what the linen module `head` at the top of a network was given while it ran: [B, ...] to [B, features].

    head: e.g. "Dense_1" of a TabularNet. call: one of a Model's loss or predict, on which the network's mode depends.
    Raises FlJaxError where no such module was called, or several times; a network of nnx (bridge_nnx) calls none.
    """
    given: list[Array] = []

    def interceptor(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.module.path == (head,) and context.method_name == "__call__":
            given.extend((*args, *kwargs.values())[:1])
        return next_call(*args, **kwargs)

    with nn.intercept_methods(interceptor):
        result = call()
    if len(given) != 1:
        raise FlJaxError(f"The head must be called once, and {head!r} was called {len(given)} times: name a module at the top of a "
                         "flax linen network, such as 'Dense_1' of a TabularNet (an nnx network has no representation here).")
    return result, given[0].reshape(given[0].shape[0], -1)
