"""Transforms of albumentations that a configuration names: which are taken, and what they keep."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from medpsp.errors import ConfigError
from medpsp.train.augment import AugmentOptions, augment, build_transforms
from medpsp.types import IGNORE

NOISE = {"name": "GaussNoise", "std_range": [0.01, 0.05], "p": 1.0}


def picture() -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    image = np.linspace(0, 1, 64 * 48, dtype=np.float32).reshape(64, 48)
    label = (image > 0.5).astype(np.uint8)
    label[:4] = IGNORE
    return image, label


def made(*items: dict[str, Any], seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    transforms = build_transforms(items)
    assert transforms is not None
    return transforms(*picture(), np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({"name": "GausNoise"}, "no transform 'GausNoise'; did you mean 'GaussNoise'?"),
        ({"name": "Compose"}, "no transform 'Compose'"),
        ({"name": "BasicTransform"}, "no transform 'BasicTransform'"),
        ({"name": "GaussNoise", "var_limit": [1, 2]}, "no argument 'var_limit', only std_range,"),
        ({"name": "GaussNoise", "std_rang": [0, 1]}, "did you mean 'std_range'?"),
        ({"name": "Affine", "mask_value": 1}, "did you mean 'fill_mask'?"),
        (
            {"name": "ElasticTransform", "alpha": 1, "sigma": 50, "alpha_affine": 50},
            "ElasticTransform has no argument 'alpha_affine', only alpha, sigma,",
        ),
        ({"name": "GaussNoise", "std_range": [2, 3]}, "GaussNoise: std_range"),
        ({"name": "GaussNoise", "p": 7}, "GaussNoise: p Input should be less than or equal to 1"),
        ({"name": "Affine", "mask_interpolation": 1}, "invents labels"),
        ({"name": "RandomBrightnessContrast"}, "it clips float images to [0, 1]"),
        ({"name": "ColorJitter"}, "changes colours, which grey values do not have"),
        ({"name": "Normalize"}, "the window has decided"),
        ({"name": "RandomScale"}, "of (48, 64, 1); leave it out"),
        ({"name": "RandomRain"}, "fails on a float32 image of (48, 64, 1)"),
        ({"name": "FDA"}, "fails on a float32 image of (48, 64, 1)"),
    ],
)
def test_what_is_refused_is_refused_in_one_line(item: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_transforms([NOISE, item])
    message = str(caught.value)
    assert message.startswith("train.transforms: ")
    assert said in message
    assert "\n" not in message


def test_an_empty_list_is_none() -> None:
    assert build_transforms([]) is None


def test_square_crops_may_turn_by_90_degrees() -> None:
    with pytest.raises(ConfigError, match="RandomRotate90 makes"):
        build_transforms([{"name": "RandomRotate90"}])
    assert build_transforms([{"name": "RandomRotate90"}], size=(64, 64)) is not None


def test_transforms_are_tried_on_as_many_channels_as_they_will_see() -> None:
    clahe = [{"name": "CLAHE"}]
    assert build_transforms(clahe) is not None
    with pytest.raises(ConfigError, match=r"CLAHE fails on a float32 image of \(48, 64, 5\)"):
        build_transforms(clahe, channels=(1, 5))


def test_grey_slices_of_a_network_of_colours_are_grey_when_they_are_transformed() -> None:
    with pytest.raises(ConfigError, match=r"RandomSnow fails on a float32 image of \(48, 64, 1\)"):
        build_transforms([{"name": "RandomSnow"}], channels=(1, 3))


def test_noise_is_there_and_repeats() -> None:
    image, label = picture()
    noisy, mask = made(NOISE)
    assert (noisy.shape, noisy.dtype) == (image.shape, np.float32)
    assert 0.005 < (noisy - image).std() < 0.06
    assert np.array_equal(mask, label)
    assert np.array_equal(made(NOISE)[0], noisy)
    assert not np.array_equal(made(NOISE, seed=1)[0], noisy)
    assert np.array_equal(image, picture()[0])


def test_coins_of_two_transforms_fall_apart() -> None:
    """A pipeline of albumentations gives both one seed; then both would run, or neither."""
    items = [{"name": "HorizontalFlip", "p": 0.5}, {"name": "VerticalFlip", "p": 0.5}]
    seen = {made(*items, seed=seed)[0][[0, 0, -1], [0, -1, 0]].tobytes() for seed in range(40)}
    assert len(seen) == 4


@pytest.mark.parametrize(
    "item",
    [
        {"name": "Affine", "rotate": [10, 20]},
        {"name": "Rotate", "limit": [10, 20]},
        {"name": "ElasticTransform", "alpha": 300, "sigma": 10},
    ],
)
def test_labels_stay_labels_and_outside_is_ignored(item: dict[str, Any]) -> None:
    for seed in range(8):
        _, label = made({**item, "p": 1.0}, seed=seed)
        assert (label.dtype, label.shape) == (np.uint8, (64, 48))
        assert set(np.unique(label)) == {0, 1, IGNORE}
        assert (label[-4:] == IGNORE).any()


@pytest.mark.parametrize(("low", "high"), [(-4.0, 5.0), (-1000.0, 3000.0)])
def test_values_beyond_0_and_1_are_kept(low: float, high: float) -> None:
    image, label = picture()
    wide = image * np.float32(high - low) + np.float32(low)
    blur = build_transforms([{"name": "GaussianBlur", "blur_limit": 3, "p": 1.0}])
    assert blur is not None
    found, _ = blur(wide, label, np.random.default_rng(0))
    np.testing.assert_allclose(found[8:-8, 8:-8], wide[8:-8, 8:-8], atol=0.02 * (high - low))
    assert found.min() < low + 0.1 * (high - low)
    assert found.max() > high - 0.1 * (high - low)


def test_channels_stay() -> None:
    transforms = build_transforms([NOISE])
    assert transforms is not None
    image, label = picture()
    found, _ = transforms(np.stack([image] * 7, axis=2), label, np.random.default_rng(0))
    assert found.shape == (64, 48, 7)


def test_they_run_after_ours_and_not_at_level_none() -> None:
    options = AugmentOptions(transforms=pickle.loads(pickle.dumps(build_transforms([NOISE]))))  # noqa: S301
    image, label = picture()
    for level in ("low", "high"):
        found, _ = augment(image, label, level, np.random.default_rng(4), options=options)
        plain, _ = augment(image, label, level, np.random.default_rng(4))
        assert 0.005 < np.abs(found - plain).mean() < 0.06
    same = augment(image, label, "none", np.random.default_rng(4), options=options)
    assert same[0] is image


def test_neither_torch_nor_the_network_is_needed() -> None:
    code = (
        "import socket, sys, numpy as np\n"
        "def refuse(*args): raise AssertionError('network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from medpsp.train.augment import AugmentOptions, augment, build_transforms\n"
        "image, label = np.zeros((32, 32), np.float32), np.zeros((32, 32), np.uint8)\n"
        "augment(image, label, 'high', np.random.default_rng(0))\n"
        "print('albumentations' in sys.modules)\n"
        "options = AugmentOptions(transforms=build_transforms([{'name': 'GaussNoise'}]))\n"
        "augment(image, label, 'high', np.random.default_rng(0), options=options)\n"
        "print('albumentations' in sys.modules, 'torch' in sys.modules)\n"
    )
    env = {key: value for key, value in os.environ.items() if "ALBUMENT" not in key}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    assert done.stdout.split() == ["False", "True", "False"]
