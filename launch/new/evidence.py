"""Look at archive, labels, key and machine: what a proposal is made from."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from launch.new.choices import Evidence, Places
from launch.new.facts import (
    IMAGES,
    OTHERS,
    Kind,
    kind_of,
    kinds_of,
    look_closer,
    without_suspects,
)
from launch.new.labelfacts import Labels, Source, labelled_patients
from launch.new.labelling import labels_of
from launch.new.machine import this_machine
from medpsp.dataconfig import DataConfig
from medpsp.dicom.sandbox import SandboxPool
from medpsp.errors import ArchiveError, ConfigError
from medpsp.identity import KEY_VARIABLE, load_key, unit_hash
from medpsp.progress import Bar
from medpsp.types import ReadPolicy, Series
from medpsp.words import ends_of, listed, many
from shards.catalog import SCANNER
from shards.survey import Survey, survey_folder, survey_index

_VOLUMES = ("CT", "MR")


def gather(archive: Path, labels: Path | None, places: Places, most: int) -> Evidence:
    """Look at everything.

    Args:
        archive: Root of the DICOM files.
        labels: Folder of the labels; None: those in the archive.
        places: With the index that stands for the archive, if any.
        most: Files to read below each folder.

    Raises:
        ArchiveError: No such folder, or no usable image in it.
        ConfigError: ``labels`` holds nothing that belongs to the images, or the key is no key.
    """
    _require_folder(labels)
    usual = DataConfig(archive=archive, classes=("a", "b"))
    limits = usual.decode_seconds, usual.decode_memory_mib
    machine = this_machine()
    with (
        SandboxPool(min(machine.cores, 8), *limits, SCANNER) as pool,
        Bar("scan", 0, "files") as bar,
    ):
        if places.index:
            survey = survey_index(places.index, archive, most)
        else:
            survey = survey_folder(archive, most, pool, bar.advance)
        _require_images(survey)
        source = _source(survey, labels, most, pool, bar)
        found = labels_of(survey, source, pool)
        if labels and not found.files:
            raise _nothing_fits(source)
        if labels and found.kind in ("seg", "rtstruct"):
            _require_apart(labels, archive)
        kinds = kinds_of(survey.series)
        series, left = _chosen(survey.series, found, kinds)
        kept, lost = {}, list[Series]()
        for name, kind in kinds_of(series).items():
            kept[name], without = look_closer(kind, _of(series, name), pool)
            lost += without
    used = kind_of(series)
    coloured = sum(kind.coloured for kind in kept.values())
    used = replace(used, coloured=coloured, looked=sum(kind.looked for kind in kept.values()))
    return Evidence(
        places=places,
        met=survey.met,
        read=survey.read,
        kinds=kinds,
        kept=kept,
        used=used,
        left=left,
        labels=found,
        patients=_patients([s for s in series if s not in lost] or series, places),
        codes=_codes(survey, found),
        objects=len({ref.place for item in series for ref in item.slices}),
        machine=machine,
    )


def _require_folder(labels: Path | None) -> None:
    if labels and not labels.is_dir():
        raise ConfigError(f"--labels {labels}: no such folder")
    if labels and not any(labels.iterdir()):
        raise ConfigError(f"--labels {labels}: an empty folder; is it mounted?")


def _require_apart(labels: Path, archive: Path) -> None:
    """As `preflight.require_places` will: label objects are scanned, and images are no labels."""
    root, images = labels.resolve(), archive.resolve()
    if root != images and images.is_relative_to(root):
        raise ConfigError(
            f"--labels {labels}: the archive lies inside it, and all of it would be read twice; "
            "give the folder of the label objects alone, or leave it out if they are in the archive"
        )


def _require_images(survey: Survey) -> None:
    known = [item for item in survey.series if item.first.modality in IMAGES]
    if known:
        return
    if survey.no_dicom:
        raise ArchiveError(
            f"archive {survey.root}: nothing DICOM in it, {survey.read} of {survey.met} files were "
            f"looked at: {ends_of(survey.others)}; give the root of the DICOM files"
        )
    codes = ", ".join(f"{count} {code}" for code, count in sorted(survey.codes.items()))
    raise ArchiveError(
        f"archive {survey.root}: DICOM, but no image that can be used: {codes or 'no code'}; "
        "docs/codes.md says what each means"
    )


def _source(survey: Survey, labels: Path | None, most: int, pool: SandboxPool, bar: Bar) -> Source:
    """Where labels are looked for: the archive, a folder of it, or one of its own."""
    if labels is None:
        return Source(survey.root, told=False, survey=survey)
    root, archive = labels.resolve(), survey.root.resolve()
    if not root.is_relative_to(archive):
        policy = ReadPolicy(modalities=())  # images there are not ours
        return Source(labels, True, survey_folder(labels, most, pool, bar.advance, policy))
    top = os.path.join(root.relative_to(archive), "").removeprefix("./")
    below = [f for f in survey.labels if Path(f.place.path).parent.resolve().is_relative_to(root)]
    names = [name.removeprefix(top) for name in survey.others if name.startswith(top)]
    part = replace(survey, labels=tuple(below), others=tuple(names))
    return Source(labels, told=True, survey=part)


def _nothing_fits(source: Source) -> ConfigError:
    survey = source.survey
    seen = [f"{len(survey.labels)} DICOM label objects"] if survey.labels else []
    seen += [f"{survey.codes['MODALITY_SKIPPED']} DICOM images"] * (
        survey.codes["MODALITY_SKIPPED"] > 0
    )
    seen += [ends_of(survey.others)] if survey.others else []
    return ConfigError(
        f"--labels {source.root}: nothing in it belongs to the images; seen: "
        f"{listed(seen) if seen else 'nothing usable'}. Names of NIfTI masks must hold PatientID, "
        "SeriesInstanceUID or the folder of the images, and SEG or RTSTRUCT name their images"
    )


def _chosen(
    series: Sequence[Series], labels: Labels, kinds: dict[str, Kind]
) -> tuple[list[Series], dict[str, str]]:
    """Series to be used, and why other modalities are not."""
    left: dict[str, str] = {}
    if labels.kind:
        names = labels.modalities
        who = labelled_patients(labels.series)
        for name in (name for name in kinds if name not in names):
            count = len(who.get(name, ()))
            left[name] = f"labelled in {many(count, 'patient')}" if count else "no labels"
        chosen = [item for item in labels.series if item.masks and item.first.modality in names]
    else:
        names = _most(kinds)
        left = {name: _why_left(name, names) for name in kinds if name not in names}
        chosen = [item for item in series if item.first.modality in names]
    clean = [item for item in chosen if item.first.modality == "US"]
    clean += without_suspects(item for item in chosen if item.first.modality != "US")
    return clean or chosen, left


def _most(kinds: dict[str, Kind]) -> tuple[str, ...]:
    """CT and MR where they are, as they are volumes; else the modality of most patients."""
    there = [name for name in _VOLUMES if name in kinds]
    most = max((kinds[name].patients for name in there), default=0)
    often = tuple(name for name in there if 2 * kinds[name].patients >= most)
    return often or (next(name for name in kinds if name in IMAGES),)


def _why_left(name: str, kept: Sequence[str]) -> str:
    if name == OTHERS:
        return "no modality of DICOM"
    return f"no labels ask for it beside {listed(list(kept))}"


def _of(series: Iterable[Series], modality: str) -> list[Series]:
    return [item for item in series if item.first.modality == modality]


def _patients(series: Sequence[Series], places: Places) -> list[float | None]:
    """Where each patient lies in the split, if there is a key."""
    names = sorted({item.first.patient_id for item in series})
    if places.key and not places.key.exists():
        return [None] * len(names)
    if not places.key and not os.environ.get(KEY_VARIABLE):
        return [None] * len(names)
    key = load_key(places.key)
    return [unit_hash(key, "split", name) for name in names]


def _codes(survey: Survey, labels: Labels) -> Counter[str]:
    """Of objects in no series; label objects have rows of their own where they are used."""
    codes = Counter(survey.codes)
    if labels.kind in ("seg", "rtstruct"):
        codes.pop("LABEL_OBJECT", None)
    return codes
