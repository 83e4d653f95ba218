"""A file of `medpsp export`: its graph, and what it says of itself."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from medpsp.deploy.inputs import GraphInput
from medpsp.deploy.session import (
    IMAGE,
    OUTPUTS,
    WINDOW,
    class_masks,
    feeds_of,
    open_session,
    run_graph,
)
from medpsp.dicom.nifti import Axes
from medpsp.errors import ModelFileError, NoModelFile
from medpsp.machine import whole_cores
from medpsp.tiles import Tiling
from medpsp.types import FloatArray, ReadPolicy, Window
from medpsp.words import ODD

log = logging.getLogger("medpsp")
MOST = 8192
"""Rows or columns of a tile."""
PROBE = 32
"""Rows and columns of the image by which graph and metadata are compared."""


def _why_not_there(path: Path) -> str:
    """A dossier beside it may say that its export refused it."""
    try:
        told = json.loads((path.parent / "dossier.json").read_text(encoding="utf-8"))
        gates = [one["gate"] for one in told["refusals"] if one["file"] == path.name]
    except (OSError, ValueError, KeyError, TypeError):
        gates = []
    if gates:
        return f"its export refused it ({', '.join(gates)}); dossier.html beside it says why"
    return "no such file; give the .onnx of `medpsp export`"


class ModelFile:
    """A model file with the windows and the classes that it carries.

    Args:
        path: ONNX file written by `medpsp export`.
        threads: CPU threads, no more than our cores; 0 for all. On 2 cores 64 threads took 322 ms a
            slice and 2 took 10; 100000 had not begun after 100 s.

    Attributes:
        classes: Names; the first is the background.
        codes: Coded terms of classes: name to category and type, three texts each.
        modalities: It was trained on.
        doubts: What held-out patients say against a class; logged as a warning, too.
        window: Fixed for all series, if any.
        axes: Which way columns, rows and slices of the training series run; None without geometry.
        header_window: Each slice by the window of its header.
        policy: How training read its archive.
        meta: All of the metadata.
        times: Seconds of the network for a slice, of each batch so far.

    Raises:
        ModelFileError: Not an ONNX file, or not one of ours.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        if not path.is_file():
            raise NoModelFile(f"model {path}: {_why_not_there(path)}")
        try:
            self.session = open_session(path, min(threads, whole_cores()))
        except Exception as error:  # noqa: BLE001 - ORT's errors share no base but Exception
            kind = type(error).__name__
            what = "is not an ONNX file, or a damaged one"
            if kind != "InvalidProtobuf" and path.stat().st_size:
                what = f"onnxruntime cannot load it ({kind})"
            raise ModelFileError(
                f"model {path}: {what}; give the .onnx of `medpsp export`"
            ) from None
        self.path = path
        self.times: list[float] = []
        self.meta = read_metadata(path, self.session)
        try:
            self._parse(self.meta)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ModelFileError(
                f"model {path}: its metadata is damaged ({type(error).__name__})"
            ) from None
        if fault := self._misfit():
            raise ModelFileError(f"model {path}: metadata and graph do not fit: {fault}")
        for name, doubt in self.doubts.items():
            log.warning("model %s: %s was found %s", path, name, doubt)

    def _parse(self, meta: Mapping[str, Any]) -> None:
        self.classes, self.modalities = _names(meta, "classes"), _names(meta, "modalities")
        axes = meta.get("axes")
        self.axes: Axes | None = tuple((int(a), int(s)) for a, s in axes) if axes else None
        if self.axes and (
            sorted(axis for axis, _ in self.axes) != [0, 1, 2]
            or any(abs(sign) != 1 for _, sign in self.axes)
        ):
            raise ValueError("axes")
        self.codes: dict[str, dict[str, list[str]]] = dict(meta.get("codes", {}))
        if not all(_is_term(term) for terms in self.codes.values() for term in terms.values()):
            raise ValueError("codes")
        self.doubts: dict[str, str] = dict(meta.get("doubts", {}))
        if set(self.doubts) - set(self.classes) or any(map(ODD.search, self.doubts.values())):
            raise ValueError("doubts")
        window = meta["window"]
        self.window = Window(**window) if window else None
        self.header_window = bool(meta.get("header_window", False))
        self.views = tuple(Window(**window) for window in meta.get("windows", ()))
        self.given = GraphInput.from_json(meta["input"])
        rows, columns = meta["tile"]["size"]
        if not all(isinstance(side, int) and side <= MOST for side in (rows, columns)):
            raise ValueError("tile")
        self.tiling = Tiling((rows, columns), float(meta["tile"]["overlap"]))
        self.policy = ReadPolicy(modalities=self.modalities, **meta.get("policy", {}))
        for name, kind in get_type_hints(ReadPolicy).items():
            if get_origin(kind) is Literal and getattr(self.policy, name) not in get_args(kind):
                raise ValueError(name)
        known = [self.window, *self.views, *self.given.windows]
        if not all(math.isfinite(w.center) and 0 < w.width < math.inf for w in known if w):
            raise ValueError("window")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def masks(self, image: NDArray[Any], window: FloatArray) -> NDArray[np.uint8]:
        """(N, H, W) class ids of (N, P, H, W) modality values seen through (N, V, 3) windows."""
        rows = None if self.given.windows else window
        began = time.perf_counter()
        masks = class_masks(self.session, self.given, image, rows, self.tiling)
        self.times.append((time.perf_counter() - began) / len(masks))
        return masks

    def _misfit(self) -> str:
        """Why masks would be named or windowed wrongly; empty where they would not."""
        given, inputs = self.given, {i.name: i for i in self.session.get_inputs()}
        names = [IMAGE] if given.windows else [IMAGE, WINDOW]
        if sorted(inputs) != names:
            return f"inputs {', '.join(sorted(inputs))}, expected {', '.join(names)}"
        types = {"int16": "tensor(int16)", "uint8": "tensor(uint8)", "float32": "tensor(float)"}
        image = inputs[IMAGE]
        if image.shape[1:2] != [given.planes] or image.type != types[given.dtype]:
            return f"the input is not image (N, {given.planes}, H, W) of {given.dtype}"
        if (len(self.views) or 1) != given.views:
            return f"{len(self.views)} windows, the graph has {given.views}"
        probe = np.zeros((1, given.planes, PROBE, PROBE), dtype=given.dtype)
        window = None if given.windows else np.ones((1, given.views, 3), np.float32)
        try:
            found = run_graph(self.session, feeds_of(probe, window), *OUTPUTS)
        except Exception as error:  # noqa: BLE001 - ORT's errors share no base but Exception
            return f"it does not run ({type(error).__name__})"
        shapes, size = [one.shape for one in found], (PROBE, PROBE)
        wanted = [(1, *size), (1, len(self.classes), *size)]
        return "" if shapes == wanted else f"outputs {shapes}, expected {wanted}"


