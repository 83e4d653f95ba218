"""Software bills of materials in CycloneDX 1.6 JSON (ECMA-424): of a model file, of an install.

Written by hand, since cyclonedx-python-lib would bring six more packages for these few fields. No
time and no random number goes into it: the same parts give the same bytes.
"""

from __future__ import annotations

import json
import platform
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from medpsp.deploy.packages import find, installed, library, name_of, requirement_graph
from medpsp.errors import ExportError

RUNNER = "medpsp"
"""The distribution whose base requirements are what a device installs."""

MAKERS = ("onnx", "onnxscript", "timm", "torch", "torchvision")
"""Distributions that made the file and are not on a device."""

SHA256 = re.compile(r"[0-9a-f]{64}")
SUBJECT = "medpsp-model"


def bill_of_materials(
    files: Sequence[Mapping[str, Any]], model: Mapping[str, Any], manifest: str
) -> dict[str, Any]:
    """The document.

    Args:
        files: Model files; ``name``, ``variant`` and ``sha256`` (64 hexadecimal digits) each.
        model: Metadata of the files; ``intended_use`` and ``licence`` are used where they are.
        manifest: Digest of the training manifest; empty where it is not known.

    Returns:
        JSON values. Components: model files (``machine-learning-model``), training data (``data``),
        what a device installs (``required``) and what made the files (``excluded``: CycloneDX 1.6
        for what is not there at run time).
    """
    runtime = installed(RUNNER)
    parts = [library(d, "required") for d in runtime.values() if name_of(d) != RUNNER]
    makers = {name_of(d): d for name in MAKERS if (d := find(name)) and name_of(d) not in runtime}
    parts += [library(d, "excluded") for d in makers.values()]
    parts += [_model(file, model) for file in files]
    if manifest:
        parts.append(_data(manifest))
    parts.sort(key=lambda part: str(part["bom-ref"]))
    tool = library(runtime[RUNNER], "") if RUNNER in runtime else {}
    subject = {
        "type": "application",
        "bom-ref": SUBJECT,
        "name": "segmentation model and its runner",
        "version": f"step {model.get('step', 'unknown')}",
    }
    bill: dict[str, Any] = {
        "metadata": {"component": subject},
        "components": parts,
        "dependencies": [{"ref": SUBJECT, "dependsOn": [part["bom-ref"] for part in parts]}],
    }
    if tool:
        bill["metadata"]["tools"] = {"components": [tool]}
    return _numbered(bill)


def bill_of_install(root: str = RUNNER) -> dict[str, Any]:
    """The document of a whole install: what ``root`` brought, what brought what, and Python.

    Components of its base are ``required``, those that only extras bring ``optional``.

    Raises:
        ExportError: ``root`` is not installed.
    """
    subject = find(root)
    if subject is None:
        raise ExportError(
            f"{root} is on the path, but not installed, so nothing says what it needs; "
            f"pip install {root}, or `make` in the source tree"
        )
    extras = [str(name) for name in subject.metadata.get_all("Provides-Extra") or ()]
    base, whole = installed(root), requirement_graph(root, extras)
    parts = {
        name: library(of, "required" if name in base else "optional")
        for name, (of, _) in whole.items()
    }
    refs = {name: part["bom-ref"] for name, part in parts.items()}
    own = {**parts.pop(name_of(subject)), "type": "application"}
    python = {
        "type": "platform",
        "bom-ref": "python",
        "name": platform.python_implementation(),
        "version": platform.python_version(),
        "scope": "required",
    }
    bill = {
        "metadata": {"component": {k: v for k, v in own.items() if k != "scope"}},
        "components": [*parts.values(), python],
        "dependencies": [
            {"ref": refs[name], "dependsOn": [refs[other] for other in sorted(needs)]}
            for name, (_, needs) in whole.items()
        ],
    }
    return _numbered(bill)


def _numbered(bill: Mapping[str, Any]) -> dict[str, Any]:
    """With what heads every document; its serial number is a digest of the rest."""
    head = {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1}
    content = json.dumps({**head, **bill}, sort_keys=True)
    return {**head, **bill, "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, content)}"}


def _model(file: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    part: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": f"model:{file['sha256']}",
        "name": str(file["name"]),
        "version": str(file["variant"]),
        "hashes": [{"alg": "SHA-256", "content": str(file["sha256"])}],
    }
    if use := model.get("intended_use"):
        part["description"] = str(use)
    if licence := model.get("licence"):
        part["licenses"] = [{"license": {"name": str(licence)}}]
    return part


def _data(manifest: str) -> dict[str, Any]:
    part: dict[str, Any] = {
        "type": "data",
        "bom-ref": f"data:{manifest}",
        "name": "training manifest",
        "version": manifest,
        "data": [{"type": "dataset", "name": "training manifest"}],
    }
    if SHA256.fullmatch(manifest):
        part["hashes"] = [{"alg": "SHA-256", "content": manifest}]
    return part
