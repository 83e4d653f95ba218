"""DeepSpeed ZeRO-1, 2 and 3 as an engine of the loop.

What it divides among the ranks comes back whole, so a checkpoint of it is one of any engine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from medpsp.config import TrainConfig
from medpsp.errors import TrainError
from medpsp.model.psp import PSPNet
from medpsp.train.engine import Logits, autocast
from medpsp.train.guard import Statistics
from medpsp.train.optimizer import MOMENTS, Moments, parameter_groups, set_rate
from medpsp.types import World

FULL = 3
"""The stage that divides the weights as well."""
ZERO3_NAMES = ("all_gather", "all_gather_coalesced", "partition", "reduce_gradients_at_owner")


class ZeroEngine:
    """One stage with DeepSpeed; see `engine.Engine` for the methods.

    A step whose gradient is not finite is left out by DeepSpeed itself, which has the host wait for
    the norm.

    Args:
        model: Its ``requires_grad`` says what trains in this stage.
        train: Of the configuration.
        world: Ranks.
        moments: Of the stages before.
    """

    def __init__(self, model: PSPNet, train: TrainConfig, world: World, moments: Moments) -> None:
        if train.precision == "fp64":
            raise TrainError("train.precision fp64: DeepSpeed keeps its state in fp32; engine ddp")
        self._model, self._train, self._before = model, train, moments
        self._stage, self._fresh = int(train.engine[-1]), True
        self._statistics = Statistics(model)
        self._world, self._device = world, next(model.parameters()).device
        groups = parameter_groups(model, train)
        group_of = {id(p): n for n, group in enumerate(groups) for p in group["params"]}
        self._names = [
            (name, p, group_of[id(p)]) for name, p in model.named_parameters() if p.requires_grad
        ]
        for parameter in model.parameters():  # its broadcast cannot view channels_last as bytes
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # it insists on it
        deepspeed = _deepspeed(self._device)
        with quiet():
            self._engine, self._optimizer, *_ = deepspeed.initialize(
                model=model,
                optimizer=torch.optim.AdamW(groups, lr=0.0),
                config=_settings(train, world, self._stage),
                dist_init_required=False,
            )
        self._load()

    def forward(self, image: Tensor, keys: Tensor | None, last: bool) -> Logits:
        """See `Engine`."""
        if self._fresh:
            self._statistics.keep()
            self._fresh = False
        with autocast(self._train, image.device):
            return self._engine(image, keys)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `Engine`."""
        self._engine.backward(loss * self._train.accumulate)  # it divides by them itself
        if not last:
            self._engine.step()  # counts the micro-batch, and does no more

    def step(self, rate: float) -> tuple[Tensor, Tensor]:
        """See `Engine`."""
        set_rate(self._optimizer, rate)
        self._engine.step()
        self._fresh = True
        skipped = bool(self._optimizer.overflow)
        norm = float("nan") if skipped else float(self._engine.get_global_grad_norm())
        bad = torch.tensor(float(skipped), device=self._device)
        self._statistics.take_back(bad)
        return torch.tensor(norm, device=self._device), bad

    def weights(self) -> dict[str, Tensor]:
        """See `Engine`."""
        with self._whole():
            return {name: t.detach().clone() for name, t in self._model.state_dict().items()}

    def moments(self) -> Moments:
        """See `Engine`."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        found: Moments = {key: dict(value) for key, value in self._before.items()}
        steps = {
            group: int(self._optimizer.state[flat]["step"])
            for flat, group in self._flats()
            if self._optimizer.state.get(flat)
        }
        for name, parameter, group in self._names:
            if group in steps:
                found["step"][name] = steps[group]
                for key in MOMENTS:
                    found[key][name] = safe_get_full_optimizer_state(parameter, key)
        return found

    def close(self) -> None:
        """See `Engine`: what ZeRO-3 divided becomes whole again, and no hook stays."""
        weights = self.weights()
        self._engine.destroy()
        if self._stage == FULL:
            for name, parameter in self._model.named_parameters():
                parameter.data = weights[name]
                _forget(parameter)

    def _flats(self) -> list[tuple[Tensor, int]]:
        """This rank's part of the parameters, and the groups that they belong to."""
        if self._stage == FULL:
            groups = self._optimizer.sub_group_to_group_id
            flats = self._optimizer.fp32_partitioned_groups_flat
            return [(flat, groups[n]) for n, flat in enumerate(flats)]
        flats = self._optimizer.single_partition_of_fp32_groups
        return [(flat, n) for n, flat in enumerate(flats)]

    def _load(self) -> None:
        """Give DeepSpeed the moments of the stages before, each rank its part."""
        known = {g: self._before["step"][n] for n, _, g in self._names if n in self._before["step"]}
        for flat, group in self._flats():
            if group in known:
                self._optimizer.state[flat] = {
                    "step": torch.tensor(float(known[group])),
                    **{key: torch.zeros_like(flat) for key in MOMENTS},
                }
        if not known:
            return
        if self._stage != FULL:
            self._optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter, group in self._names:
            if group in known:
                for key in MOMENTS:
                    self._set(parameter, key, self._before[key][name].to(self._device))

    def _link(self) -> None:
        """Let each parameter find its moments.

        DeepSpeed does so once, after the step of its first group, where the others have none.
        """
        if self._stage == FULL:
            return
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        state = self._optimizer.state
        for flat, group in self._flats():
            if state.get(flat):
                lazy_init_hp_params_optimizer_state(
                    self._optimizer.bit16_groups[group], flat, state
                )

    def _set(self, parameter: Any, key: str, value: Tensor) -> None:
        from deepspeed.utils import (
            safe_get_local_optimizer_state,
            safe_set_full_optimizer_state,
            safe_set_local_optimizer_state,
        )

        if self._stage != FULL:
            safe_set_full_optimizer_state(parameter, value, key)
            return
        # its own way to set the whole fails where the last part is padded
        size = safe_get_local_optimizer_state(parameter, key).numel()
        padded = torch.zeros(size * self._world.size, device=value.device)
        padded[: value.numel()] = value.flatten()
        start = size * self._world.rank
        safe_set_local_optimizer_state(parameter, padded[start : start + size], key)

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """Parameters are whole for as long as this lasts."""
        if self._stage != FULL:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self._model.parameters())):
            yield


def _settings(train: TrainConfig, world: World, stage: int) -> dict[str, Any]:
    """What DeepSpeed is told; rates and precision are ours."""
    return {
        "train_micro_batch_size_per_gpu": train.batch_size // world.size // train.accumulate,
        "gradient_accumulation_steps": train.accumulate,
        "gradient_clipping": train.clip_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 0,  # none may be on its way while we ask for all
        },
    }


def _deepspeed(device: torch.device) -> Any:
    """DeepSpeed for a device; on a CPU without the module that it would compile for minutes."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    with quiet():
        import deepspeed
        from deepspeed import ops

    if device.type == "cpu":
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """DeepSpeed logs and prints pages while it starts."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _forget(parameter: Any) -> None:
    """Take off what ZeRO-3 put on a parameter."""
    for name in [n for n in vars(parameter) if n.startswith("ds_") or n in ZERO3_NAMES]:
        delattr(parameter, name)
