"""What an exported graph is given: planes of modality values, and windows where they vary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from medpsp.channels import channels_first
from medpsp.types import FloatArray, PixelDtype, Window


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphInput:
    """Type and planes of the input ``image``, and the windows it is seen through.

    Attributes:
        dtype: Of the modality values: int16, uint8 (RGB) or float32.
        colours: Planes of one slice: 1 grey, 3 RGB.
        context: Neighbouring slices on either side, as further planes.
        views: Windows that each plane is seen through, a channel each.
        windows: Those windows where they are constants of the graph; empty where the second input
            ``window`` gives them for each image.
    """

    dtype: PixelDtype = "int16"
    colours: int = 1
    context: int = 0
    views: int = 1
    windows: tuple[Window, ...] = ()

    @property
    def planes(self) -> int:
        """Planes of ``image``: near-major, colours within a slice."""
        return self.colours * (2 * self.context + 1)

    @property
    def channels(self) -> int:
        """Of the network."""
        return self.planes * self.views

    def outside(self, inverted: bool) -> float:
        """Value that is shown as 0: what lies around an image that is smaller than a tile."""
        if self.dtype == "float32":
            return float("inf") if inverted else float("-inf")
        limits = np.iinfo(self.dtype)
        return float(limits.max if inverted else limits.min)

    def to_json(self) -> dict[str, Any]:
        """As it stands in the metadata of a file."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> GraphInput:
        """Read back.

        Raises:
            ValueError, TypeError: Not what `to_json` wrote.
        """
        made = cls(**{**tree, "windows": tuple(Window(**w) for w in tree["windows"])})
        numbers = made.colours, made.context, made.views
        if made.dtype not in get_args(PixelDtype) or not all(isinstance(n, int) for n in numbers):
            raise ValueError("input")
        if made.colours not in (1, 3) or made.context < 0 or made.views < 1:
            raise ValueError("input")
        if made.windows and len(made.windows) != made.views:
            raise ValueError("input")
        return made


def window_rows(windows: Sequence[Window], inverted: bool = False) -> FloatArray:
    """(V, 3) float32: low edge, width, 0 of a linear window; centre, width, 1 of a SIGMOID.

    The width of an inverted image (MONOCHROME1) is negative. LINEAR becomes the LINEAR_EXACT window
    with the same edges (PS3.3 C.11.2.1.2.1, C.11.2.1.3.2); its step at a width of 1 becomes a ramp
    of a thousandth.
    """
    rows = []
    for window in windows:
        low, width, sigmoid = window.center - window.width / 2, window.width, 0.0
        if window.function == "LINEAR":
            width = max(window.width - 1, 1e-3)
            low = window.center - 0.5 - width / 2
        elif window.function == "SIGMOID":
            low, sigmoid = window.center, 1.0
        rows.append((low, -width if inverted else width, sigmoid))
    return np.array(rows, dtype=np.float32)


def as_planes(images: Sequence[NDArray[Any]], given: GraphInput) -> NDArray[Any]:
    """(P, H, W) of a slice and its neighbours, (H, W) or (H, W, 3) each; grey is repeated.

    Raises:
        ValueError: Values that the type of the graph does not hold.
    """
    stack = np.concatenate([channels_first(image, given.colours) for image in images])
    with np.errstate(invalid="ignore"):
        cast = stack.astype(given.dtype)
    if not np.can_cast(stack.dtype, given.dtype) and not (cast == stack).all():
        raise ValueError(f"values are {stack.dtype}, the model takes {given.dtype}")
    return cast
