"""Scores of the held-out patients, one case after another: JSON, CSV and a page."""

from __future__ import annotations

import json
import logging
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from launch.evaltold import tell
from launch.rundir import RunDir
from launch.stacks import Labels, Network, Stack, grid_of, predict_stack, stacks_of
from launch.trained import labelled_rows, load_trained, number, weights_digest
from medpsp import __version__
from medpsp.config import Config
from medpsp.errors import ShardError
from medpsp.types import IGNORE

if TYPE_CHECKING:
    from launch.scores import Case
    from medpsp.progress import Bar
    from medpsp.train.metrics import ConstantMask
    from medpsp.train.postprocess import Step
    from shards.index import SliceRow
    from shards.reader import ShardReader

log = logging.getLogger("medpsp")


@dataclass(frozen=True, kw_only=True)
class Blind:
    """The constant mask in the sizes of the slices, made once each."""

    mask: ConstantMask
    _made: dict[tuple[int, int], list[NDArray[np.bool_]]] = field(default_factory=dict)

    def count(self, truth: Labels) -> NDArray[np.float64]:
        """(K, 2): twice the voxels it gets right, and voxels of truth and mask; (N, H, W)."""
        shape = (truth.shape[1], truth.shape[2])
        if shape not in self._made:
            self._made[shape] = [self.mask.predict(k, shape) for k in range(len(self.mask.sums))]
        result = np.zeros((len(self.mask.sums), 2))
        for plane in truth:
            known = plane != IGNORE
            for index, mask in enumerate(self._made[shape][1:], 1):
                wanted, found = plane == index, mask & known
                result[index] += (
                    2 * np.count_nonzero(wanted & found),
                    np.count_nonzero(wanted) + np.count_nonzero(found),
                )
        return result


def evaluate_job(config: Config) -> dict[str, Any]:
    """Score the held-out patients in 3-D, beside the best mask that never looks at the image.

    What was scored before with the same network, shards and configuration is not scored again, as
    long as all of its files are there and whole.

    Raises:
        ShardError: No patient is held out.
        CheckpointError: Not trained yet, or trained with another network.
    """
    rows = labelled_rows(config)
    split = "test" if any(row.split == "test" for row in rows) else "val"
    held_out = [row for row in rows if row.split == split]
    if not held_out:
        raise ShardError(f"shards {config.shards}: no held-out patient; raise data.split.test")
    model, step = load_trained(config)
    weights, place = weights_digest(model), RunDir(config.out).evaluation
    made_of = _made_of(config, weights)
    if known := _known(place, made_of):
        log.info("evaluate: nothing changed since %s; delete it to score again", place)
        tell(known, place)
        return known
    import torch

    from launch.scores import summarise
    from medpsp.progress import Bar
    from shards.reader import ShardReader

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reader = ShardReader(config.shards)
    net = Network(config=config, model=model.to(device), device=device, reader=reader)
    choice = choose_steps(net, rows, split)
    blind = Blind(mask=_constant_mask(net, rows))
    with Bar("evaluate", len(held_out), "slices") as bar:
        cases = [score_stack(net, s, blind, choice, bar) for s in stacks_of(held_out)]
    names = config.data.classes
    result: dict[str, Any] = {
        "split": split,
        "patients": len({case.patient for case in cases}),
        "slices": len(held_out),
        "step": step,
        "weights": weights,
        **summarise(cases, names, config.evaluate, config.seed),
        "postprocess": choice,
        "settings": config.evaluate.model_dump(mode="json"),
        "held_out": sorted({case.patient for case in cases}),
        "made_of": made_of,
    }
    _write(config, result, cases, reader)
    tell(result, place)
    return result


def _made_of(config: Config, weights: str) -> str:
    """Changes with whatever scores depend on; with more than that, to be on the safe side."""
    from shards.index import read_manifest

    tables = read_manifest(config.shards).tables
    settings = config.model_dump(mode="json", exclude={"out", "export"})
    facts = json.dumps([__version__, weights, tables, settings], sort_keys=True)
    return sha256(facts.encode()).hexdigest()


