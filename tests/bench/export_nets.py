"""Networks for the benches of exported files: trained for a short while, by the normal jobs.

Latency and memory do not depend on the weights; Dice does, so nobody measures it on random ones.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import yaml
from numpy.typing import NDArray

from launch.phantom import Phantom, draw, write_archive
from launch.rundir import RunDir
from medpsp.config import Config
from medpsp.exportconfig import Gate
from medpsp.identity import create_key
from tests.bench.results import ROOT, Missing

HEADS = ("classic", "refine")
STRIDE = 16
ALLOWED = dict.fromkeys(get_args(Gate), "bench: a miss is printed, not raised")
PATIENTS, SLICE = 24, (512, 512)
Feeds = dict[str, NDArray[Any]]
"""Stacks of M images by the name of the input."""


@dataclass(frozen=True, kw_only=True)
class Net:
    """A network that was exported."""

    config: Config

    @property
    def run(self) -> RunDir:
        """Where it is."""
        return RunDir(self.config.out)

    @property
    def name(self) -> str:
        """Backbone, head and stride."""
        model = self.config.model
        return f"{model.backbone} {model.head} OS{model.output_stride}"

    @property
    def dossier(self) -> dict[str, Any]:
        """Of its export."""
        found: dict[str, Any] = json.loads(self.run.export_report.read_text())
        return found


def phantom_net(
    folder: Path, backbone: str, head: str, steps: int, variants: Sequence[str] = ("cpu", "half")
) -> Net:
    """Trained on phantom CT of 128 x 128, four classes; made once for a folder.

    Raises:
        Missing: A job failed.
    """
    base = _phantom_config(folder)
    if not (base.shards / "manifest.json").exists():
        job("shards", base)
    model = {"backbone": backbone, "head": head, "output_stride": STRIDE, "aux": False}
    return exported(base, f"{backbone}-{head}-{steps}", model, steps, variants)


def exported(
    base: Config, name: str, model: dict[str, Any], steps: int, variants: Sequence[str]
) -> Net:
    """Trained on the shards of another configuration, and exported whatever the gates say.

    Args:
        base: With shards.
        name: Of its folder beside that of ``base``.
        model: Section of the configuration.
        steps: Of training.
        variants: To export.

    Raises:
        Missing: A job failed.
    """
    tree = base.model_dump(mode="json", exclude_unset=True)
    out = base.out.with_name(f"{base.out.name}-{name}")
    train = {k: v for k, v in tree.get("train", {}).items() if k != "stages"}
    train |= {"steps": steps, "eval_every": max(1, steps), "save_every": max(1, steps)}
    export = {"allow": ALLOWED, "variants": list(variants)}
    tree |= {"out": str(out), "model": model, "train": train, "export": export}
    config = Config.model_validate(tree)
    out.mkdir(parents=True, exist_ok=True)
    if not config.shards.exists():
        config.shards.symlink_to(base.shards.resolve(), target_is_directory=True)
    net = Net(config=config)
    if not (net.run.checkpoints / "best").is_dir():
        job("train", config)
    if not net.run.export_report.is_file():
        job("export", config)
    return net


def job(name: str, config: Config) -> None:
    """A command of ours, in a process of its own.

    Raises:
        Missing: It failed.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    given, log = config.out / "bench.yaml", config.out / f"bench.{name}.log"
    given.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    with log.open("wb") as output:
        done = subprocess.run(
            [sys.executable, "-m", "launch.cli", name, str(given)],
            stdout=output,
            stderr=output,
            cwd=ROOT,
            check=False,
        )
    if done.returncode:
        said = log.read_text(errors="replace").strip().splitlines()
        raise Missing(f"medpsp {name}: {said[-1][:300] if said else done.returncode}")


def _phantom_config(folder: Path) -> Config:
    archive, key = folder / "archive", folder / "bench.key"
    if not archive.is_dir():
        partial = folder / ".archive.partial"
        write_archive(partial, PATIENTS, Phantom())
        partial.rename(archive)
    if not key.exists():
        create_key(key, "0123456789abcdef" * 4)  # as the demo: it must repeat
    return Config.model_validate(
        {
            "out": folder / "phantom",
            "data": {
                "archive": archive / "dicom",
                "labels": archive / "masks",
                "label_pattern": "{PatientID}.nii.gz",
                "classes": ["background", "liver", "kidney", "lesion"],
                "modalities": ["CT"],
                "split": {"val": 0.2, "test": 0.2},
                "key_file": key,
            },
            "train": {"size": [128, 128], "batch_size": 8},
        }
    )


def eager_file(net: Net) -> Path:
    """Weights and what is needed to build the network, for `export_engines.torch_eager`."""
    import torch

    from launch.trained import load_trained

    path = net.run.root / "eager.pt"
    if not path.exists():
        model, _ = load_trained(net.config)
        saved = {
            "config": net.config.model.untrained.model_dump_json(exclude_unset=True),
            "classes": len(net.config.data.classes),
            "given": json.dumps(meta_of(net.run.fp32)["input"]),
            "weights": model.state_dict(),
        }
        torch.save(saved, path)
    return path


def meta_of(path: Path) -> dict[str, Any]:
    """What a file says of itself."""
    props = onnx.load(path, load_external_data=False).metadata_props
    found: dict[str, Any] = json.loads(next(p.value for p in props if p.key == "medpsp"))
    return found


def with_tiles(path: Path, size: tuple[int, int], out: Path) -> Path:
    """The same file, but it is shown as much at once as ``size``."""
    from medpsp.deploy.export import write_model

    meta = meta_of(path)
    write_model(onnx.load(path), out, {**meta, "tile": {**meta["tile"], "size": list(size)}})
    return out


def large_slice(out: Path) -> Path:
    """A phantom CT slice of `SLICE` as feeds: one image of int16."""
    values, _ = draw(Phantom(shape=(5, *SLICE), spacing=(5.0, 0.65, 0.65)), 7)
    np.savez(out, image=values[2][None, None])
    return out


def tiles(net: Net, split: str, count: int, out: Path) -> Path:
    """Feeds as the export had them: ``train`` for calibration, ``val`` to compare masks on.

    Raises:
        Missing: They are not of one size.
    """
    from launch.export import spread, validation
    from launch.feeds import graph_input, graph_slices, one_tile_each
    from launch.trained import labelled_rows
    from medpsp.deploy.session import feeds_of
    from shards.dataset import stage_rows

    rows = labelled_rows(net.config)
    chosen = spread(stage_rows(rows, 1.0) if split == "train" else validation(rows), count)
    given = graph_input(net.config, rows)
    slices = graph_slices(net.config, rows, chosen, given)
    found = [feeds_of(s.image, s.window) for s in one_tile_each(slices, given, net.config)]
    np.savez(out, **_stacked(found))
    return out


def _stacked(found: Iterable[Feeds]) -> Feeds:
    stacks: dict[str, list[NDArray[Any]]] = {}
    for feeds in found:
        for name, value in feeds.items():
            stacks.setdefault(name, []).append(value)
    try:
        return {name: np.concatenate(values) for name, values in stacks.items()}
    except ValueError:
        raise Missing("tiles of several sizes") from None
