"""Dice at equal CPU seconds: our networks against segmentation_models.pytorch's, on real scans.

    MEDPSP_DATA=... python tests/bench/accuracy.py run [--budget 120] [--only sunnybrook] [--jobs 2]
        [--networks "ours refine aux=false" ...] [--encoders resnet18]
    MEDPSP_DATA=... python tests/bench/accuracy.py table [--test]

Every run is one line of a file (--results), so that the bench may be stopped and goes on. All
networks start from random weights and see the same crops, augmentation, loss and AdamW; rates
follow the share of the budget that is used, so that each finishes its schedule. CPU time of the
process counts, loading included; one thread. All predict in tiles of the size they were trained
on. Each seed has a split of its own, from a key of its own, so that networks are compared on
several sets of held-out patients, pair by pair. The rate of each network is chosen on validation
patients; test patients are scored by `table --test` alone, at the end.

smp is looked for in .venv-bench/smp (see the Makefile).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / ".venv-bench" / "smp"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import nibabel as nib
import numpy as np
import torch
import yaml
from PIL import Image
from torch import nn

from medpsp.config import Config, ModelConfig
from medpsp.identity import create_key
from medpsp.model.loss import class_weights, segmentation_loss
from medpsp.model.psp import build_model
from medpsp.tiles import tiled
from medpsp.train.metrics import ConstantMask, confusion, dice_per_class, mean_foreground
from medpsp.types import World
from shards.build import build_shards
from shards.dataset import stage_rows, train_batches, whole_slices
from shards.index import class_pixels, read_index
from shards.reader import ShardReader
from tests.bench.results import Row, machine, report, versions

SEEDS = (1, 2, 7)
"""The first whose key leaves each set a validation and a test patient, and half for training."""
RATES = (1e-3, 3e-3)
BATCH, LONG = 8, 100_000
ENCODERS = {"resnet18": "resnet18", "mobilenetv3_large_100": "tu-mobilenetv3_large_100"}
SETS: dict[str, dict[str, Any]] = {
    "sunnybrook": {
        "size": [96, 96],
        "data": {
            "source": "voc",
            "archive": "",  # made of theirs, see `sunnybrook_pictures`
            "voc": {"patient_pattern": "^(SC-.+?)-IM-"},
            "classes": ["background", "ventricle"],
            "label_map": {0: 0, 255: 1},
        },
    },
    "hippocampus": {
        "size": [64, 64],
        "data": {
            "source": "voc",
            "archive": "",  # made of the volumes, see `hippocampus_slices`
            "voc": {"patient_pattern": "^(.+)_[0-9]+$"},
            "classes": ["background", "anterior", "posterior"],
        },
    },
    "sarcoma": {
        "size": [160, 160],
        "foreground": 0.7,  # two slices of five show the tumour
        "data": {
            "archive": "seg3d/sts_dicom_rtstruct",
            "labels": "seg3d/sts_dicom_rtstruct",
            "modalities": ["CT"],
            "label_pattern": "{PatientID}/CT/mask.nii.gz",
            "classes": ["background", "tumour"],
            "split": {"val": 0.25, "test": 0.25},
        },
    },
}


def config_of(name: str, folder: Path, seed: int) -> Config:
    """The data of a set, how it is split, and how crops are made of it."""
    chosen, root, place = SETS[name], Path(os.environ["MEDPSP_DATA"]), folder / f"{name}-{seed}"
    data = {**chosen["data"], "key_file": folder / f"key-{seed}"}
    for key in ("archive", "labels"):
        if key in data:
            data[key] = root / data[key] if data[key] else folder / f"{name}-pictures"
    stages = [{"name": "a", "steps": LONG, "lr": 1e-3, "augment": "mid"}]
    train = {"size": chosen["size"], "batch_size": BATCH, "stages": stages}
    train["foreground"] = chosen.get("foreground", 0.0)
    return Config.model_validate({"out": place, "seed": seed, "data": data, "train": train})


def prepared(name: str, folder: Path, seed: int) -> Config:
    """With shards."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(name, folder, seed)
    if config.data.key_file and not config.data.key_file.exists():
        create_key(config.data.key_file, f"public key {seed} of public data sets")
    if name in PICTURES and not config.data.archive.exists():
        partial = config.data.archive.with_name(f".{name}.partial")
        for kind in KINDS:
            (partial / kind).mkdir(parents=True, exist_ok=True)
        PICTURES[name](partial)
        partial.rename(config.data.archive)
    if not (config.shards / "manifest.json").exists():
        build_shards(config)
    return config


