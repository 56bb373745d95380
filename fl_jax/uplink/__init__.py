"""What happens to a message before it leaves its site (`clients.uplink` puts it there): local differential privacy, compression."""

from fl_jax.uplink.compression import float16, quantize, top_k
from fl_jax.uplink.local_privacy import local_dp

__all__ = ["float16", "local_dp", "quantize", "top_k"]