def _names(meta: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """At least one; they stand in messages, pictures and names of files."""
    found = meta[key]
    if not isinstance(found, list) or not found:
        raise ValueError(key)
    if not all(isinstance(name, str) and name.strip() and not ODD.search(name) for name in found):
        raise ValueError(key)
    return tuple(found)


def _is_term(term: object) -> bool:
    """Scheme, value and meaning, as `exportconfig.Term`."""
    if not isinstance(term, list) or not all(isinstance(text, str) for text in term):
        return False
    scheme, value, meaning = (len(text) for text in term)
    return 0 < scheme <= 16 and 0 < value <= 16 and 0 < meaning <= 64


def read_metadata(path: Path, session: ort.InferenceSession) -> dict[str, Any]:
    """What `medpsp export` wrote into a file.

    Raises:
        ModelFileError: Nothing, or not in this version's form.
    """
    text = session.get_modelmeta().custom_metadata_map.get("medpsp")
    if text is None:
        raise ModelFileError(
            f"model {path}: an ONNX file, but not from `medpsp export` (no 'medpsp' metadata)"
        )
    try:
        meta = json.loads(text)
    except ValueError as error:
        raise ModelFileError(
            f"model {path}: its metadata is damaged ({type(error).__name__})"
        ) from None
    if not isinstance(meta, dict) or not meta:
        raise ModelFileError(f"model {path}: its metadata is damaged (no table of names)")
    if "input" not in meta:
        raise ModelFileError(f"model {path}: of an earlier version; export it again")
    return meta
