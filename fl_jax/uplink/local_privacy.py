"""Local differential privacy: a message is private before anybody sees it."""

import jax
import jax.numpy as jnp
import optax

from fl_jax import clipping, mechanism
from fl_jax.norms import refuse_statistics
from fl_jax.types import Array, Key, Metrics, PyTree, Uplink


def local_dp(clip: float | Array, noise_multiplier: float) -> Uplink:
    """Local differential privacy: the site clips its message to an L2 norm of `clip` and adds Gaussian noise of standard deviation
    noise_multiplier clip to every coordinate, before anybody sees it (Dwork & Roth 2014, section 12.1, with the Gaussian mechanism of A.1).

    Guarantee: one message is one Gaussian mechanism for replacing everything that the site holds by anything else. The unit is one
    client's message in one round, the sensitivity 2 clip, that of two opposite messages: `event` states noise over `clip`, and is one of
    replace-one, which doubles it; under add-or-remove-one it is infinite, since who sends is seen. It holds against the server and all
    who read the message, so that neither sampling nor other clients' noise amplifies it. A message that is not finite is zero and gets
    noise as well: that it is left out would be seen. Not covered: metrics (here "message_clipped", 1 where the message was cut), numbers
    of records as weights (sampling.equal has none), and that a site is left out whose kept state is not finite.
    """
    mechanism.check(clip, noise_multiplier)
    rule = clipping.constant(clip)

    def init(shared: PyTree) -> tuple[()]:
        refuse_statistics(shared)
        return ()

    def apply(key: Key, state: tuple[()], message: PyTree) -> tuple[PyTree, tuple[()], Metrics]:
        bound = rule.bound(state)
        clipped, norm = clipping.clip(bound, message)
        noise = optax.tree.random_like(key, clipped, sampler=jax.random.normal)
        sent = jax.tree.map(lambda leaf, z, like: (leaf + noise_multiplier * bound * z).astype(like.dtype), clipped, noise, message)
        return sent, state, {"message_clipped": jnp.float32(~(norm <= bound))}

    return Uplink(init, apply, mechanism.replacing(mechanism.gaussian(noise_multiplier)))
