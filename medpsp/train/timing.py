"""Where the time of a step goes, on this rank and on the slowest one."""

from __future__ import annotations

import sys

import numpy as np
import torch

from medpsp.config import Config
from medpsp.model.cost import count_macs
from medpsp.model.psp import PSPNet
from medpsp.train.ranks import gather_numbers
from medpsp.types import World

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0}
"""Dense bf16 of the data sheets, by a part of the name of the GPU."""
PASSES = 3
"""A backward pass costs about two forward passes (Chowdhery et al. 2022, appendix B)."""
GIB = 2**30


class Clock:
    """Adds up times and images; `read` tells and starts anew.

    Args:
        config: Of the run.
        model: Counted once, at ``train.size``.
        device: Of the network.
        world: Ranks.
    """

    def __init__(self, config: Config, model: PSPNet, device: torch.device, world: World) -> None:
        self._world, self._device = world, device
        training = model.training
        dtype = next(model.parameters()).dtype
        one = torch.zeros(1, config.model.channels, *config.train.size, device=device, dtype=dtype)
        self._flop = 2 * PASSES * count_macs(model.eval(), one)
        model.train(training)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self._peak = next((v for k, v in PEAK_TFLOPS.items() if k in name), None)
        self.restart()

    def restart(self) -> None:
        """Forget what was added: evaluation and saving are no time of a step."""
        self._images, self._steps, self._waited, self._seconds = 0, 0, 0.0, 0.0

    def add(self, images: int, waited: float, seconds: float) -> None:
        """Count one step.

        Args:
            images: Of this rank.
            waited: Seconds for the batch.
            seconds: For everything, ``waited`` included.
        """
        self._images += images
        self._steps += 1
        self._waited += waited
        self._seconds += seconds

    def read(self) -> dict[str, float]:
        """Scalars since the last call, the same on every rank; all ranks must call it."""
        steps, seconds = max(1, self._steps), max(self._seconds, 1e-9)
        mine = [self._seconds / steps, (self._seconds - self._waited) / steps]
        every = gather_numbers(mine)
        rate = self._images * self._world.size / seconds
        tflops = rate * self._flop / self._world.size / 1e12
        found = {
            "perf/images_per_s": rate,
            "perf/data_wait_frac": self._waited / seconds,
            "perf/ranks": float(self._world.size),
            "perf/tflops_per_rank": tflops,
            "perf/step_ms_min": 1e3 * float(every[:, 0].min()),
            "perf/step_ms_median": 1e3 * float(np.median(every[:, 0])),
            "perf/step_ms_max": 1e3 * float(every[:, 0].max()),
            **self._memory(),
        }
        if self._world.size > 1:
            found["perf/slowest_rank"] = float(every[:, 1].argmax())
        if self._peak:
            found["perf/mfu"] = tflops / self._peak
        self.restart()
        return found

    def _memory(self) -> dict[str, float]:
        if self._device.type == "cuda":
            stats = torch.cuda.memory_stats(self._device)
            return {
                "mem/peak_active_gib": stats["active_bytes.all.peak"] / GIB,
                "mem/peak_reserved_gib": stats["reserved_bytes.all.peak"] / GIB,
                "mem/alloc_retries": float(stats["num_alloc_retries"]),
            }
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {"mem/peak_rss_gib": peak / GIB}
