"""What may change while a run goes on, and what may not: one place, which says key and values.

Refused are another network, other data (`other_network`), other samples (`other_draws`), another
past (`other_steps`) and, once all steps are done, what can change nothing any more (`too_late`).
Anything else may change, and what decides what is learnt is told (`changes_told`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medpsp.config import Config
from medpsp.errors import CheckpointError, ConfigError
from medpsp.stages import in_steps, stage_at, total_steps
from medpsp.trainconfig import HOW

if TYPE_CHECKING:  # which brings torch
    from medpsp.train.checkpoint import TrainState

DATA = "data (labels, window, split)"
"""Name of their digest."""
REFINE = 2
"""Higher where the same configuration gives another network."""

_NO_END = 10**12
"""Slices of an epoch, for stages that nobody knows the steps of yet."""
_ELSEWHERE = {"preset", "steps", "stages", "size", "batch_size"}
"""Of ``train``; they are compared by what they make of the schedule."""
_RUNS = {"ranks", "engine", "precision", "channels_last", "compile", "augment_on", "eval_every"}
"""Of ``train``, beside `HOW`: how it is run, and when it is looked at."""


def identify(config: Config, data_id: str = "") -> dict[str, Any]:
    """What must be equal for weights to be used: network, classes, labels, windows, splits."""
    tree = config.model.model_dump(mode="json", exclude={"pretrained", "dropout"})
    if config.model.head == "refine":
        tree["version of refine"] = REFINE
    return {**tree, "classes": list(config.data.classes), DATA: data_id}


def schedule_of(config: Config) -> dict[str, Any]:
    """What gives a step number its meaning."""
    stages = [[stage.name, stage.steps] for stage in config.train.stages]
    begun = [
        {**stage.model_dump(mode="json"), "size": list(config.train.size)}
        for stage in config.train.stages
    ]
    return {
        "seed": config.seed,
        "batch_size": config.train.batch_size,
        "pretrained": config.model.model_dump(mode="json")["pretrained"],
        "stages": stages,
        "settings": begun,
        "teaches": teaches(config),
    }


def teaches(config: Config) -> dict[str, Any]:
    """Settings beside the schedule that decide what is learnt, by key."""
    train = config.train.model_dump(mode="json", exclude=_ELSEWHERE | _RUNS | HOW)
    loss = config.loss.model_dump(mode="json")
    parts = (("loss", loss), ("train", train), ("model", {"dropout": config.model.dropout}))
    return {f"{name}.{key}": value for name, part in parts for key, value in part.items()}


def other_draws(state: TrainState, config: Config) -> list[str]:
    """What changes first weights, or the samples of a step: never while a run goes on."""
    now = schedule_of(config)
    keys = {"seed": "seed", "batch_size": "train.batch_size", "pretrained": "model.pretrained"}
    before = {"pretrained": now["pretrained"], **state.schedule}  # older ones do not say
    return [
        told_change(key, before.get(name), now[name])
        for name, key in keys.items()
        if before.get(name) != now[name]
    ]


def other_steps(state: TrainState, config: Config) -> list[str]:
    """What changes the steps that are done: neither the stages before the one of the last step, nor
    the name of that one, nor fewer steps in all than are done, nor how a stage that is done went.

    Stages in epochs have no steps before the shards are read: then nothing is compared.
    """
    now, stages = schedule_of(config)["stages"], config.train.stages
    if _unread(config):
        return []
    total, before = total_steps(stages), state.schedule.get("stages", [])
    if state.step <= total:
        index, within = stage_at(stages, state.step - 1)
        if before[:index] == now[:index] and state.stage == stages[index].name:
            ended = within + 1 == stages[index].steps and before[index : index + 1] == [now[index]]
            return _changed_stages(state, config, index + ended)
    why = f"its step {state.step} is in stage {state.stage}, and what is done must stay as it was"
    return [f"{told_change('train.stages', _listed(before), _listed(now))} ({why})"]


def too_late(state: TrainState, config: Config) -> list[str]:
    """What is other than it was, where no step is left that it could have an effect on."""
    if _unread(config) or state.step < total_steps(config.train.stages):
        return []
    changes, now = _changed_teaching(state, config), list(config.train.size)
    for last in state.schedule.get("settings", [])[-1:]:
        if (size := last.get("size", now)) != now:
            changes.append(told_change("train.size", size, now))
    return changes


def _unread(config: Config) -> bool:
    """Whether there are stages in epochs whose steps only the shards will tell."""
    return any(stage.epochs is not None and not stage.steps for stage in config.train.stages)


def _changed_stages(state: TrainState, config: Config, count: int) -> list[str]:
    """What is other than it was of the first stages, but for their size, which all share."""
    before, now = state.schedule.get("settings", []), schedule_of(config)["settings"]
    return [
        told_change(f"{key} of stage {old['name']}", old[key], value)
        for old, new in list(zip(before, now, strict=False))[:count]
        for key, value in new.items()
        if key not in ("steps", "epochs", "size") and old.get(key, value) != value
    ]


def _changed_teaching(state: TrainState, config: Config) -> list[str]:
    before = state.schedule.get("teaches", {})
    return [
        told_change(key, before[key], value)
        for key, value in teaches(config).items()
        if before.get(key, value) != value
    ]


def told_change(key: str, before: object, now: object) -> str:
    """A setting that is other than it was."""
    return f"{key}: made with {before}, now {now}"


def _listed(stages: Sequence[Sequence[Any]]) -> str:
    """Stages as their sum and parts."""
    parts = " + ".join(f"{name} {steps}" for name, steps in stages)
    return f"{sum(steps for _, steps in stages)} steps ({parts})"


def begun_stages(state: TrainState) -> list[tuple[str, int, float | None]]:
    """Name, steps and epochs of the stages that a checkpoint has begun, as it knows them."""
    settings: list[dict[str, Any]] = state.schedule.get("settings", [])
    begun, first = [], 0
    for (name, steps), known in zip(state.schedule.get("stages", []), settings, strict=False):
        if first < state.step:
            begun.append((name, steps, known.get("epochs")))
        first += steps
    return begun


def changes_told(state: TrainState, config: Config) -> list[str]:
    """What is other than it was, and may be, in a line each."""
    taught = "; ".join(_changed_teaching(state, config))
    lines = (
        changed_midway(state, config),
        changed_ahead(state, config),
        f"goes on with other settings: {taught}" if taught else "",
    )
    return [line for line in lines if line]


def changed_midway(state: TrainState, config: Config) -> str:
    """What a stage that was begun goes on with in place of what it was begun with; or nothing."""
    stages = config.train.stages
    index, within = stage_at(stages, state.step - 1)
    before: list[dict[str, Any]] = state.schedule.get("settings", [])
    if within + 1 >= stages[index].steps or index >= len(before):
        return ""
    now = schedule_of(config)["settings"][index]
    changes = [
        f"{key} {now[key]}, begun with {value}"
        for key, value in before[index].items()
        if key not in ("steps", "epochs") and key in now and now[key] != value
    ]
    name = stages[index].name
    return f"stage {name} goes on with {'; '.join(changes)}" if changes else ""


def changed_ahead(state: TrainState, config: Config) -> str:
    """What of the schedule after the last step is other than it was; or nothing.

    That is allowed: a run may be made longer, or end otherwise than it was to.
    """
    now = schedule_of(config)
    changes = []
    if (before := state.schedule.get("stages", [])) != now["stages"]:
        changes.append(told_change("train.stages", _listed(before), _listed(now["stages"])))
    index, _ = stage_at(config.train.stages, state.step - 1)
    old = {known["name"]: known for known in state.schedule.get("settings", [])[index + 1 :]}
    for stage in now["settings"][index + 1 :]:
        changes += [
            told_change(f"{key} of stage {stage['name']}", value, stage[key])
            for key, value in old.get(stage["name"], {}).items()
            if key not in ("steps", "epochs") and key in stage and stage[key] != value
        ]
    return (
        f"the schedule after step {state.step} is another: {'; '.join(changes)}" if changes else ""
    )


def other_network(known: dict[str, Any], config: Config, data_id: str) -> list[str]:
    """What makes weights those of another network, or of other data; see `identify`."""
    names = {"classes": "data.classes", DATA: DATA, "version of refine": "version of head refine"}
    changes = []
    for key, value in identify(config, data_id).items():
        if known.get(key) != value:
            name = names.get(key, f"model.{key}")
            digest = key == DATA  # says nothing to anybody
            changes.append(
                f"made with other {name}" if digest else told_change(name, known.get(key), value)
            )
    return changes


def refuse_other(config: Config, path: Path, state: TrainState, data_id: str) -> None:
    """Refuse a checkpoint that this configuration cannot go on from.

    Raises:
        CheckpointError: It was made with another network, other data or another schedule.
        ConfigError: ``train.resume`` is never; another try of a job would not change that.
    """
    if config.train.resume == "never":
        raise ConfigError(
            f"checkpoint {path}: there is one, and train.resume=never refuses to go on from it; "
            f"{anew(path)}"
        )
    config = _in_known_steps(state, config)
    changes = [
        *other_network(state.model, config, data_id),
        *other_draws(state, config),
        *other_steps(state, config),
    ]
    if late := too_late(state, config):
        changes += [*late, f"all {state.step} steps are done, so that nothing would come of it"]
    if changes:
        raise CheckpointError(
            f"checkpoint {path}: {'; '.join(changes)}; set it back, or {anew(path)}"
        )


def _in_known_steps(state: TrainState, config: Config) -> Config:
    """Stages in epochs have no steps before the shards are read: with those of a checkpoint.

    The stage of its last step, where its epochs are others, and those after it have no end, so that
    training must look again. Nothing is known where a stage before that one has other epochs.
    """
    begun = begun_stages(state)
    past = [(name, epochs) for name, _, epochs in begun[:-1]]
    asked = [(stage.name, stage.epochs) for stage in config.train.stages[: len(past)]]
    if not (_unread(config) and begun and past == asked):
        return config
    train = in_steps(config.train, lambda _: _NO_END, begun)
    return config.model_copy(update={"train": train})


def anew(path: Path) -> str:
    """What to do where a checkpoint is of something else."""
    return (
        f"try it beside this run with `medpsp sweep CONFIG --over KEY=VALUE`, or start over: "
        f"delete {path.parent}"
    )