KINDS = ("JPEGImages", "SegmentationClass")
"""Folders that a source of kind voc looks for."""


def hippocampus_slices(folder: Path) -> None:
    """The volumes as pictures: 8 bits between the percentiles 0.5 and 99.5 of each."""
    root = Path(os.environ["MEDPSP_DATA"]) / "seg3d" / "hippocampus_mr_nifti"
    for path in sorted((root / "images").glob("*.nii*")):
        values = np.asarray(nib.load(path).dataobj, dtype=np.float32)
        label = np.asarray(nib.load(root / "labels" / path.name).dataobj).astype(np.uint8)
        low, high = np.percentile(values, (0.5, 99.5))
        grey = (255 * np.clip((values - low) / max(high - low, 1e-6), 0, 1)).astype(np.uint8)
        stem = path.name.split(".")[0]
        for number in range(values.shape[2]):
            name = f"{stem}_{number:03d}.png"
            Image.fromarray(grey[:, :, number]).save(folder / KINDS[0] / name)
            Image.fromarray(label[:, :, number]).save(folder / KINDS[1] / name)


def sunnybrook_pictures(folder: Path) -> None:
    """Theirs of 256 x 256 at 96 x 96: by area, masks by the nearest pixel."""
    root = Path(os.environ["MEDPSP_DATA"]) / "seg2d" / "sunnybrook_cardiac_mr"
    for kind, theirs, how in zip(
        KINDS, ("images", "labels"), (Image.Resampling.BOX, Image.Resampling.NEAREST), strict=True
    ):
        for path in sorted((root / theirs).glob("*.png")):
            Image.open(path).convert("L").resize((96, 96), how).save(folder / kind / path.name)


PICTURES = {"hippocampus": hippocampus_slices, "sunnybrook": sunnybrook_pictures}

NETWORKS = ("ours refine", "ours shallow", "smp.PSPNet", "smp.Unet")


def network(name: str, encoder: str, classes: int) -> nn.Module:
    """``ours HEAD [KEY=VALUE ...]``, keys of `ModelConfig`, or ``smp.NAME``; random weights."""
    if name.startswith("smp."):
        import segmentation_models_pytorch as peers

        return getattr(peers, name.removeprefix("smp."))(  # type: ignore[no-any-return]
            ENCODERS[encoder], encoder_weights=None, in_channels=1, classes=classes
        )
    _, head, *settings = name.split()
    chosen = {key: yaml.safe_load(value) for key, value in (s.split("=") for s in settings)}
    tree = {"backbone": encoder, "head": head, **chosen}
    return build_model(ModelConfig.model_validate(tree), classes)


def one_cycle(peak: float, share: float) -> float:
    """Rate at a share of the budget: up in 30 %, down to nothing (Smith & Topin 2019)."""
    if share < 0.3:
        return peak * (0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * share / 0.3)))
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (share - 0.3) / 0.7)))


def train(job: dict[str, Any], config: Config) -> dict[str, Any]:
    """One run: until the CPU seconds are used; scores of validation and test patients."""
    torch.set_num_threads(1)
    torch.manual_seed(job["seed"])
    rows, classes = read_index(config.shards), len(config.data.classes)
    model = network(job["network"], job["encoder"], classes).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=1e-2, fused=True)
    pixels = class_pixels(stage_rows(rows, 1.0), classes)
    weights = class_weights(torch.from_numpy(pixels), config.loss.class_weights)
    began, steps = time.process_time(), 0
    for batch in train_batches(config.shards, rows, config, World(), (0, 0)):
        share = (time.process_time() - began) / job["budget"]
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(job["rate"], share)
        found = (
            model(batch.image, batch.keys)
            if job["network"].startswith("ours")
            else model(batch.image)
        )
        logits, aux = found if isinstance(found, tuple) else (found, None)
        loss = segmentation_loss(logits, batch.label, config.loss, weights, lambda x: x).total
        if aux is not None:
            extra = segmentation_loss(aux, batch.label, config.loss, weights, lambda x: x)
            loss = loss + config.loss.aux * extra.total
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
    scored = {split: score(model.eval(), config, split) for split in ("val", "test")}
    return {**job, "steps": steps, **scored, **about()}