def _known(place: Path, made_of: str) -> dict[str, Any] | None:
    """The result of before, if it is of the same things and its files are what was written."""
    try:
        known: dict[str, Any] = json.loads(place.read_bytes())
        same = known["made_of"] == made_of and all(
            sha256(place.with_suffix(suffix).read_bytes()).hexdigest() == digest
            for suffix, digest in known["files"].items()
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return known if same else None


def _write(
    config: Config, result: dict[str, Any], cases: Sequence[Case], reader: ShardReader
) -> None:
    """Table, page and JSON; the last one, which says what the others are, at the end."""
    from launch.evalpage import evaluation_page
    from launch.scores import cases_csv
    from shards.index import write_bytes_durably
    from shards.sealed import sealed_page

    place = RunDir(config.out).evaluation
    files = {
        ".csv": cases_csv(cases, config.data.classes).encode(),
        ".html": sealed_page(evaluation_page(config, result, cases, reader).encode()),
    }
    result["files"] = {suffix: sha256(data).hexdigest() for suffix, data in files.items()}
    files[".json"] = json.dumps(result, indent=1).encode()
    for suffix, data in files.items():
        write_bytes_durably(place.with_suffix(suffix), data)


def score_stack(
    net: Network, stack: Stack, blind: Blind, choice: dict[str, Any] | None, bar: Bar
) -> Case:
    """Predict, clean and score one case."""
    from launch.scores import Case
    from medpsp.train.cases import score_case
    from medpsp.train.postprocess import apply_steps

    seen, grid, names = predict_stack(net, stack, bar), grid_of(stack), net.config.data.classes
    mask = seen.classes
    if choice:
        steps = {k: choice["chosen"][name] for k, name in enumerate(names) if k}
        mask = apply_steps(mask, steps, grid is not None)
    place = _most_wrong(seen.truth, mask)
    first = stack[0]
    return Case(
        patient=first.patient,
        series=first.series,
        modality=first.modality,
        scanner=first.manufacturer,
        z_step=first.spacing[2],
        slices=len(stack),
        scores=score_case(seen.truth, mask, len(names), grid, net.config.evaluate.nsd_mm),
        blind=blind.count(seen.truth),
        bins=seen.bins,
        drawn=stack[place],
        mask=zlib.compress(mask[place].tobytes()),
    )


def _most_wrong(truth: Labels, mask: Labels) -> int:
    """The slice where most voxels differ, of equal ones that with the most foreground."""
    wrong = [np.count_nonzero((t != m) & (t != IGNORE)) for t, m in zip(truth, mask, strict=True)]
    shown = [np.count_nonzero((t > 0) & (t != IGNORE)) for t in truth]
    return max(range(len(truth)), key=lambda n: (wrong[n], shown[n]))


def choose_steps(net: Network, rows: Sequence[SliceRow], split: str) -> dict[str, Any] | None:
    """What cleaning makes the validation patients better, class by class.

    Returns:
        ``chosen`` and ``validation_dice`` by class; None where nothing is to be chosen: unless
        asked for, and where the validation patients are those that are scored.
    """
    val = [row for row in rows if row.split == "val"]
    if net.config.evaluate.postprocess == "none":
        return None
    if split == "val" or not val:
        log.warning("evaluate.postprocess: nothing chosen; it takes val and test patients")
        return None
    from medpsp.progress import Bar
    from medpsp.train.postprocess import STEPS, choose_step, cleaned

    names = net.config.data.classes
    found: dict[tuple[int, Step], list[float]] = defaultdict(list)
    with Bar("choose", len(val), "slices") as bar:
        for stack in stacks_of(val):
            seen, volume = predict_stack(net, stack, bar), grid_of(stack) is not None
            known = seen.truth != IGNORE
            for index in range(1, len(names)):
                wanted = seen.truth == index
                for step in STEPS:
                    mask = cleaned(seen.classes, index, step, volume) & known
                    size = np.count_nonzero(wanted) + np.count_nonzero(mask)
                    if size:  # absent in this case, if not
                        found[index, step].append(2 * np.count_nonzero(wanted & mask) / size)
    dice: dict[str, dict[Step, float]] = {
        name: {s: float(np.mean(found[k, s] or [np.nan])) for s in STEPS}
        for k, name in enumerate(names)
        if k
    }
    return {
        "chosen": {name: choose_step(of) for name, of in dice.items()},
        "validation_dice": {n: {s: number(v) for s, v in of.items()} for n, of in dice.items()},
    }


def _constant_mask(net: Network, rows: Sequence[SliceRow]) -> ConstantMask:
    from medpsp.train.metrics import ConstantMask
    from shards.crops import check_classes
    from shards.dataset import stage_rows

    classes = len(net.config.data.classes)
    constant = ConstantMask(classes)
    for row in stage_rows(rows, 1.0):
        label = net.reader.read(row.bucket, row.slot)[1]
        check_classes(label, classes, row.bucket, row.slot)
        constant.add(label)
    return constant
