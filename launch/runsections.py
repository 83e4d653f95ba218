"""Sections of the page of a run: what was trained, how it learnt, its cost, how to repeat it."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from launch.chain import Told, chain_of
from launch.curves import Curves
from launch.plot import Line, plot
from launch.profile import shipped_profiles
from launch.runfacts import Lack, RunFacts
from medpsp.configio import without_paths
from medpsp.progress import duration
from medpsp.words import many
from shards.index import SHARDS, file_sha256
from shards.page import Html, coded, number, pairs, percent, table, tag
from shards.sections import section

DEVICE_JOBS = ("evaluate",)
"""Beside training, jobs that hold one device."""

NONE = "–"


def lacks(lack: Lack) -> Html:
    """The line in place of a part."""
    return tag("p", coded(lack.line), css="quiet")


def what_section(facts: RunFacts) -> Html:
    """Network, data of the network, engine, seed, versions, stages."""
    model, train, loss = facts.config.model, facts.config.train, facts.config.loss
    height, width = train.size
    rows = (
        ("backbone", f"{model.backbone}, {'pretrained' if model.pretrained else 'random weights'}"),
        ("head", f"{model.head}, output stride {model.output_stride}"),
        ("classes", ", ".join(facts.config.data.classes)),
        ("size", f"{height} × {width}"),
        ("input channels", str(model.channels)),
        ("slices of a step", str(train.batch_size)),
        ("micro-batches of a rank", str(train.accumulate)),
        ("engine", f"{train.engine}, {many(train.ranks, 'rank')}, {train.precision}"),
        ("loss", f"{loss.dice:g} Dice + {loss.focal:g} Focal, gamma {loss.gamma:g}, class weights "
         f"{loss.class_weights}"),
        ("seed", str(facts.config.seed)),
        *_versions(facts),
    )  # fmt: skip
    return section("what", "What was run", pairs(rows), *_stages(facts))


def _versions(facts: RunFacts) -> Iterator[tuple[str, str]]:
    if not isinstance(facts.manifest, Lack):
        yield "shards made by", facts.manifest.tool
    if isinstance(facts.dossier, Lack):
        yield "versions", "are written by the export"
        return
    tool = facts.dossier.get("model", {}).get("tool", "")
    known = (f"{name} {text}" for name, text in facts.dossier.get("environment", {}).items())
    yield "versions of the export", ", ".join(filter(None, (tool, *known)))


def _stages(facts: RunFacts) -> Iterator[Html]:
    given = facts.config.train.stages
    known = dict(enumerate(facts.stages))
    rows = []
    for place, stage in enumerate(given):
        _, first, steps = known.get(place, (stage.name, 0, 0))
        length = str(steps) if steps else f"{stage.epochs:g} epochs"
        rows.append(
            (stage.name, str(first) if first else NONE, length, f"{stage.lr:g}", stage.shape,
             percent(stage.fraction), stage.augment, stage.trains)
        )  # fmt: skip
    head = ("stage", "from step", "steps", "rate", "shape", "patients", "augmentation", "trains")
    yield table(head, rows, (1, 2, 3, 5))


def curves_section(facts: RunFacts) -> Html:
    """Loss by term, learning rate, validation Dice by class."""
    curves = facts.curves
    if isinstance(curves, Lack):
        return section("curves", "Curves", lacks(curves))
    marks = [(name, first) for name, first, _ in facts.stages]
    named = ", ".join(f"{name} from step {first}" for name, first in marks if first <= curves.last)
    boxes = (
        plot("loss", "Loss", _loss(facts, curves), marks),
        plot("rate", "Learning rate", _rates(curves), marks),
        plot("dice", "Validation Dice", _dice(facts, curves), marks, top=1.0),
    )
    about = tag("p", f"Stages: {named}.", css="quiet") if named else ""
    return section("curves", "Curves", about, tag("div", *boxes, css="boxes"))


def _loss(facts: RunFacts, curves: Curves) -> list[Line]:
    loss = facts.config.loss
    names = {
        "loss": f"{loss.dice:g} Dice + {loss.focal:g} Focal",
        "dice_loss": "Dice",
        "focal_loss": "Focal",
    }
    return [Line(name, curves.of(f"train/{term}")) for term, name in names.items()]


def _rates(curves: Curves) -> list[Line]:
    backbone, head = (curves.of(f"train/lr/{part}") for part in ("backbone", "head"))
    if backbone == head:
        return [Line("all parts", head)]
    return [Line("backbone", backbone), Line("head", head)]


def _dice(facts: RunFacts, curves: Curves) -> list[Line]:
    names = facts.config.data.classes[1:]
    lines = [Line(name, curves.of(f"val/dice/{name}")) for name in names]
    return [*lines, Line("mean", curves.of("val/dice_mean"))] if len(names) > 1 else lines


def cost_section(facts: RunFacts) -> Html:
    """Time of the jobs, and what training took."""
    parts = [*_jobs(facts)]
    if isinstance(facts.curves, Lack):
        parts.append(lacks(Lack("Nothing is known of the cost of training.")))
    else:
        parts += [tag("h3", "Training", style="margin-top:18px"), pairs(_training(facts.curves))]
    return section("cost", "Cost", *parts)


def _jobs(facts: RunFacts) -> Iterator[Html]:
    if not facts.jobs:
        yield lacks(Lack("No job was timed."))
        return
    rows = [_job(facts, name, told) for name, told in facts.jobs.items()]
    text = (
        "The last try of each job; device time is wall time by the number of devices, of training "
        "that of all its starts. A device is a GPU, or what a rank has of a CPU."
    )
    yield tag("p", text, css="quiet")
    head = ("job", "state", "wall time", "device time", "queued again")
    yield table(head, rows, (2, 3, 4), css="narrow")


def _job(facts: RunFacts, name: str, told: Told | Lack) -> tuple[object, ...]:
    if isinstance(told, Lack):
        return name, "damaged", NONE, NONE, NONE
    state = f"{told.state}, code {told.code}" if told.state == "failed" else told.state
    seconds = told.ended - told.began if told.ended else 0.0
    busy = seconds if name in DEVICE_JOBS else 0.0
    if name == "train" and not isinstance(facts.curves, Lack):
        busy = _device_seconds(facts.curves)
    return (
        *(name, state, duration(seconds) if told.ended else NONE),
        *(duration(busy) if busy else NONE, told.restarts),
    )


def _device_seconds(curves: Curves) -> float:
    return sum(start.seconds * start.ranks for start in curves.starts)


def _training(curves: Curves) -> Iterator[tuple[str, str]]:
    starts = curves.starts
    ranks = sorted({start.ranks for start in starts})
    yield "starts", str(len(starts))
    yield "restarts", str(len(starts) - 1)
    yield "wall time of all starts", duration(sum(start.seconds for start in starts))
    yield "ranks", ", ".join(map(str, ranks))
    yield "device time", duration(_device_seconds(curves))
    for tag_of, name, unit in (
        ("perf/images_per_s", "images/s, all ranks, median", ""),
        ("perf/data_wait_frac", "waiting for data, median", "%"),
        ("perf/step_ms_median", "step, median", " ms"),
    ):
        if values := [value for _, value in curves.of(tag_of)]:
            middle = median(values)
            yield name, percent(middle) if unit == "%" else f"{number(middle)}{unit}"
    for tag_of, name in (
        ("mem/peak_active_gib", "peak memory of the GPU, first rank"),
        ("mem/peak_rss_gib", "peak memory of the process, first rank"),
    ):
        if values := [value for _, value in curves.of(tag_of)]:
            yield name, f"{number(max(values))} GiB"


def repeat_section(facts: RunFacts) -> Html:
    """The command, the digests that it must give again, and the configuration without its paths."""
    chain = chain_of(facts.run)
    cluster = ""
    if chain:
        known = chain.cluster in shipped_profiles()
        cluster = f" --cluster {chain.cluster if known else 'PROFILE'}"
    text = (
        "RUN is the folder of this page, whose config.yaml has the paths, too; relative ones count "
        "from where the first command was given. The same archive, key and configuration give the "
        "same digests of the data; the same seed, ranks and machine the same weights."
    )
    config = tag("pre", without_paths(facts.config))
    return section(
        "repeat",
        "How to repeat it",
        tag("pre", f"medpsp run RUN/config.yaml out=RUN-again{cluster}"),
        tag("p", text, css="quiet"),
        pairs(_digests(facts)),
        tag("details", tag("summary", "Resolved configuration, without its paths"), config),
    )


def _digests(facts: RunFacts) -> Iterator[tuple[str, Html]]:
    if facts.run.config.is_file():
        yield "SHA-256 of config.yaml", tag("code", file_sha256(facts.run.config))
    manifest = facts.manifest
    if isinstance(manifest, Lack):
        yield "data", lacks(manifest)
        return
    yield "data_id: labels, windows, splits", tag("code", manifest.data_id)
    yield "digest of all shards", tag("code", manifest.tables.get(SHARDS, NONE))
    yield "fingerprint of the key", tag("code", manifest.key_fingerprint)