def first(found: Any) -> torch.Tensor:
    """Logits without those of an auxiliary head."""
    return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]


@torch.no_grad()
def score(model: nn.Module, config: Config, split: str) -> float | None:
    """Mean pooled Dice of the foreground classes; None without such patients."""
    rows = [row for row in read_index(config.shards) if row.split == split and row.labelled]
    classes = len(config.data.classes)
    counts = np.zeros((classes, classes), np.int64)
    for batch in whole_slices(config.shards, rows, World(), config):
        seen = tiled(
            lambda part: first(model(part)).softmax(1), batch.image, config.tiling, torch.from_numpy
        )
        mask = seen.argmax(1).to(torch.uint8).numpy()
        counts += confusion(batch.label.numpy(), mask, classes)
    return mean_foreground(dice_per_class(counts)) if rows else None


def constant(config: Config, split: str) -> float:
    """The mask that looks at no image, on the same patients."""
    rows, classes = read_index(config.shards), len(config.data.classes)
    mask, reader = ConstantMask(classes), ShardReader(config.shards)
    for row in stage_rows(rows, 1.0):
        mask.add(reader.read(row.bucket, row.slot)[1])
    scores = []
    for index in range(1, classes):
        counts = np.zeros((2, 2), np.int64)
        for row in rows:
            if row.split == split and row.labelled:
                truth = reader.read(row.bucket, row.slot)[1]
                wanted = np.where(truth == 255, 255, truth == index).astype(np.uint8)
                counts += confusion(wanted, mask.predict(index, truth.shape).astype(np.uint8), 2)
        scores.append(dice_per_class(counts)[1])
    return float(np.mean(scores))


