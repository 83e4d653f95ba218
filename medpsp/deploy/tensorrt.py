"""A folder for a Jetson: a file that TensorRT reads, how to build it there, and how to check it.

TensorRT cannot be had where the folder is written, so nothing in it was run on TensorRT; its
README.txt says what was checked instead. Sources of the commands: NVIDIA's "Migrating trtexec Usage
from TensorRT 10.x to 11.x", "DLA Supported Layers and Restrictions", "Strongly Typed Networks for
DLA"; the TensorRT page of ONNX Runtime's execution providers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from medpsp.deploy.folders import nothing_left
from medpsp.deploy.inputs import GraphInput, window_rows
from medpsp.deploy.modelfile import ModelFile
from medpsp.deploy.session import (
    IMAGE,
    LOGITS,
    MASK,
    WINDOW,
    Feeds,
    clear_pixels,
    open_session,
)
from medpsp.deploy.tensorrtgraph import (
    OpCheck,
    check_ops,
    is_quantized,
    make_readable,
    refuse_asymmetric,
    save,
)
from medpsp.deploy.tensorrttext import build_script, ort_providers, readme
from medpsp.errors import ConfigError, ExportError

Size = tuple[int, int]
"""Rows and columns."""

LIMITS = {"fp32": (40.0, 0.002), "fp16": (40.0, 0.002), "int8": (20.0, 0.01)}
"""Least SQNR of the logits in dB and most pixels with another class, a share. Choices: fp16 may be
taken for fp32 by TensorRT 8 to 10, and int8 kernels round otherwise than float emulation."""

SAME = 1e-4
"""Most that logits of the copy may differ from those of the file, as a share of the largest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Sizes that the engine takes.

    Attributes:
        least: Smallest rows and columns, as (H, W).
        best: What it is tuned for.
        most: Largest.
        batch: Most images at once; the least and the tuned number are 1.
        dla: Core of the deep learning accelerator, or None for the GPU. A DLA knows one size:
            all three are ``best``, and one image at once.

    Raises:
        ConfigError: Sizes that are not in order.
    """

    least: Size
    best: Size
    most: Size
    batch: int = 1
    dla: int | None = None

    def __post_init__(self) -> None:
        tile = _told(self.best)
        if self.dla is not None and not (self.least == self.best == self.most and self.batch == 1):
            raise ConfigError(
                f"--least {_told(self.least)}, --most {_told(self.most)}, {self.batch} images: a "
                f"DLA takes one image of one size, the tile {tile}; leave these options out"
            )
        if self.batch < 1:
            raise ConfigError(f"--batch {self.batch}: expected 1 or more")
        for option, given, bounds in (
            ("--least", self.least, ((1, 1), self.best)),
            ("--most", self.most, (self.best, None)),
        ):
            near = _nearest(given, *bounds)
            if near != given:
                side = "at most" if option == "--least" else "at least"
                raise ConfigError(
                    f"{option} {_told(given)}: expected {side} the tile of the model, {tile}; the "
                    f"nearest is {option} {_told(near)} (any such size, a multiple of the stride "
                    "or not)"
                )

    def shapes(self, planes: int, windows: int) -> dict[str, str]:
        """``min``, ``opt``, ``max`` as trtexec and ONNX Runtime read them; 0 windows: no input."""
        rows = {"min": (1, self.least), "opt": (1, self.best), "max": (self.batch, self.most)}
        given = {}
        for name, (number, (height, width)) in rows.items():
            text = f"{IMAGE}:{number}x{planes}x{height}x{width}"
            given[name] = text + (f",{WINDOW}:{number}x{windows}x3" if windows else "")
        return given

    def tried(self) -> list[tuple[int, int, int]]:
        """(N, H, W) of the parity inputs: the tuned size, the smallest, an odd one between."""
        odd = tuple(
            min((a + b) // 2 | 1, c)
            for a, b, c in zip(self.least, self.best, self.most, strict=True)
        )
        found = ((1, *self.best), (1, *self.least), (min(2, self.batch), odd[0], odd[1]))
        return list(dict.fromkeys(found))


def profile_of(
    tile: Size,
    least: Size | None = None,
    most: Size | None = None,
    batch: int = 4,
    dla: int | None = None,
) -> Profile:
    """Tuned for the tile of the model; half to twice of it unless said otherwise."""
    if dla is not None:
        return Profile(least=least or tile, best=tile, most=most or tile, dla=dla)
    half, double = (max(1, tile[0] // 2), max(1, tile[1] // 2)), (2 * tile[0], 2 * tile[1])
    return Profile(least=least or half, best=tile, most=most or double, batch=batch)


def _nearest(given: Size, low: Size, high: Size | None) -> Size:
    tops = high or given
    rows, columns = (max(a, min(x, c)) for x, a, c in zip(given, low, tops, strict=True))
    return rows, columns


def _told(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def write_kit(model: ModelFile, folder: Path, profile: Profile) -> OpCheck:
    """Write tensorrt.onnx, build.sh, parity.py, parity.npz, onnxruntime_tensorrt.json, README.txt.

    Args:
        model: fp32, fp16 or trt (S8S8) file of `medpsp export`.
        folder: Made where it is missing; files of these names are replaced, all or none.
        profile: Sizes.

    Returns:
        The operators that were looked up.

    Raises:
        ExportError: A U8S8 file, operators that TensorRT lacks, or a copy that computes otherwise.
        ConfigError: A DLA for a quantized file, or the folder is none.
    """
    name, proto = model.path.name, onnx.load(model.path)
    refuse_asymmetric(proto, name)
    quantized = is_quantized(proto)
    if quantized and profile.dla is not None:
        raise ConfigError(f"{name}: a DLA takes no Q/DQ nodes; give the fp16 file")
    half = any(t.data_type == onnx.TensorProto.FLOAT16 for t in proto.graph.initializer)
    kind = "int8" if quantized else "fp16" if half else "fp32"
    changes = make_readable(proto, name)
    found = check_ops(proto, name)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: not a folder; take another one for the kit")
    copy, part = folder / "tensorrt.onnx", folder / ".partial"
    if copy.exists() and copy.samefile(model.path):
        raise ConfigError(f"{folder}: holds the model itself; give another folder")
    with nothing_left(part if folder.exists() else folder):
        part.mkdir(parents=True)
        save(proto, part / copy.name)
        arrays, far = parity_arrays(model, part / copy.name, profile, optimise=not quantized)
        arrays["least_sqnr_db"], arrays["most_changed"] = map(np.array, LIMITS[kind])
        about = {"file": name, "variant": model.meta.get("variant", kind), "kind": kind, "far": far}
        shapes = _write_scripts(part, model.given, profile, arrays, kind)
        about["cases"] = int(arrays["cases"])
        (part / "README.txt").write_text(readme(about, changes, found, shapes), encoding="utf-8")
        for path in sorted(part.iterdir()):
            path.replace(folder / path.name)
        part.rmdir()
    return found


def _write_scripts(
    folder: Path, given: GraphInput, profile: Profile, arrays: dict[str, NDArray[Any]], kind: str
) -> dict[str, str]:
    """What builds and checks the engine; returns its shapes."""
    np.savez_compressed(folder / "parity.npz", **arrays)  # type: ignore[arg-type]
    script = resources.files("medpsp.deploy").joinpath("tensorrtparity.py")
    (folder / "parity.py").write_bytes(script.read_bytes())
    shapes = profile.shapes(given.planes, 0 if given.windows else given.views)
    build = folder / "build.sh"
    build.write_text(build_script(kind, shapes, profile.dla), encoding="utf-8")
    build.chmod(0o755)
    providers = json.dumps(ort_providers(kind, shapes, profile.dla), indent=1)
    (folder / "onnxruntime_tensorrt.json").write_text(providers + "\n", encoding="utf-8")
    return shapes


def parity_arrays(
    model: ModelFile, copy: Path, profile: Profile, optimise: bool
) -> tuple[dict[str, NDArray[Any]], float]:
    """Inputs and what ONNX Runtime makes of them on this CPU.

    Args:
        model: The file as exported.
        copy: The one for TensorRT.
        profile: Sizes.
        optimise: False runs QDQ in float, without the kernels of this CPU, which may saturate.

    Returns:
        Arrays of parity.npz, and the largest difference of the logits of both files, as a share
        of the largest logit.

    Raises:
        ExportError: The two files differ by more than `SAME`, or in a class id that is no tie.
    """
    first, second = (open_session(path, optimise=optimise) for path in (model.path, copy))
    shapes = profile.tried()
    arrays: dict[str, NDArray[Any]] = {"cases": np.array(len(shapes))}
    far = 0.0
    for number, shape in enumerate(shapes):
        feeds = example(model.given, shape, number)
        mask, logits = first.run([MASK, LOGITS], feeds)
        readable = {name: array.astype(np.float32) for name, array in feeds.items()}
        classes, values = second.run([MASK, LOGITS], readable)
        apart = float(np.abs(values - logits).max()) / max(1.0, float(np.abs(logits).max()))
        moved = int(((classes != mask) & clear_pixels(logits)).sum())
        if not apart <= SAME or moved:  # written so that NaN fails
            raise ExportError(
                f"{model.path.name} at (N,H,W)={shape}: its copy for TensorRT differs by "
                f"{apart:.1e} of the largest logit, allowed {SAME:.0e}, and in {moved} class ids "
                "that are no ties"
            )
        far = max(far, apart)
        for name, array in {**readable, MASK: mask, LOGITS: logits}.items():
            arrays[f"{name}_{number}"] = array
    return arrays, far


def example(given: GraphInput, shape: tuple[int, int, int], seed: int) -> Feeds:
    """Smooth hills with some noise over what the windows show.

    Args:
        given: Type, planes and windows of the file.
        shape: (N, H, W).
        seed: Of the hills.

    Returns:
        ``image`` (N, P, H, W), and ``window`` (N, V, 3) where the file takes it.
    """
    number, height, width = shape
    rng = np.random.default_rng(seed)
    y, x = np.linspace(0, 6, height)[:, None], np.linspace(0, 6, width)
    hills = np.empty((number, given.planes, height, width))
    for plane in hills.reshape(-1, height, width):
        a, b, c, d = rng.uniform(1, 7, 4)
        plane[:] = np.sin(a * y + b) * np.sin(c * x + d)
    rows = window_rows(given.windows) if given.windows else np.array([[0, 255, 0]], np.float32)
    low = float((rows[:, 0] - rows[:, 2] * rows[:, 1] / 2).min())  # a SIGMOID has its centre there
    high = low + float(rows[:, 1].max())
    noise = rng.normal(0, 0.03, hills.shape)
    values = (low + high) / 2 + (high - low) * (0.45 * hills + noise)
    if given.dtype != "float32":
        limits = np.iinfo(given.dtype)
        values = np.clip(np.round(values), limits.min, limits.max)
    image = values.astype(given.dtype)
    if given.windows:
        return {IMAGE: image}
    return {IMAGE: image, WINDOW: np.tile(rows, (number, given.views, 1))}
