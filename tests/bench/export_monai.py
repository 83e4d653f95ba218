"""MONAI's way from a DICOM series to a DICOM SEG, as its users write it.

    export_monai.py NET FOLDER OUT LOW HIGH

NET is what `export_engines.torch_eager` reads; values are shown from LOW to HIGH. MONAI is looked
for in .venv-bench/export (see the Makefile).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / ".venv-bench" / "export"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import highdicom as hd
import torch
from monai.inferers import SliceInferer
from monai.transforms import Compose, EnsureChannelFirst, LoadImage, ScaleIntensityRange
from pydicom import dcmread
from pydicom.sr.codedict import codes

from medpsp.config import ModelConfig
from medpsp.model.psp import build_model

ROI, BATCH = (512, 512), 4
NEEDED = ("PatientSex", "StudyTime", "StudyID", "ReferringPhysicianName")
"""Elements of type 2 that highdicom asks for and that scanners leave out: empty, then."""


def main(net: str, folder: str, out: str, low: str, high: str) -> None:
    model, classes = network(Path(net))
    shown = ScaleIntensityRange(float(low), float(high), 0.0, 1.0, clip=True)
    load = LoadImage(reader="PydicomReader", image_only=True, swap_ij=False)
    volume = Compose([load, EnsureChannelFirst(), shown])(folder)[None]  # (1, 1, H, W, N)
    infer = SliceInferer(roi_size=ROI, sw_batch_size=BATCH, spatial_dim=2, overlap=0.0)
    with torch.inference_mode():
        logits = infer(volume.as_tensor(), lambda part: model(part)[0])
    masks = logits.argmax(1)[0].permute(2, 0, 1).to(torch.uint8).numpy()
    images = [dcmread(path) for path in Path(folder).iterdir()]
    for ds in images:
        for keyword in NEEDED:
            if keyword not in ds:
                setattr(ds, keyword, "")
    write(masks, sorted(images, key=lambda ds: ds.InstanceNumber), classes, Path(out))


def network(path: Path) -> tuple[Any, int]:
    """Trained network and its number of classes."""
    saved = torch.load(path, weights_only=True)
    model = build_model(ModelConfig.model_validate_json(saved["config"]), saved["classes"])
    model.load_state_dict(saved["weights"])
    return model.eval(), saved["classes"]


def write(masks: Any, images: list[Any], classes: int, out: Path) -> None:
    """Class ids (N, H, W) of images in the same order."""
    algorithm = hd.AlgorithmIdentificationSequence(
        name="bench", version="1", family=codes.DCM.ArtificialIntelligence
    )
    segments = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=f"class {number}",
            segmented_property_category=codes.SCT.Tissue,
            segmented_property_type=codes.SCT.Tissue,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number in range(1, classes)
    ]
    hd.seg.Segmentation(
        source_images=images,
        pixel_array=masks,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=segments,
        series_instance_uid=hd.UID(),
        series_number=100,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="bench",
        manufacturer_model_name="bench",
        software_versions="1",
        device_serial_number="1",
    ).save_as(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
