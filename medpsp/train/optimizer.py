"""AdamW whose state is kept by the names of the parameters, so that any engine can take it up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from medpsp.config import TrainConfig
from medpsp.model.psp import PSPNet

MOMENTS = ("exp_avg", "exp_avg_sq")
Moments = dict[str, dict[str, Any]]
"""``exp_avg``, ``exp_avg_sq``: name to tensor of the parameter's shape; ``step``: to a count."""


def no_moments() -> Moments:
    """Before the first step."""
    return {"exp_avg": {}, "exp_avg_sq": {}, "step": {}}


def parameter_groups(model: PSPNet, train: TrainConfig) -> list[dict[str, Any]]:
    """Parameters that train, by part and by whether they decay.

    Biases and norms do not decay (He et al. 2019, "Bag of Tricks", 3.1). ``factor`` is the rate
    of a group over the rate of the schedule.
    """
    inside = {id(p) for p in model.backbone.parameters()}
    groups: list[dict[str, Any]] = []
    for part, factor in (("backbone", 1.0), ("head", train.head_lr)):
        for decays in (True, False):
            members = [
                p
                for p in model.parameters()
                if p.requires_grad
                and (id(p) in inside) == (part == "backbone")
                and (p.ndim > 1) == decays
            ]
            decay = train.weight_decay if decays else 0.0
            if members:
                named = {"name": part, "factor": factor, "weight_decay": decay, "lr": 0.0}
                groups.append({"params": members, **named})
    return groups


def build_adamw(model: PSPNet, train: TrainConfig) -> torch.optim.AdamW:
    """The fused one: a third of the calls, and it clips and leaves out steps by itself."""
    return torch.optim.AdamW(parameter_groups(model, train), lr=0.0, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of the schedule, times the factor of each group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def load_moments(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]], moments: Moments
) -> None:
    """Give an optimizer what is known about its parameters."""
    ours = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in named:
        if id(parameter) in ours and name in moments["step"]:
            count = float(moments["step"][name])
            state: dict[str, Tensor] = {
                "step": torch.tensor(count, dtype=torch.float32, device=parameter.device)
            }
            for key in MOMENTS:  # in the layout of the parameter: the fused step walks memory
                state[key] = torch.empty_like(parameter, requires_grad=False)
                state[key].copy_(moments[key][name].view_as(parameter))
            optimizer.state[parameter] = state


def moments_of(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]], before: Moments
) -> Moments:
    """What an optimizer knows, and what was known before about parameters that it has not."""
    found: Moments = {key: dict(value) for key, value in before.items()}
    for name, parameter in named:
        state = optimizer.state.get(parameter)
        if state:
            found["step"][name] = int(state["step"])
            for key in MOMENTS:
                found[key][name] = state[key]
    return found
