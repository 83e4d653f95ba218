"""What the child of a `Sandbox` runs; children with tasks of their own build on it."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medpsp.dicom.decode import layout_of, stored_values
from medpsp.dicom.labelref import label_head as head_of
from medpsp.dicom.labelref import label_target
from medpsp.dicom.labels import map_labels, read_nifti_mask
from medpsp.dicom.names import LabelVolume, NameRule, count, merge_labels
from medpsp.dicom.parse import parse, refusing
from medpsp.dicom.placement import Grid, grid_of_tree
from medpsp.dicom.read import read_frame, read_headers
from medpsp.dicom.regionnames import region_names
from medpsp.dicom.rtstruct import read_contours
from medpsp.dicom.sandbox import Answer
from medpsp.dicom.seg import read_segments
from medpsp.dicom.voc import read_image, read_mask
from medpsp.dicom.wire import receive, send
from medpsp.errors import DicomError, LabelError, SourceError
from medpsp.types import Place, ReadPolicy, SliceRef, Window


def headers(place: list[str], policy: dict[str, Any]) -> Answer:
    """`read_headers`; place and file id are put in by the caller."""
    refs = read_headers(Place(*place), "", policy_of(policy))
    return [{**asdict(ref), "path": "", "member": ""} for ref in refs], []


def frame(ref: dict[str, Any]) -> Answer:
    """`read_frame`: values, and the padding mask if there is padding."""
    values, padding = read_frame(_ref(ref))
    return None, [values] if padding is None else [values, padding]


def digest(ref: dict[str, Any]) -> Answer:
    """SHA-256 of the values of one frame."""
    values = np.ascontiguousarray(read_frame(_ref(ref)).values)
    return hashlib.sha256(values.data.cast("B")).hexdigest(), []


def label_target_of(place: list[str]) -> Answer:
    """`label_target`."""
    return asdict(label_target(parse(Place(*place)).header)), []


def label_head(place: list[str]) -> Answer:
    """`label_head`: what even a damaged label object says."""
    return list(head_of(Place(*place))), []


def labels(
    kind: str,
    places: list[list[str]],
    grid: dict[str, Any],
    rule: dict[str, Any],
    options: list[str],
) -> Answer:
    """`read_labels`: notes, and (N, H, W) uint8 classes."""
    names = NameRule(**{key: tuples(value) for key, value in rule.items()})
    whole = read_labels(
        kind, [Place(*place) for place in places], grid_of_tree(grid), names, options
    )
    return whole.notes, [whole.values]


def read_labels(
    kind: str, places: Sequence[Place], grid: Grid, rule: NameRule, options: list[str]
) -> LabelVolume:
    """All mask objects of a series, laid on its grid: (N, H, W) uint8 classes.

    Codes of images become LABEL_UNREADABLE: PIX_TRUNCATED would read as if they were cut short.

    Args:
        kind: ``Series.mask_kind``.
        places: Of the objects.
        grid: Of the series.
        rule: Names to classes.
        options: For NIfTI, ``data.mask_geometry`` and ``data.mask_resample``.

    Raises:
        LabelError: They cannot be read, or do not lie on the grid.
    """
    try:
        with refusing("LABEL_UNREADABLE", "not readable"):
            return merge_labels([_volume(kind, p, grid, rule, options) for p in places], rule)
    except DicomError as error:
        known = error.code == "LABEL_UNREADABLE"
        detail = error.detail if known else f"{error.code}: {error.detail}"
        raise LabelError("LABEL_UNREADABLE", detail) from None


def _volume(kind: str, place: Place, grid: Grid, rule: NameRule, options: list[str]) -> LabelVolume:
    if kind == "nifti":
        found = read_nifti_mask(Path(place.path), grid, *options)  # type: ignore[arg-type]
        values = map_labels(found.values, dict(rule.numbers), len(rule.classes))
        count(found.notes, "LABEL_EMPTY", int(not values.any()))
        return LabelVolume(values, found.notes)
    parsed = parse(place)
    if kind == "rtstruct":
        return read_contours(parsed.header, grid, rule)
    layout = layout_of(parsed)
    return read_segments(
        parsed.header, lambda number: stored_values(parsed, layout, number).values, grid, rule
    )


def mask_values(place: list[str], grid: dict[str, Any]) -> Answer:
    """(N, H, W) stored values of a NIfTI mask on the grid of a series."""
    return None, [read_nifti_mask(Path(place[0]), grid_of_tree(grid)).values]


def names_of_regions(place: list[str]) -> Answer:
    """`region_names`."""
    return region_names(parse(Place(*place)).header), []


def image(place: list[str]) -> Answer:
    """`read_image`."""
    return None, [read_image(Path(place[0]))]


def mask(place: list[str], shape: list[int], numbers: list[list[int]], classes: int) -> Answer:
    """A mask that is a plain image, as (H, W) uint8 classes."""
    values = read_mask(Path(place[0]), (shape[0], shape[1]))
    return None, [map_labels(values, {old: new for old, new in numbers}, classes)]


Tasks = dict[str, Callable[..., Answer | Iterator[Answer]]]
TASKS: Tasks = {
    "headers": headers,
    "frame": frame,
    "digest": digest,
    "label_target": label_target_of,
    "label_head": label_head,
    "labels": labels,
    "mask_values": mask_values,
    "region_names": names_of_regions,
    "image": image,
    "mask": mask,
}


def tuples(value: Any) -> Any:
    """Lists of JSON as tuples, inner ones too; anything else as it is."""
    return tuple(tuples(item) for item in value) if isinstance(value, list) else value


def _ref(tree: dict[str, Any]) -> SliceRef:
    window = tree["window"]
    lists = {key: tuple(value) for key, value in tree.items() if isinstance(value, list)}
    return SliceRef(**{**tree, **lists, "window": Window(**window) if window else None})


def policy_of(tree: dict[str, Any]) -> ReadPolicy:
    """A policy from its fields."""
    modalities = tree["modalities"]
    return ReadPolicy(
        **{**tree, "modalities": modalities if modalities is None else tuple(modalities)}
    )


def answers_to(
    request: dict[str, Any], tasks: Tasks, limit: Callable[[], None]
) -> Iterator[tuple[list[Any], list[NDArray[Any]]]]:
    """Run one task; what it raises becomes the last answer. ``limit`` is called before each."""
    task = tasks[request.pop("task")]
    try:
        with refusing("DEC_ERROR", "not readable"):
            limit()
            found = task(**request)
            if isinstance(found, tuple):
                yield ["ok", found[0]], found[1]
                return
            for tree, arrays in found:
                yield ["item", tree], arrays
                limit()
    except SourceError as error:
        yield [type(error).__name__, list(error.args)], []
    else:
        yield ["ok", None], []


def main(seconds: int, memory_mib: int, tasks: Tasks | None = None) -> None:
    """Answer requests from stdin until it closes."""
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C, systemd and SLURM signal the whole
        signal.signal(number, signal.SIG_IGN)  # group; who started us finishes, we end by EOF
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a codec prints is no answer
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit_memory(memory_mib)

    def limit() -> None:
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(used) + 1 + seconds, hard))

    while True:
        try:
            request, _ = receive(requests)
        except EOFError:
            return
        for tree, arrays in answers_to(request, tasks or TASKS, limit):
            send(answers, tree, arrays)


def _limit_memory(memory_mib: int) -> None:
    """Private memory (RLIMIT_DATA) counts, mapped files do not; Linux only."""
    import imagecodecs  # noqa: F401 - first, so that its own memory is not counted

    status = Path("/proc/self/status")
    if not status.exists():
        return
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    base = int(lines["VmData"].split()[0]) * 1024
    limit = base + memory_mib * 2**20
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