def jobs_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Everything that is to be run, and is not in the results."""
    done = {key_of(line) for line in results(args)}
    every = itertools.product(
        *(args.only or SETS, args.networks, args.encoders, args.rates or RATES),
        SEEDS[: args.seeds],
    )
    jobs = [
        {"set": s, "network": n, "encoder": e, "rate": r, "seed": seed, "budget": args.budget}
        for s, n, e, r, seed in every
    ]
    return [job for job in jobs if key_of(job) not in done]


def key_of(job: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(job[key] for key in ("set", "network", "encoder", "rate", "seed", "budget"))


def results(args: argparse.Namespace) -> list[dict[str, Any]]:
    if not args.results.exists():
        return []
    return [json.loads(line) for line in args.results.read_text().splitlines()]


def run(args: argparse.Namespace) -> None:
    """All jobs, some at a time, each in a process of its own."""
    for name, seed in itertools.product(args.only or SETS, SEEDS[: args.seeds]):
        prepared(name, args.folder, seed)
    waiting, running = jobs_of(args), []
    print(f"{len(waiting)} runs of {args.budget} CPU seconds, {args.jobs} at a time", flush=True)
    while waiting or running:
        while waiting and len(running) < args.jobs:
            job = json.dumps(waiting.pop(0))
            command = [sys.executable, __file__, "one", "--folder", str(args.folder), "--job", job]
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        time.sleep(1)
        for process in [p for p in running if p.poll() is not None]:
            running.remove(process)
            line = process.communicate()[0].strip().splitlines()[-1:]
            if process.returncode == 0 and line:
                args.results.parent.mkdir(parents=True, exist_ok=True)
                with args.results.open("a") as file:
                    file.write(line[0] + "\n")
                print(line[0], flush=True)


def table(args: argparse.Namespace) -> None:
    """Mean and spread over the seeds, at the rate that is best on validation patients."""
    split = "test" if args.test else "val"
    groups: dict[Any, dict[float, dict[int, dict[str, Any]]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for line in results(args):
        place = line["set"], line["encoder"], line["budget"], line["network"]
        groups[place][line["rate"]][line["seed"]] = line
    for name in dict.fromkeys(place[0] for place in groups):
        blind = {
            seed: {split: constant(prepared(name, args.folder, seed), split)}
            for seed in SEEDS[: args.seeds]
        }
        rows = []
        for encoder, budget in dict.fromkeys(p[1:3] for p in groups if p[0] == name):
            chosen = {
                place[3]: best_rate(rates)
                for place, rates in groups.items()
                if place[:3] == (name, encoder, budget)
            }
            ours = next((runs for network, (_, runs) in chosen.items() if "ours" in network), {})
            for network, (rate, runs) in chosen.items():
                steps = statistics.median(run["steps"] for run in runs.values())
                what = f"{encoder}, {budget} s, {network} (rate {rate:g}, {steps:.0f} steps)"
                if runs is not ours:
                    rows.append(ahead_of(what, ours, runs, split))
            rows.append(ahead_of(f"{encoder}, {budget} s, a constant mask", ours, blind, split))
        report("accuracy", f"{name}, {split} patients", rows, measured(groups, name))


def measured(groups: Any, name: str) -> dict[str, object]:
    """When, where and with what a set was run; ours is the first of ours, at its best rate."""
    lines = [
        line
        for place, rates in groups.items()
        if place[0] == name
        for runs in rates.values()
        for line in runs.values()
    ]
    facts: dict[str, object] = {
        key: "; ".join(sorted({line[key] for line in lines})) for key in about()
    }
    size = " x ".join(map(str, SETS[name]["size"]))
    facts["load"] = "not kept; CPU seconds are counted"
    facts["setting"] = f"crops of {size}, batches of {BATCH}, {len(SEEDS)} seeds"
    return facts


def about() -> dict[str, str]:
    """Of a run: it stands in its line of the results."""
    return {
        "when": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions("torch", "timm", "segmentation_models_pytorch"),
    }


def ahead_of(what: str, ours: Any, runs: dict[int, dict[str, Any]], split: str) -> Row:
    """By how much ours is ahead, seed by seed: more than the spread over seeds is wanted."""
    scores = [[found[s][split] for s in sorted(found)] for found in (ours, runs)]
    ahead = [ours[s][split] - runs[s][split] for s in sorted(runs) if s in ours]
    judged = len(ahead) > 1 and "ours" not in what
    return Row(
        label=what,
        value=statistics.mean(ahead) if ahead else None,
        least=statistics.stdev(ahead) if judged else None,
        ours=said(scores[0]),
        theirs=said(scores[1]),
        spread=", ".join(f"{one:+.3f}" for one in ahead),
    )


def best_rate(
    rates: dict[float, dict[int, dict[str, Any]]],
) -> tuple[float, dict[int, dict[str, Any]]]:
    """The rate with the best mean on validation patients, and its runs by seed."""
    return max(rates.items(), key=lambda item: statistics.mean(r["val"] for r in item[1].values()))


def said(values: list[float]) -> str:
    """Mean and spread."""
    if not values:
        return "-"
    spread = f"{statistics.stdev(values):.3f}" if len(values) > 1 else "?"
    return f"{statistics.mean(values):.3f} +- {spread}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["run", "one", "table"])
    parser.add_argument("--budget", type=int, default=120)
    parser.add_argument("--only", nargs="*", choices=list(SETS))
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    parser.add_argument("--encoders", nargs="*", choices=list(ENCODERS), default=list(ENCODERS))
    parser.add_argument("--rates", nargs="*", type=float)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench/accuracy"))
    parser.add_argument("--results", type=Path, default=Path("runs/bench/accuracy.jsonl"))
    parser.add_argument("--job")
    parser.add_argument("--test", action="store_true")
    args = parser.parse_args()
    if args.what == "one":
        job = json.loads(args.job)
        print(json.dumps(train(job, config_of(job["set"], args.folder, job["seed"]))))
    else:
        {"run": run, "table": table}[args.what](args)


if __name__ == "__main__":
    main()
