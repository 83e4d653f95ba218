"""Which rows of a catalogue can have to do with each other, by hashed identifiers alone.

Series are found, masks matched and copies told apart within such a component, so an archive of any
size is looked at a part at a time. Two identifiers of one hash only make a part larger.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from os import fsdecode
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from medpsp.dicom.patients import stand_in
from shards.headers import FILE
from shards.spool import Span, Spool, packed

Hashes = NDArray[np.int64]
Numbers = NDArray[np.int64]
_NONE = hash("")
_SERIES, _PATIENT = "s", "p"  # before what is hashed


class Link(NamedTuple):
    """Rows that a label object ties together, and itself to them: hashes of what it names."""

    patient: int
    series: Hashes
    images: Hashes


def link_of(patient: str, series: Iterable[str], images: Iterable[str]) -> Link:
    """The link of a label object.

    Args:
        patient: PatientID, or empty.
        series: SeriesInstanceUIDs.
        images: SOPInstanceUIDs.
    """
    return Link(
        hash(_PATIENT + patient) if patient else 0,
        np.array([hash(_SERIES + uid) for uid in series], dtype=np.int64),
        np.array([hash(uid) for uid in images], dtype=np.int64),
    )


class LeftOut(NamedTuple):
    """Images of modalities that are not asked for: hashes of their series and of themselves."""

    series: Hashes
    images: Hashes

    @classmethod
    def of(cls, series: Iterable[str], images: Iterable[str]) -> LeftOut:
        """Of their UIDs."""
        link = link_of("", set(series) - {""}, set(images) - {""})
        return cls(np.unique(link.series), np.unique(link.images))

    def holds(self, link: Link) -> bool:
        """Whether a label object names any of them."""
        named = np.isin(link.series, self.series).any() or np.isin(link.images, self.images).any()
        return bool(named)


def cut_catalog(
    frames: Iterable[pa.RecordBatch], links: Sequence[Link], size: int
) -> tuple[Numbers, Numbers]:
    """Cut rows into parts that have nothing to do with each other.

    Rows belong together that share a SeriesInstanceUID or a SOPInstanceUID, or, where they have no
    SeriesInstanceUID, a patient (`patients.settle_patients` says who stands in for one). A label
    object ties what it names, and all of its patient, together.

    Args:
        frames: The columns `headers.KEYS` of the rows of images, in batches.
        links: Of the label objects.
        size: Rows of a part, but for a component that is larger.

    Returns:
        Part of each row, and of each link; parts count from 0 in the order of their first row.
    """
    named = np.array(sorted({link.patient for link in links} - {0}), dtype=np.int64)
    bases, images, ties = [], [], [np.zeros((0, 2), np.int64)]
    for batch in frames:
        base, patient, uid = _row_keys(batch)
        bases.append(base)
        images.append(uid)
        tied = np.isin(patient, named)  # a patient without a label object ties nothing
        ties.append(np.unique(np.stack([base[tied], patient[tied]], axis=1), axis=0))
    base = np.concatenate(bases) if bases else np.zeros(0, np.int64)
    image = np.concatenate(images) if images else np.zeros(0, np.int64)
    pairs = [*ties, _copies(base, image), *_link_pairs(links, base, image)]
    edges = np.concatenate(pairs)
    nodes, place = np.unique(np.concatenate([base, edges.ravel()]), return_inverse=True)
    left, right = place[len(base) :].reshape(-1, 2).T
    root = connected(len(nodes), left, right)
    parts = _packed_parts(root[place[: len(base)]], len(nodes), size)
    return parts[root[place[: len(base)]]], _link_parts(links, nodes, root, parts)


def connected(count: int, left: Numbers, right: Numbers) -> Numbers:
    """(count,) the least node of each node's component, by hooking and jumping.

    Args:
        count: Number of nodes.
        left: One end of each edge.
        right: The other.
    """
    parent = np.arange(count)
    while True:
        a, b = parent[left], parent[right]
        apart = a != b
        if not apart.any():
            return parent
        left, right, a, b = left[apart], right[apart], a[apart], b[apart]
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(up := parent[parent], parent):
            parent = up


def _row_keys(batch: pa.RecordBatch) -> tuple[Hashes, Hashes, Hashes]:
    """Of each row: what it belongs to, its patient, and its SOPInstanceUID (0 without)."""
    columns = {name: batch[name].to_pylist() for name in ("patient_id", "series_uid", "sop_uid")}
    patients = _hashed(columns["patient_id"], _PATIENT)
    base = _hashed(columns["series_uid"], _SERIES)
    bare = [i for i, uid in enumerate(columns["series_uid"]) if not uid]
    if bare:
        rows = batch.take(pa.array(bare)).to_pylist()
        base[bare] = patients[bare] = [hash(_PATIENT + _patient_of(row)) for row in rows]
    uids = np.fromiter(map(hash, columns["sop_uid"]), np.int64, len(batch))
    uids[uids == _NONE] = 0
    return base, patients, uids


def _hashed(values: list[str], kind: str) -> Hashes:
    """Hash of each value behind its kind; few of them differ."""
    known = {value: hash(kind + value) for value in set(values)}
    return np.fromiter(map(known.__getitem__, values), np.int64, len(values))


def _patient_of(row: dict[str, Any]) -> str:
    """The patient of a row without a series, or what stands in for one."""
    file = PurePath(fsdecode(row[FILE]), fsdecode(row["member"]))
    return row["patient_id"] or stand_in(row["study_uid"], "", row["frame_of_reference"], file)


def _copies(base: Hashes, image: Hashes) -> Numbers:
    """(E, 2) pairs of what holds one SOPInstanceUID twice."""
    order = np.argsort(image, kind="stable")
    known, belongs = image[order], base[order]
    twice = (known[1:] == known[:-1]) & (known[1:] != 0) & (belongs[1:] != belongs[:-1])
    return np.stack([belongs[1:][twice], belongs[:-1][twice]], axis=1)


def _link_pairs(links: Sequence[Link], base: Hashes, image: Hashes) -> Iterator[NDArray[np.int64]]:
    """(E, 2) pairs of everything that one label object names."""
    if not links:
        return
    order = np.argsort(image, kind="stable")
    known = image[order]
    for link in links:
        found = np.searchsorted(known, link.images)
        there = found < len(known)
        there[there] = known[found[there]] == link.images[there]
        others = base[order[found[there]]]
        ends = np.unique(np.concatenate([others, link.series, [link.patient or _anchor(link)]]))
        yield np.stack([ends[:1].repeat(len(ends)), ends], axis=1)


def _anchor(link: Link) -> int:
    """A node for a label object without a patient."""
    return hash((link.series.tobytes(), link.images.tobytes()))


def _packed_parts(root: Numbers, nodes: int, size: int) -> Numbers:
    """(nodes,) part of each component, by its root; those without rows come to the last."""
    found, first, counts = np.unique(root, return_index=True, return_counts=True)
    order = np.argsort(first)
    before = np.cumsum(counts[order]) - counts[order]
    _, number = np.unique(before // size, return_inverse=True)
    parts = np.full(nodes, number.max(initial=0))
    parts[found[order]] = number
    return parts


def _link_parts(links: Sequence[Link], nodes: Numbers, root: Numbers, parts: Numbers) -> Numbers:
    ends = np.array([link.patient or _anchor(link) for link in links], dtype=np.int64)
    return parts[root[np.searchsorted(nodes, ends)]]


class PartSpool:
    """Rows of each part, put aside while a catalogue goes by."""

    def __init__(self) -> None:
        self._spool = Spool()
        self._spans: dict[int, list[Span]] = {}

    def add(self, batch: pa.RecordBatch, parts: Numbers) -> None:
        """Put rows aside.

        Args:
            batch: Rows.
            parts: Part of each.
        """
        if not len(batch):
            return
        order = np.argsort(parts, kind="stable")
        ordered = batch if (np.diff(parts) >= 0).all() else batch.take(pa.array(order))
        found, first = np.unique(parts[order], return_index=True)
        ends = [*first[1:].tolist(), len(parts)]
        for part, start, stop in zip(found.tolist(), first.tolist(), ends, strict=True):
            span = self._spool.append(packed(ordered.slice(start, stop - start)))
            self._spans.setdefault(part, []).append(span)

    def packed(self, part: int) -> list[bytes]:
        """The rows of a part, in their order, as batches of `spool.packed`."""
        return [self._spool.read(span) for span in self._spans.get(part, [])]

    def close(self) -> None:
        """Forget them."""
        self._spool.close()
