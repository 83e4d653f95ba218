"""Cleaning of predicted masks, and the choice of what to clean.

Components are 26-connected: thick slices of one organ often touch at an edge or a corner only, and
6 would cut them apart. Holes are then 6-connected, else a surface that is whole could leak (the
duality of digital topology, Kong & Rosenfeld 1989). Of images that are no volume each slice is
looked at alone, by 8 and 4 neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Step = Literal["none", "largest", "fill", "both"]
STEPS: tuple[Step, ...] = get_args(Step)
"""From the simplest: of equally good ones the first is taken."""

Mask = NDArray[np.bool_]


def largest_component(mask: Mask) -> Mask:
    """The component with the most voxels, of equal ones the first in memory order."""
    labels, count = ndimage.label(mask, np.ones((3,) * mask.ndim))
    if count < 2:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    kept: Mask = labels == sizes.argmax()
    return kept


def filled(mask: Mask) -> Mask:
    """The mask with its holes: what no way leads out of to the edge of the image."""
    # one labelling; binary_fill_holes of scipy takes a dilation for every voxel of the way out
    labels, _ = ndimage.label(np.pad(~mask, 1, constant_values=True))
    whole: Mask = labels != labels.flat[0]
    return whole[(slice(1, -1),) * mask.ndim]


def _both(mask: Mask) -> Mask:
    return filled(largest_component(mask))


_DONE: dict[Step, Callable[[Mask], Mask]] = {
    "none": lambda mask: mask,
    "largest": largest_component,
    "fill": filled,
    "both": _both,
}


def cleaned(predicted: NDArray[np.uint8], index: int, step: Step, volume: bool) -> Mask:
    """(N, H, W) voxels of a class after a step; holes take background alone, no other class.

    Args:
        predicted: (N, H, W) class indices; slices beside a gap count as neighbours.
        index: Of the class.
        step: What to do.
        volume: Whether the slices are a volume.
    """
    mask: Mask = predicted == index
    box = ndimage.find_objects(mask.view(np.uint8), 1)[0]
    if step == "none" or box is None:
        return mask
    inside = mask[box]  # nothing of components or holes lies outside
    if volume:
        after = _DONE[step](inside)
    else:
        after = np.stack([_DONE[step](plane) for plane in inside])
    result = np.zeros_like(mask)
    result[box] = after & (inside | (predicted[box] == 0))
    return result


def apply_steps(
    predicted: NDArray[np.uint8], steps: Mapping[int, Step], volume: bool
) -> NDArray[np.uint8]:
    """Clean each class by its step, in the order of the classes.

    Args:
        predicted: (N, H, W) class indices.
        steps: Of the classes to be cleaned. What is removed becomes background.
        volume: Whether the slices are a volume.
    """
    result = predicted.copy()
    for index in sorted(k for k, step in steps.items() if step != "none"):
        after = cleaned(result, index, steps[index], volume)
        result[result == index] = 0
        result[after] = index
    return result


def choose_step(dice: Mapping[Step, float]) -> Step:
    """The step of the highest Dice; the simpler one unless the other is better; NaN is worst."""
    return max(STEPS, key=lambda step: np.nan_to_num(dice[step], nan=-1.0))
