"""Slices of the shards as an exported graph takes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medpsp.config import Config, ModelConfig
from medpsp.deploy.inputs import GraphInput, as_planes, window_rows
from medpsp.intensity import needs_series_values
from medpsp.tiles import framed, tile_places
from medpsp.types import FloatArray, Window

if TYPE_CHECKING:
    from medpsp.types import PixelDtype
    from shards.index import SliceRow


@dataclass(frozen=True, kw_only=True)
class GraphSlice:
    """One slice.

    Attributes:
        image: (1, P, H, W) modality values.
        window: (1, V, 3); None where windows are constants of the graph.
        label: (H, W) class ids and 255.
    """

    image: NDArray[Any]
    window: FloatArray | None
    label: NDArray[np.uint8]

    @property
    def inverted(self) -> bool:
        """MONOCHROME1."""
        return self.window is not None and bool(self.window[0, 0, 1] < 0)


def graph_input(config: Config, rows: Iterable[SliceRow]) -> GraphInput:
    """What the graph of a run takes: the narrowest type that holds all that training had, and its
    windows as constants where they are the same for whatever a scanner may send."""
    from shards.layout import bucket_parts

    rows = list(rows)
    model, dtypes = config.model, {bucket_parts(row.bucket)[2] for row in rows}
    dtype: PixelDtype = "int16"
    if "float32" in dtypes:
        dtype = "float32"
    elif dtypes == {"uint8"}:
        dtype = "uint8"
    seen, fixed = {row.window for row in rows}, config.data.fixed_window
    windows = _views(model)
    varies = any(needs_series_values(row.modality, fixed) for row in rows)
    if not windows and len(seen) == 1 and (not varies or dtype == "uint8"):
        windows = tuple(seen) if not config.data.header_window else ()
    if any(row.inverted for row in rows):
        windows = ()
    return GraphInput(
        dtype=dtype,
        colours=model.in_channels,
        context=model.context,
        views=len(model.windows) or 1,
        windows=windows,
    )


def _views(model: ModelConfig) -> tuple[Window, ...]:
    return tuple(Window(center=w.center, width=w.width) for w in model.windows)


def graph_slices(
    config: Config, rows: tuple[SliceRow, ...], chosen: Iterable[SliceRow], given: GraphInput
) -> Iterator[GraphSlice]:
    """Whole slices, one after another; neighbours are among ``rows``."""
    from shards.reader import ShardReader
    from shards.samples import Sampler

    reader, sampler = ShardReader(config.shards), Sampler(config.model, rows)
    views = _views(config.model)
    for row in chosen:
        sample = sampler.sample(row)
        near = [reader.read(row.bucket, slot) for slot in sample.slots]
        _, label = near[len(near) // 2]
        rows_ = window_rows(views or (row.window,), row.inverted)[None]
        yield GraphSlice(
            image=as_planes([image for image, _ in near], given)[None],
            window=None if given.windows else rows_,
            label=label,
        )


def one_tile_each(
    slices: Iterable[GraphSlice], given: GraphInput, config: Config
) -> Iterator[GraphSlice]:
    """Of each slice one tile, of each the next."""
    tiling = config.tiling
    for number, one in enumerate(slices):
        outside = given.outside(one.inverted)
        whole, _ = framed(one.image, tiling.size, outside=outside)
        label, _ = framed(one.label, tiling.size, outside=255)
        places = tile_places(whole.shape, tiling)
        place = places[number % len(places)]
        yield GraphSlice(
            image=np.ascontiguousarray(whole[place]), window=one.window, label=label[place]
        )
