"""What a reader of a run should know first: failures, and what does not fit together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from launch.evalfigures import doubts_of, look_section
from launch.runfacts import Lack, RunFacts
from launch.trained import NO_BETTER, early
from shards.index import SHARDS, file_sha256
from shards.layout import changed_settings
from shards.page import Html, coded, join, tag


def doubts_section(facts: RunFacts) -> Html:
    """What a reader should know first; empty where there is nothing."""
    lines: list[object] = [
        *map(coded, facts.damaged),
        *_failures(facts),
        *_of_other_data(facts),
        *_of_other_steps(facts),
        *_of_early_best(facts),
        *_of_other_files(facts),
        *_refused_files(facts),
    ]
    if not isinstance(facts.evaluation, Lack):
        lines += doubts_of(facts.evaluation)
    return look_section(lines)


def _failures(facts: RunFacts) -> Iterator[Html]:
    for name, told in facts.jobs.items():
        if not isinstance(told, Lack) and told.state == "failed":
            yield join([f"{name} failed: ", tag("code", f"logs/{name}.failed"), " says why."])


def _of_other_data(facts: RunFacts) -> Iterator[str]:
    manifest = facts.manifest
    if isinstance(manifest, Lack):
        return
    if changed := changed_settings(facts.config.data, manifest.settings):
        yield f"The shards were made with other {', '.join(changed)}."
    newest = max(facts.reached[0], key=lambda one: one["step"], default=None)
    if newest and newest["content"] not in ("", manifest.tables.get(SHARDS)):
        yield "The shards have changed since the newest checkpoint was saved."


def _of_other_steps(facts: RunFacts) -> Iterator[str]:
    if isinstance(facts.best, Lack):
        return
    best = facts.best["step"]
    if not isinstance(facts.evaluation, Lack) and facts.evaluation["step"] != best:
        yield f"The scores are of step {facts.evaluation['step']}, the best one is {best} now."
    if not isinstance(facts.dossier, Lack):
        step = facts.dossier.get("model", {}).get("step", best)
        if step != best:
            yield f"The exported files are of step {step}, the best one is {best} now."
    yield from _of_other_weights(facts)


def _of_early_best(facts: RunFacts) -> Iterator[str]:
    if isinstance(facts.best, Lack) or facts.best["best"] < 0:
        return
    if early(step := facts.best["step"], facts.step):
        yield f"Validation was best at step {step} of {facts.step} that are done: {NO_BETTER}."


def _of_other_weights(facts: RunFacts) -> Iterator[str]:
    if not isinstance(facts.evaluation, Lack) and not isinstance(facts.dossier, Lack):
        scored = facts.evaluation.get("weights")
        exported = facts.dossier.get("model", {}).get("weights", scored)
        if scored and exported != scored:
            yield "The scores are of other weights than the exported files."


def _of_other_files(facts: RunFacts) -> Iterator[str]:
    if isinstance(facts.dossier, Lack):
        return
    for told in facts.dossier.get("files", ()):
        path = facts.run.export / Path(told["name"]).name
        if not path.is_file():
            yield f"export/{path.name}: is not there."
        elif file_sha256(path) != told["sha256"]:
            yield f"export/{path.name}: is not what the dossier was made of."


def _refused_files(facts: RunFacts) -> Iterator[str]:
    refusals = [] if isinstance(facts.dossier, Lack) else facts.dossier.get("refusals", [])
    for name in dict.fromkeys(one["file"] for one in refusals):
        gates = ", ".join(one["gate"] for one in refusals if one["file"] == name)
        yield f"export/{name} was refused and is not there: {gates} was not met."
