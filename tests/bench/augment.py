"""Augmentation: ms of CPU a sample and core, ours against albumentations, in turn.

Each round gives every candidate the same samples, seeded alike; printed are the medians over the
rounds and the median of the paired ratios. albumentations runs the usual four transforms with the
usual numbers; its elastic then moves pixels by 0.003 px and ours by 2 mm.

Floor of ours: a remap reads and writes the image and the label once and reads two maps,
3.6 MB a sample; at about 10 GB/s of one core that is 0.4 ms.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", NO_ALBUMENTATIONS_UPDATE="1")

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import albumentations as A
import cv2
import numpy as np
import torch

from medpsp.train.augment import AugmentOptions, augment, draw
from medpsp.train.warptorch import apply_batch
from tests.bench.results import Row, paired, report, versions

SIDE, ROUNDS, SAMPLES, TARGET = 512, 15, 40, 3.5
FORCED = AugmentOptions(always=True)
Work = Callable[[int], object]
"""One sample, by its seed."""


def picture() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.random((SIDE, SIDE), np.float32), (0, 0), 3)
    return image, (image > 0.5).astype(np.uint8)


def ours(level: str, options: AugmentOptions) -> Work:
    image, label = picture()
    return lambda seed: augment(image, label, level, np.random.default_rng(seed), options=options)


def theirs(forced: bool) -> Work:
    image, label = picture()
    chances = (1.0,) * 4 if forced else (0.5, 0.3, 0.3, 0.5)
    steps = [
        A.Rotate(limit=15, p=chances[0]),
        A.ElasticTransform(alpha=1, sigma=50, p=chances[1]),
        A.GridDistortion(p=chances[2]),
        A.RandomBrightnessContrast(p=chances[3]),
    ]

    def run(seed: int) -> object:
        for n, step in enumerate(steps):  # a Compose would give all four the same coin
            step.set_random_seed(4 * seed + n)
        out = {"image": image, "mask": label}
        for step in steps:
            out = step(**out)
        return out

    return run


def in_torch(options: AugmentOptions, batch: int = 8) -> Work:
    """A batch with every eighth seed, so that a sample costs an eighth."""
    image, label = (torch.from_numpy(a) for a in picture())
    images, labels = image.expand(batch, 1, -1, -1).clone(), label.expand(batch, -1, -1).clone()

    def run(seed: int) -> object:
        if seed % batch:
            return None
        rngs = (np.random.default_rng(seed + n) for n in range(batch))
        return apply_batch(images, labels, [draw("high", r, (SIDE, SIDE), options) for r in rngs])

    return run


def timed(work: Work, first: int) -> float:
    began = time.process_time()
    for seed in range(first, first + SAMPLES):
        work(seed)
    return (time.process_time() - began) * 1e3 / SAMPLES


def main() -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    facts = {
        "versions": versions("numpy", "opencv-python-headless", "albumentations", "torch"),
        "setting": f"{SIDE} x {SIDE} float32 and uint8, 1 thread, {ROUNDS} rounds of {SAMPLES} "
        "samples",
    }
    for title, options in (("with their chances", AugmentOptions()), ("all forced", FORCED)):
        works: dict[str, Work] = {f"ours {n}": ours(n, options) for n in ("low", "mid", "high")}
        works["torch high, by 8"] = in_torch(options)
        works["albumentations"] = theirs(options.always)
        for work in works.values():
            work(0)
        times: dict[str, list[float]] = {name: [] for name in works}
        for number in range(ROUNDS):
            for name, work in works.items():
                times[name].append(timed(work, number * SAMPLES))
        rows, peer = [], times["albumentations"]
        for name, found in list(times.items())[:-1]:
            rows.append(paired(f"albumentations / {name}, time of a sample", found, peer, least=1))
        mean = statistics.mean(times["ours high"])
        rows.append(Row(label="mean of ours high", value=mean, most=TARGET, unit="ms"))
        report("train", f"augmentation, {title}", rows, facts)


if __name__ == "__main__":
    main()
