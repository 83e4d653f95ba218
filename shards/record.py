"""A planned series as one line of JSON and back: what a shard task and its decoder need of it."""

from __future__ import annotations

import json
from dataclasses import fields
from operator import attrgetter
from typing import Any

from medpsp.types import Place, Series, SliceRef, Window
from shards.layout import PlannedSeries

_REF = tuple(f.name for f in fields(SliceRef) if f.name not in ("path", "member"))
_VALUES = attrgetter(*_REF)
_WINDOW = _REF.index("window")
_LISTS = tuple(
    _REF.index(name)
    for name in (
        *("position", "orientation", "pixel_spacing", "contrast_key", "collision_key"),
        *("times", "flags"),
    )
)
_REGION = _REF.index("region")


def record_text(item: PlannedSeries) -> bytes:
    """One line of JSON, without its end; names of files need not be UTF-8."""
    series = item.series
    places = [ref.place for ref in series.slices]
    return b'{"body":%s,"rest":%s}' % (
        record_body(item),
        _dumps([places, series.masks, item.stamp, item.sources]),
    )


def record_body(item: PlannedSeries) -> bytes:
    """The part of a record that stays when files only move: all but places and stamp."""
    series = item.series
    return _dumps(
        [
            [_VALUES(ref) for ref in series.slices],
            series.affine,
            series.z_mm,
            series.grid,
            series.mask_kind,
            series.mask_partial,
            series.split,
            series.flags,
            [item.patient, item.name, item.split, item.order, item.study_day],
        ]
    )


def read_record(text: bytes | str) -> PlannedSeries:
    """What `record_text` was given."""
    tree = json.loads(text)
    places, masks, stamp, sources = tree["rest"]
    slices, affine, z_mm, grid, kind, partial, split, flags, names = tree["body"]
    series = Series(
        slices=tuple(_ref(row, place) for row, place in zip(slices, places, strict=True)),
        affine=None if affine is None else tuple(tuple(row) for row in affine),
        z_mm=tuple(z_mm),
        grid=tuple(grid),
        masks=tuple(Place(*place) for place in masks),
        mask_kind=kind,
        mask_partial=partial,
        split=split,
        flags=tuple(flags),
    )
    patient, name, own_split, order, day = names
    return PlannedSeries(
        series=series,
        patient=patient,
        name=name,
        split=own_split,
        order=order,
        stamp=stamp,
        study_day=day,
        sources=tuple(map(tuple, sources)),
    )


def _dumps(tree: list[Any]) -> bytes:
    return json.dumps(tree, separators=(",", ":"), default=_window_row).encode()


def _window_row(window: Window) -> tuple[float, float, str]:
    return window.center, window.width, window.function


def _ref(row: list[Any], place: list[str]) -> SliceRef:
    for column in _LISTS:
        if row[column] is not None:
            row[column] = tuple(row[column])
    row[_REGION] = tuple(tuple(box) for box in row[_REGION])
    if row[_WINDOW]:
        center, width, function = row[_WINDOW]
        row[_WINDOW] = Window(center=center, width=width, function=function)
    path, member = place
    return SliceRef(path=path, member=member, **dict(zip(_REF, row, strict=True)))
