"""The `model` and `train` sections of a proposal, from sizes, spacings, labels and the machine."""

from __future__ import annotations

import math
from collections.abc import Iterator

from launch.new.choices import Choice, Evidence
from launch.new.proposesteps import steps_of
from launch.new.shares import to_train
from medpsp.words import many

_GPU_PIXELS, _CPU_PIXELS = 768 * 768, 256 * 256
"""What the network sees at once, at most."""
_NEAR = 3.0
"""Steps between slices, in pixels, up to which neighbours show the same (nnU-Net calls images
anisotropic from there on)."""
_MIB = {"resnet18": 38.0, "convnext_tiny": 132.0}
"""What training keeps of an image of 256 x 256, fp32 (`medpsp backbones`)."""
_BATCH, _MOST_BATCH, _CPU_BATCH = 16, 64, 8
_MANY_PATIENTS, _MANY_SLICES, _LARGE_GIB = 200, 20_000, 16.0
_FEW_TRAIN = 10
_LOADERS = 8


def model_lines(found: Evidence) -> Iterator[Choice]:
    """Backbone, stride and context."""
    yield _backbone(found)
    rows, columns = crop_of(found)
    yield Choice(
        "model.output_stride",
        16,
        f"{rows // 16} x {columns // 16} cells for the pyramid. Compared with 8 and 32 at 96 x 96 "
        "only, where it scored best.",
    )
    yield _context(found)


def train_lines(found: Evidence) -> Iterator[Choice]:
    """Size, batch, schedule, and what the machine asks for."""
    yield _size(found)
    batch = _batch(found)
    yield batch
    yield steps_of(found, batch.value)
    yield from _preset(found)
    yield from _foreground(found)
    yield from _on_gpus(found) if found.machine.gpus else _on_cpu(found)


def crop_of(found: Evidence) -> tuple[int, int]:
    """Rows and columns: whole slices where the machine can, else the largest part of that form."""
    rows, columns = (max(64, math.ceil(side / 32) * 32) for side in found.used.size)
    most = _GPU_PIXELS if found.machine.gpus else _CPU_PIXELS
    if rows * columns <= most:
        return rows, columns
    scale = math.sqrt(most / (rows * columns))
    return max(64, int(rows * scale / 32) * 32), max(64, int(columns * scale / 32) * 32)


def _size(found: Evidence) -> Choice:
    (high, wide), used = crop_of(found), found.used
    why = f"95 % of the slices have up to {used.size[0]} x {used.size[1]} pixels"
    if not math.isnan(used.pixel_mm):
        why += f" of {used.pixel_mm:.2g} mm"
    if high >= used.size[0] and wide >= used.size[1]:
        why += ": whole slices, in steps of 32, so that the network sees where in the body it is."
    else:
        share = high * wide / (used.size[0] * used.size[1])
        where = "a GPU" if found.machine.gpus else "a CPU"
        why += (
            f": crops of {share:.0%} of them, which {where} trains on in bearable time. A network "
        )
        why += "that sees whole slices knows where in the body it is: raise it where there is time."
    return Choice("train.size", [high, wide], why)


def _backbone(found: Evidence) -> Choice:
    rich = found.used.patients >= _MANY_PATIENTS and found.used.slices >= _MANY_SLICES
    figures = f"{many(found.used.patients, 'patient')}, {many(found.used.slices, 'slice')}"
    if rich and found.machine.gpu_gib >= _LARGE_GIB:
        gib = f"GPUs of {found.machine.gpu_gib:.0f} GiB"
        return Choice(
            "model.backbone",
            "convnext_tiny",
            f"{figures} and {gib}: room for the largest. A rule of thumb: try resnet18 too.",
        )
    return Choice(
        "model.backbone", "resnet18", f"{figures}: the general one; `medpsp sweep` compares."
    )


def _context(found: Evidence) -> Choice:
    used = found.used
    if math.isnan(used.step_mm) or math.isnan(used.pixel_mm):
        return Choice("model.context", 0, "Single images: they have no neighbours in a volume.")
    apart = f"Slices are {used.step_mm:.2g} mm apart, pixels {used.pixel_mm:.2g} mm"
    if used.step_mm <= _NEAR * used.pixel_mm:
        return Choice(
            "model.context",
            1,
            f"{apart}: neighbours show the same structures, and are given along. Compare with 0.",
        )
    return Choice("model.context", 0, f"{apart}: neighbours show other structures.")


def _batch(found: Evidence) -> Choice:
    machine, (rows, columns) = found.machine, crop_of(found)
    if not machine.gpus:
        small = rows * columns < 128 * 128
        if small:
            return Choice("train.batch_size", _BATCH, "Small images: the usual number.")
        return Choice(
            "train.batch_size",
            _CPU_BATCH,
            f"No GPU for torch: steps of {_BATCH} take long on {many(machine.cores, 'core')}.",
        )
    each = _MIB[_backbone(found).value] * rows * columns / 65536 * (0.5 if machine.bf16 else 1.0)
    fit = max(1, int(machine.gpu_gib * 1024 / 2 / each))
    share = min(_BATCH, 1 << fit.bit_length() - 1, max(1, _MOST_BATCH // machine.gpus))
    return Choice(
        "train.batch_size",
        share * machine.gpus,
        f"{share} for each of {many(machine.gpus, 'GPU')}; about {share * each / 1024:.1f} of "
        f"{machine.gpu_gib:.0f} GiB, calculated; lower it if memory runs out.",
    )


def _preset(found: Evidence) -> Iterator[Choice]:
    train = to_train(found.patients)
    if found.whole and train < _FEW_TRAIN:
        yield Choice(
            "train.preset",
            "onecycle",
            f"About {many(train, 'patient')} to train on: a first stage with a fifth of "
            "them would see one or two.",
        )


def _foreground(found: Evidence) -> Iterator[Choice]:
    whole = [one for one in found.labels.tried if not one.code]
    slices, full = sum(one.slices for one in whole), sum(one.labelled for one in whole)
    if slices and full < slices / 2:
        yield Choice(
            "train.foreground",
            0.5,
            f"{full / slices:.0%} of the slices tried hold a structure: half of the samples shall.",
        )


def _on_cpu(found: Evidence) -> Iterator[Choice]:
    cores = many(found.machine.cores, "core")
    yield Choice(
        "train.ranks",
        1,
        f"Without a GPU one rank computes on {cores}. Where other programs keep 2 cores busy, 2 "
        "were 1.5 times as fast, but with model.norm=batch each has statistics of its own share.",
    )
    yield Choice(
        "train.loader_workers",
        0,
        "Without a GPU the network needs the cores itself; one worker on 2 of them was no gain.",
    )


def _on_gpus(found: Evidence) -> Iterator[Choice]:
    machine = found.machine
    yield Choice("train.ranks", machine.gpus, f"One for each of {many(machine.gpus, 'GPU')}.")
    if machine.bf16:
        yield Choice("train.precision", "bf16", "The GPUs compute in it.")
    yield Choice("train.channels_last", True, "The layout that convolutions on GPUs work in.")
    yield Choice(
        "train.compile",
        "reduce-overhead",
        "A fast GPU waits for the CPU otherwise; a minute or two at each stage.",
    )
    yield Choice(
        "train.augment_on",
        "device",
        "It leaves the cores to reading; as fast as loader workers where that was measured.",
    )
    workers = max(1, min(_LOADERS, machine.cores // machine.gpus - 1))
    yield Choice(
        "train.loader_workers",
        workers,
        f"{many(machine.cores, 'core')} for {many(machine.gpus, 'rank')}; the loops need one each.",
    )
