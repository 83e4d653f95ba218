"""Dropout that depends on the sample and on nothing else.

Drawn from a global generator, the mask of a sample depends on its place in the batch, on the rank
and on all draws before it. Here it is a hash of the sample's key, so that a step is the same for
any number of ranks, any micro-batch and after any restart.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
"""Step of splitmix64 (Steele et al. 2014), odd, as a signed number."""


class KeyedDropout2d(nn.Module):
    """Sets whole channels of a sample to 0, as `nn.Dropout2d`; what stays is scaled by 1 / (1-p).

    Args:
        p: Share of channels that are dropped.
        salt: Tells two layers of one network apart.
        channels: C.
    """

    words: Tensor

    def __init__(self, p: float, salt: int, channels: int) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p {p}: expected 0 <= p < 1")
        self.p, self.salt, self.mixed = p, salt, int(mix(torch.tensor(salt)))
        self.register_buffer("words", channel_words(channels), persistent=False)

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """(N, C, H, W) and (N,) int64 keys, which only training asks for.

        Raises:
            ValueError: No keys while dropping. Any stand-in would be silent: equal masks for all
                samples, or no dropout at all.
        """
        if not self.training or self.p == 0:
            return x
        if keys is None or keys.dtype != torch.int64 or keys.shape != x.shape[:1]:
            found = "none" if keys is None else f"{keys.dtype} {tuple(keys.shape)}"
            raise ValueError(
                f"dropout of {len(x)} samples needs int64 keys ({len(x)},), got {found}; give "
                "forward the keys, use eval() or set model.dropout=0"
            )
        keep = keep_channels(keys, self.words, self.p, self.mixed)
        return x * (keep.to(x.dtype) / (1 - self.p))[:, :, None, None]

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"p={self.p}, salt={self.salt}"


def channel_words(channels: int) -> Tensor:
    """(C,) int64: what splitmix64 adds for each channel.

    Made once: torch.compile for GPUs does arithmetic on `arange` in 32 bits, and fails here.
    """
    return torch.arange(1, channels + 1) * GOLDEN


def keep_channels(keys: Tensor, words: Tensor, p: float, mixed: int) -> Tensor:
    """(N, C) booleans from (N,) int64 keys; integers only, so CPU and GPU have the same bits.

    Args:
        keys: Of the samples.
        words: (C,) of `channel_words`.
        p: Share that is not kept.
        mixed: `mix` of the salt.
    """
    seeds = mix(keys ^ mixed)
    bits = mix(seeds[:, None] + words)  # splitmix64 with a seed for each sample
    return _shift(bits, 11).ge(round(p * 2**53))


def mix(x: Tensor) -> Tensor:
    """The output function of splitmix64 on int64, which wraps: a bijection of all 2^64 values."""
    x = (x ^ _shift(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shift(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    shifted: Tensor = (x >> bits) & (2 ** (64 - bits) - 1)  # >> alone repeats the sign
    return shifted
