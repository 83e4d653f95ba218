"""The whole way on a phantom archive that is made on the spot."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from launch.guards import refuse_other_training
from launch.local import submit_plan
from launch.phantom import Phantom, write_archive
from launch.plan import plan_jobs
from launch.rundir import RunDir, open_run
from launch.status import places
from launch.trained import BY_CASE, POOLED, shown
from medpsp.config import Config
from medpsp.identity import create_key
from medpsp.words import many

log = logging.getLogger("medpsp")
PATIENTS = 24
BLIND = f"{POOLED}, of the constant mask"
KEY = "0123456789abcdef" * 4
"""Public on purpose: the patients are drawn, and the split must repeat."""


def run_demo(out: Path, overrides: tuple[str, ...]) -> list[str]:
    """Archive, shards, training, evaluation, export, masks on a new patient.

    Returns:
        One line an artefact.
    """
    from medpsp.deploy.answers import FORMATS
    from medpsp.deploy.predict import Predictor

    archive = out / "archive"
    key_file = out / "demo.key"
    config, run = open_run(
        "demo",
        (
            f"out={json.dumps(str(out))}",
            f"data.archive={json.dumps(str(archive / 'dicom'))}",
            f"data.labels={json.dumps(str(archive / 'masks'))}",
            f"data.key_file={json.dumps(str(key_file))}",
            *overrides,
        ),
        refuse=lambda planned: refuse_other_training(
            [job.name for job in plan_jobs(planned)], planned
        ),
    )
    if not archive.is_dir():
        partial = out / ".archive.partial"
        shutil.rmtree(partial, ignore_errors=True)
        write_archive(partial, PATIENTS, Phantom())
        partial.rename(archive)
        log.info("demo: %d phantom patients as DICOM in %s", PATIENTS, archive / "dicom")
    if not key_file.exists():
        create_key(key_file, KEY)  # always the same: a demo that repeats, and no patients
    submit_plan(plan_jobs(config), run)
    new, _ = write_archive(out / "new-patient", 1, Phantom(oblique_deg=10), seed=99)
    shutil.rmtree(out / "masks", ignore_errors=True)
    predictions, _ = Predictor(run.int8, formats=FORMATS).folder(new, out / "masks")
    return _artefacts(config, run, [f for p in predictions for f in p.files])


def _artefacts(config: Config, run: RunDir, files: list[Path]) -> list[str]:
    scores = json.loads(run.evaluation.read_text(encoding="utf-8"))
    lines = []
    for title, key in ((BY_CASE, "dice"), (POOLED, "dice_pooled"), (BLIND, "dice_constant_mask")):
        told = (f"{name} {shown(of[key]['value'])}" for name, of in scores["classes"].items())
        lines.append(f"{title}: {', '.join(told)}")
    overlays = [f for f in files if f.suffix == ".png"]
    sheet = overlays.pop(0)
    return [
        f"shards       {config.shards}",
        f"checkpoint   {run.checkpoints / 'best'}",
        *places(run),
        *(
            f"{title:12} {file}"
            for title, suffix in (("DICOM SEG", ".dcm"), ("masks", ".gz"), ("meshes", ".glb"))
            for file in [f for f in files if f.suffix == suffix][:1]  # none of a class, no mesh
        ),
        f"overlays     {sheet}   (and {len(overlays)} single slices in {overlays[0].parent})",
        f"of {many(scores['patients'], 'held-out patient')}:",
        *(f"  {line}" for line in lines),
    ]
