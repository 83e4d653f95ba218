"""Transforms of albumentations that a configuration names, run after ours.

albumentations 2.0.8 only warns of an argument it does not know, repeats seeds across loader
workers, gives every transform of a pipeline the same coin, and clips float images to [0, 1].
Here arguments are checked, every transform has its own seed out of the sample's, and values
beyond [0, 1] are scaled into it and back.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medpsp.errors import ConfigError
from medpsp.types import IGNORE

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it would ask the network on import

Pair = tuple[NDArray[np.float32], NDArray[np.uint8]]

_COLOURS = (
    "ChannelDropout",
    "ChannelShuffle",
    "ColorJitter",
    "FancyPCA",
    "HEStain",
    "HueSaturationValue",
    "ISONoise",
    "PlanckianJitter",
    "RGBShift",
    "ToGray",
    "ToRGB",
    "ToSepia",
)
_SCALES = ("FromFloat", "Normalize", "ToFloat")
REFUSED = {
    "RandomBrightnessContrast": "clips float images to [0, 1]; every level brightens without",
    **dict.fromkeys(_SCALES, "changes what values mean, which the window has decided"),
    **dict.fromkeys(_COLOURS, "changes colours, which grey values do not have"),
}
"""Transforms that make no sense on this data, and why."""

_REPLACED = {
    "value": "fill",
    "mask_value": "fill_mask",
    "cval": "fill",
    "cval_mask": "fill_mask",
    "always_apply": "p",
    "var_limit": "std_range",
    "alpha_affine": "",  # what it did is done by our rotation
}
_FAULTS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)
_TRIES = 4


@dataclass(frozen=True, slots=True)
class Transforms:
    """Checked transforms; small to pickle, so that workers need not import torch.

    Args:
        text: Names and arguments as JSON, the key of the transforms made in this process.
    """

    text: str

    def __call__(
        self, image: NDArray[np.float32], label: NDArray[np.uint8], rng: np.random.Generator
    ) -> Pair:
        """Apply them in turn to an (H, W) or (H, W, C) image and its (H, W) label."""
        low, high = min(0.0, float(image.min())), max(1.0, float(image.max()))
        shape, scale = image.shape, high - low
        if scale != 1:
            image = (image - np.float32(low)) / np.float32(scale)
        image, label = image.reshape(*shape[:2], -1).copy(), label.copy()  # some work in place
        for transform in _made(self.text):
            # Compose would give all of them one seed: all their coins would fall alike
            transform.set_random_seed(int(rng.integers(2**31)))
            out = transform(image=image, mask=label)
            image, label = out["image"], out["mask"]
        if scale != 1:
            image = image * np.float32(scale) + np.float32(low)
        return np.ascontiguousarray(image).reshape(shape), np.ascontiguousarray(label)


def build_transforms(
    items: Sequence[Mapping[str, Any]],
    size: tuple[int, int] = (48, 64),
    channels: Iterable[int] = (1,),
) -> Transforms | None:
    """Check what ``train.transforms`` lists, by making and trying each of it.

    Args:
        items: Each a name of albumentations and its arguments, for example
            ``{"name": "GaussNoise", "std_range": [0.01, 0.05], "p": 0.3}``.
        size: Rows and columns to try them on.
        channels: Numbers of them that images have: neighbouring slices and windows are channels.

    Returns:
        None where nothing is listed.

    Raises:
        ConfigError: Unknown or unfit transform, unknown argument, value out of range.
    """
    if not items:
        return None
    for item in items:
        for count in channels:
            _try(_make(item), str(item["name"]), (*size, count))
    return Transforms(json.dumps([dict(item) for item in items], sort_keys=True))


def _albumentations() -> Any:
    """albumentations without its torch part: a loader worker starts in a third of the time."""
    import cv2

    cv2.setNumThreads(0)  # ranks share cores
    absent = "torch" not in sys.modules
    if absent:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("albumentations")
    finally:
        if absent:
            del sys.modules["torch"]


@lru_cache(maxsize=8)
def _made(text: str) -> tuple[Any, ...]:
    return tuple(_make(item) for item in json.loads(text))


def _make(item: Mapping[str, Any]) -> Any:
    name = str(item.get("name", ""))
    given = {key: value for key, value in item.items() if key != "name"}
    kind = _kind(name)
    legal = [key for key in inspect.signature(kind.__init__).parameters if key != "self"]
    for key, value in given.items():
        _check_argument(name, str(key), value, legal)
    defaults = inspect.signature(kind.__init__).parameters
    if "fill_mask" in legal and defaults["fill_mask"].default is not None:
        given.setdefault("fill_mask", IGNORE)  # 0, its default, would call the outside background
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # a schema that fails only warns
            return kind(**given)
    except (*_FAULTS, UserWarning) as error:
        raise ConfigError(f"train.transforms: {name}: {_line(error)}") from None


def _kind(name: str) -> Any:
    """The class of a transform.

    Raises:
        ConfigError: There is none, or it is unfit.
    """
    A = _albumentations()
    known = [key for key, value in vars(A).items() if _is_transform(A, value)]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else f"; see albumentations {A.__version__}"
        raise ConfigError(f"train.transforms: no transform '{name}'{hint}")
    if name in REFUSED:
        raise ConfigError(f"train.transforms: {name} is refused: it {REFUSED[name]}")
    return getattr(A, name)


def _is_transform(A: Any, value: Any) -> bool:
    bases = (A.BasicTransform, A.ImageOnlyTransform, A.DualTransform, A.Transform3D, A.Lambda)
    return inspect.isclass(value) and issubclass(value, A.BasicTransform) and value not in bases


def _check_argument(name: str, key: str, value: Any, legal: list[str]) -> None:
    if key not in legal:
        near = [_REPLACED[key]] if key in _REPLACED else difflib.get_close_matches(key, legal, n=1)
        hint = f"; did you mean '{near[0]}'?" if near and near[0] in legal else ""
        raise ConfigError(
            f"train.transforms: {name} has no argument '{key}', only {', '.join(legal)}{hint}"
        )
    if key == "mask_interpolation" and value != 0:
        raise ConfigError(
            f"train.transforms: {name}: mask_interpolation {value} invents labels; leave it out"
        )


def _try(transform: Any, name: str, shape: tuple[int, int, int]) -> None:
    """Run it on a picture.

    Raises:
        ConfigError: It fails, or changes the size, the type or the labels.
    """
    from cv2 import error as cv2_error

    image = np.linspace(0, 1, math.prod(shape), dtype=np.float32).reshape(shape)
    label = (image[..., 0] > 0.5).astype(np.uint8)
    transform.p, chance = 1.0, transform.p
    faults = []
    try:
        for seed in range(_TRIES):
            transform.set_random_seed(seed)
            out = transform(image=image.copy(), mask=label.copy())
            faults.append(_fault(out["image"], out["mask"], shape))
    except (*_FAULTS, cv2_error) as error:
        faults.append(f"fails on a float32 image of {shape}: {_line(error)}")
    transform.p = chance
    if any(faults):
        raise ConfigError(f"train.transforms: {name} {next(filter(None, faults))}; leave it out")


def _fault(image: NDArray[Any], label: NDArray[Any], shape: tuple[int, int, int]) -> str:
    size = shape[:2]
    if image.shape[:2] != size or image.size != math.prod(shape) or label.shape != size:
        return f"makes {image.shape} and {label.shape} of {shape}"
    if image.dtype != np.float32 or label.dtype != np.uint8:
        return f"makes {image.dtype} and {label.dtype} of float32 and uint8"
    if not np.isfinite(image).all():
        return "makes values that are not finite"
    if not set(np.unique(label)) <= {0, 1, IGNORE}:
        return "invents labels"
    return ""


def _line(error: BaseException) -> str:
    """What an error says, without what pydantic says about itself."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\d+ validation errors? for InitSchema ", "", text)
    text = re.sub(r" \[type=.*?(/v/\w+|$)", ";", text)
    return text.rstrip("; ")[:300] or type(error).__name__
