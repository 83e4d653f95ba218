"""A software bill of materials in CycloneDX 1.6 JSON (ECMA-424): what a model file is made of.

Written by hand, since cyclonedx-python-lib would bring six more packages for these few fields. No
time and no random number goes into it: the same parts give the same bytes.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from typing import Any

RUNNER = "medpsp"
"""The distribution whose base requirements are what a device installs."""

MAKERS = ("onnx", "onnxscript", "timm", "torch", "torchvision")
"""Distributions that made the file and are not on a device."""

SHA256 = re.compile(r"[0-9a-f]{64}")
SUBJECT = "medpsp-model"
LONGEST_LICENCE = 64
"""Characters; some distributions put the whole text into the field."""


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
    parts = [_library(d, "required") for d in runtime.values() if _name(d) != RUNNER]
    makers = {_name(d): d for name in MAKERS if (d := _found(name)) and _name(d) not in runtime}
    parts += [_library(d, "excluded") for d in makers.values()]
    parts += [_model(file, model) for file in files]
    if manifest:
        parts.append(_data(manifest))
    parts.sort(key=lambda part: str(part["bom-ref"]))
    tool = _library(runtime[RUNNER], "") if RUNNER in runtime else {}
    subject = {
        "type": "application",
        "bom-ref": SUBJECT,
        "name": "segmentation model and its runner",
        "version": f"step {model.get('step', 'unknown')}",
    }
    bill: dict[str, Any] = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": subject},
        "components": parts,
        "dependencies": [{"ref": SUBJECT, "dependsOn": [part["bom-ref"] for part in parts]}],
    }
    if tool:
        bill["metadata"]["tools"] = {"components": [tool]}
    content = json.dumps(bill, sort_keys=True)
    return {**bill, "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, content)}"}


def installed(root: str) -> dict[str, Distribution]:
    """A distribution and, by name, all that its base requirements have brought here.

    Extras are left out, and what is not installed; empty where ``root`` is not.
    """
    found: dict[str, Distribution] = {}
    waiting = [root]
    while waiting:
        here = _found(waiting.pop())
        if here is None or _name(here) in found:
            continue
        found[_name(here)] = here
        waiting += _required(here.requires or ())
    return dict(sorted(found.items()))


def _required(lines: Iterable[str]) -> list[str]:
    """Names of requirements, without those of extras."""
    names = []
    for line in lines:
        wanted, _, marker = line.partition(";")
        if not re.search(r"\bextra\b", marker):
            names.append(re.split(r"[^A-Za-z0-9._-]", wanted.strip(), maxsplit=1)[0])
    return names


def _found(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _name(of: Distribution) -> str:
    """As PyPI and purl spell it."""
    return re.sub(r"[-_.]+", "-", str(of.metadata["Name"])).lower()


def _library(of: Distribution, scope: str) -> dict[str, Any]:
    name = _name(of)
    purl = f"pkg:pypi/{name}@{of.version.replace('+', '%2B')}"
    part: dict[str, Any] = {
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": of.version,
        "purl": purl,
    }
    if scope:
        part["scope"] = scope
    if licence := _licence(of):
        part["licenses"] = [licence]
    return part


def _licence(of: Distribution) -> dict[str, Any]:
    """The SPDX expression (PEP 639), else what the distribution says in words."""

    def field(name: str) -> list[str]:
        return [str(text) for text in of.metadata.get_all(name) or ()]

    if expression := field("License-Expression"):
        return {"expression": expression[0]}
    classified = {
        text.rsplit("::", 1)[1].strip()
        for text in field("Classifier")
        if text.startswith("License ::")
    }
    said = [text.strip() for text in field("License") if len(text) <= LONGEST_LICENCE]
    name = " and ".join(sorted(classified - {"OSI Approved"})) or " ".join(said)
    return {"license": {"name": name}} if name else {}


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
