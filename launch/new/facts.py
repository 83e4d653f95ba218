"""Series to the figures that a configuration is proposed from: nothing here names anybody."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from medpsp.dicom.sandbox import Sandbox, SandboxPool, or_error
from medpsp.errors import SourceError
from medpsp.types import ReadPolicy, Series, SliceRef
from shards.survey import evenly

IMAGES = frozenset(
    "BMD CF CR CT DF DG DMS DX EPS ES FA FID FS GM IO IVOCT IVUS LS MG MR NM OAM OCT OP OPM OPT "
    "OPTBSV OPTENF OPV OSS OT PT PX RF RG SM ST TG US VF XA XC".split()
)
"""Defined terms of Modality (PS3.3 C.7.3.1.1.1) of images: any other text may be free text."""
OTHERS = "other"
_LOOKED = 48
"""Images whose pixels, or whose regions, are looked at."""
_COLOURED, _LEVELS = 0.005, 8
"""Share of the pixels of a frame, and difference of their channels: below, colour is a caliper."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Images of one modality.

    Attributes:
        patients: How many; series, slices likewise.
        size: Rows and columns that 95 % of the slices do not exceed.
        pixel_mm: Between two pixels, median; NaN where unknown, as ``step_mm`` between slices.
        colour: Share of the slices that are stored in colour.
        coloured: Of those looked at, how many show colours; ``looked`` how many were.
        suspected: Share of the slices that may show a name.
        blankable: Of the objects suspected that were looked at, how many have an image region that
            the rest can be blanked around; ``asked`` how many were.
        parts: Slices by body part; empty text where it is not said.
    """

    modality: str
    patients: int
    series: int
    slices: int
    size: tuple[int, int]
    pixel_mm: float
    step_mm: float
    colour: float = 0.0
    coloured: int = 0
    looked: int = 0
    suspected: float = 0.0
    blankable: int = 0
    asked: int = 0
    parts: dict[str, int] = field(default_factory=dict)


def kinds_of(series: Iterable[Series]) -> dict[str, Kind]:
    """Figures by modality, the one with most patients first; pixels are not looked at."""
    groups: dict[str, list[Series]] = defaultdict(list)
    for item in series:
        known = item.first.modality
        groups[known if known in IMAGES else OTHERS].append(item)
    found = [kind_of(some, modality) for modality, some in groups.items()]
    found.sort(key=lambda kind: (-kind.patients, -kind.slices, kind.modality))
    return {kind.modality: kind for kind in found}


def look_closer(
    kind: Kind, series: Iterable[Series], pool: SandboxPool
) -> tuple[Kind, list[Series]]:
    """What pixels and regions say of images that are in colour, or may show a name.

    Returns:
        The figures with that, and the series that were seen to have no image region.
    """
    middles = {item.slices[len(item.slices) // 2]: item for item in series}
    colour = evenly([ref for ref in middles if ref.channels == 3], _LOOKED)
    suspected = evenly([ref for ref in middles if _is_suspected(ref)], _LOOKED)
    shown = [ok for _, ok in pool.map(or_error(_is_coloured), colour) if isinstance(ok, bool)]
    boxed = list(pool.map(_has_region, suspected))
    without = [middles[ref] for ref, has in boxed if not has]
    closer = replace(
        kind,
        coloured=sum(shown),
        looked=len(shown),
        blankable=len(boxed) - len(without),
        asked=len(boxed),
    )
    return closer, without


def without_suspects(series: Iterable[Series]) -> list[Series]:
    """Series of which no slice may show a name."""
    return [item for item in series if not any(map(_is_suspected, item.slices))]


def kind_of(series: Sequence[Series], modality: str = "") -> Kind:
    """Figures of series, at least one; pixels are not looked at."""
    counts = np.array([len(item.slices) for item in series])
    slices = int(counts.sum())
    sizes = [_covering([item.shape[axis] for item in series], counts) for axis in (1, 2)]
    firsts = [item.first for item in series]
    parts: Counter[str] = Counter()
    for ref, count in zip(firsts, counts.tolist(), strict=True):
        parts[ref.body_part] += count
    colour = sum(n for ref, n in zip(firsts, counts, strict=True) if ref.channels == 3)
    suspected = sum(_is_suspected(ref) for item in series for ref in item.slices)
    spacings = [min(ref.pixel_spacing) for ref in firsts if ref.pixel_spacing]
    steps = [_step(item) for item in series if item.affine and len(item.slices) > 1]
    return Kind(
        modality=modality,
        patients=len({ref.patient_id for ref in firsts}),
        series=len(series),
        slices=slices,
        size=(sizes[0], sizes[1]),
        pixel_mm=_median(spacings),
        step_mm=_median(steps),
        colour=float(colour) / slices,
        suspected=suspected / slices,
        parts=dict(parts),
    )


def _covering(sides: Sequence[int], counts: np.ndarray[tuple[int], np.dtype[np.int64]]) -> int:
    """The smallest side that 95 % of the slices do not exceed."""
    order = np.argsort(sides, kind="stable")
    place = int(np.searchsorted(np.cumsum(counts[order]), 0.95 * counts.sum()))
    return int(sides[int(order[place])])


def _median(values: Sequence[float]) -> float:
    return float(np.median(values)) if values else float("nan")


def _step(item: Series) -> float:
    return float(np.linalg.norm(np.array(item.affine)[:3, 2]))


def _is_suspected(ref: SliceRef) -> bool:
    return "PHI_BURNED_IN" in ref.flags


def _is_coloured(box: Sandbox, ref: SliceRef) -> bool:
    """Whether channels differ: most colour ultrasound is grey, but for a caliper."""
    values = box.frame(ref).values.astype(np.int16)
    apart = values.max(axis=2) - values.min(axis=2)
    return bool((apart > _LEVELS).mean() > _COLOURED)


def _has_region(box: Sandbox, ref: SliceRef) -> bool:
    try:
        return bool(box.headers(ref.place, "", ReadPolicy(burned_in="blank")))
    except SourceError:
        return False
