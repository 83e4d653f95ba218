"""What a loader worker does: slices to crops as the network takes them. It imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medpsp.channels import channels_first, stacked, window_channels
from medpsp.errors import ShardError
from medpsp.train.augment import AugmentOptions, Draw, augment, draw
from medpsp.train.batch import Part, crop_parts, padded
from medpsp.types import IGNORE, FloatArray, Window
from shards.reader import ShardReader
from shards.samples import Sample, Wanted

_Space = tuple[NDArray[Any], NDArray[np.uint8]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Crops:
    """The task of the loader: crops of slices, windowed and augmented.

    Attributes:
        size: Rows and columns of a crop.
        classes: A label of another class is an error; 255 is ignored.
        channels: Of the network; grey slices are repeated to 3.
        level: Of `augment`.
        options: Of `augment`; each sample has a spacing of its own.
        jitter: Share by which windows vary.
        draws_only: Leave the augmentation to the device: only what was drawn comes back.
    """

    reader: ShardReader
    size: tuple[int, int]
    classes: int
    channels: int
    level: str
    options: AugmentOptions = field(default_factory=AugmentOptions)
    jitter: float = 0.0
    draws_only: bool = False
    _space: dict[str, _Space] = field(default_factory=dict)

    def __call__(self, item: Wanted, arrays: Sequence[NDArray[Any]]) -> tuple[Draw, ...]:
        """Fill (N, C, H, W) float32 images and (N, H, W) uint8 labels; returns draws to apply."""
        draws = []
        for bucket, shard in item.soon:
            self.reader.will_need(bucket, [shard])
        for image, label, sample in zip(*arrays, item.samples, strict=True):
            made, mask, rng = self._crop(sample)
            options = replace(self.options, spacing=sample.spacing)
            if self.draws_only and self.level != "none":
                draws.append(draw(self.level, rng, self.size, options))
            else:
                made, mask = augment(made, mask, self.level, rng, options=options)
            image[...] = channels_first(made, self.channels)
            label[...] = mask
        return tuple(draws)

    def _crop(self, sample: Sample) -> tuple[FloatArray, NDArray[np.uint8], np.random.Generator]:
        rng = np.random.default_rng(sample.key)
        image, label = space_of(self.reader, sample.bucket, self._space)
        self.reader.read_into(sample.bucket, sample.slot, image, label)
        source, target = crop_parts(label.shape, self.size, rng)
        windows = jittered(sample.windows, self.jitter, rng)
        # a window looks at single values, so it may as well come after the cut
        units = network_channels(self.reader, sample._replace(windows=windows), image, source)
        cut = label[source]
        check_classes(cut, self.classes, sample.bucket, sample.slot)
        return *padded(units, cut, self.size, target), rng


def space_of(reader: ShardReader, bucket: str, known: dict[str, _Space]) -> _Space:
    """Memory for image and label of a slice of a bucket, the same one each time."""
    if bucket not in known:
        shape, dtype = reader.frame(bucket)
        known[bucket] = np.empty(shape, dtype), np.empty(shape[:2], np.uint8)
    return known[bucket]


def network_channels(
    reader: ShardReader, sample: Sample, image: NDArray[Any], part: Part
) -> FloatArray:
    """Part of a slice as the network takes it: (H, W), or (H, W, C) of several channels.

    Args:
        reader: For the neighbours.
        sample: Its slots, windows and sense.
        image: The slice itself, (H, W) or (H, W, 3); used again for its neighbours.
        part: Rows and columns.

    Returns:
        float32 in [0, 1]. Channels run through the windows, or through the colours, of the first
        slot, then of the next.
    """
    middle, found = len(sample.slots) // 2, {}
    for number in (middle, *(n for n in range(len(sample.slots)) if n != middle)):
        if number != middle:
            reader.read_into(sample.bucket, sample.slots[number], image)
        found[number] = window_channels(image[part], sample.windows, sample.inverted)
    return stacked([unit for number in sorted(found) for unit in found[number]])


def jittered(
    windows: tuple[Window, ...], share: float, rng: np.random.Generator
) -> tuple[Window, ...]:
    """Windows whose width is scaled by up to 1 + share and whose centre moves by share widths."""
    if not share:
        return windows
    different = tuple(dict.fromkeys(windows))  # grey that is repeated stays grey
    moves = rng.uniform(-share, share, (len(different), 2))
    moved = {
        window: Window(
            center=window.center + float(move) * window.width,
            # PS3.3 C.11.2.1.2: at least 1 where the function is LINEAR
            width=max(
                window.width * (1 + float(scale)), 1.0 if window.function == "LINEAR" else 0.0
            ),
            function=window.function,
        )
        for window, (move, scale) in zip(different, moves, strict=True)
    }
    return tuple(moved[window] for window in windows)


def check_classes(label: NDArray[np.uint8], classes: int, bucket: str, slot: int) -> None:
    """A label that is no class would be counted as one, or end the process on a GPU.

    Raises:
        ShardError: With the number, and the slice.
    """
    highest = int(label.max(initial=0))
    if highest >= classes and (wrong := label[(label >= classes) & (label != IGNORE)]).size:
        raise ShardError(
            f"shards: {bucket} slot {slot} has label {int(wrong[0])}, expected 0 to "
            f"{classes - 1} or 255; run `medpsp check`"
        )
