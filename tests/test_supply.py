"""What an install takes: hashes, licences, the bill of materials, advisories."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
import tomllib
import uuid
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.licenses import canonicalize_license_expression
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from medpsp.deploy.packages import installed, requirement_graph
from medpsp.deploy.sbom import bill_of_install
from medpsp.errors import ExportError
from tests import audit, licences
from tests.licences import BUNDLED, REASONS, ROOT, gnu_texts, pins, reason_for, stated, suits

CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")
HASHES = (ROOT / ".ci/hashes.txt").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# hashes -----------------------------------------------------------------------------------------


def test_every_pin_has_hashes_and_nothing_else_stands_there() -> None:
    blocks = re.split(r"\n(?=\S)", HASHES.rstrip("\n"))
    heads, pinned = blocks[:2], blocks[2:]
    assert all(line.startswith("# ") for line in heads)
    marker = r"(?: ; [\w .'\"<>=!()]+)?"
    digest = r"(?: \\\n    --hash=sha256:[0-9a-f]{64})+"
    odd = [b for b in pinned if not re.fullmatch(rf"[a-z0-9.-]+==[\w.]+{marker}{digest}", b)]
    assert odd == []
    assert len(pinned) == len(pins()) > 100
    assert "://" not in HASHES + CONSTRAINTS


def test_constraints_are_the_same_versions_without_hashes() -> None:
    """With hashes in them pip would refuse medpsp itself, which has none."""
    lines = [line for line in CONSTRAINTS.splitlines() if not line.startswith("#")]
    assert sorted(lines) == sorted(f"{name}=={version}" for name, version in pins().items())


def test_every_requirement_has_a_pin_that_it_allows() -> None:
    project = PROJECT["project"]
    asked = [project["dependencies"], *project["optional-dependencies"].values()]
    asked += [PROJECT["build-system"]["requires"]]
    known, seen = pins(), 0
    for one in map(Requirement, (line for some in asked for line in some)):
        name = canonicalize_name(one.name)
        if name != "medpsp":
            assert one.specifier.contains(known[name], prereleases=True), one
            seen += 1
    assert seen > 40


def test_all_that_an_install_brought_is_pinned() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    assert set(installed("medpsp", extras)) - {"medpsp"} - set(pins()) == set()


def test_what_builds_is_there_before_anything_is_built() -> None:
    """`make` has pip install these with their hashes, and then builds without isolation."""
    found = re.search(r"^BUILDERS := (\S+)$", MAKEFILE, re.MULTILINE)
    assert found
    builders = found[1].split("|")
    needed = {*installed("hatchling"), *installed("setuptools"), "uv"}
    assert needed == set(builders) == set(builders) & set(pins())


def test_make_takes_nothing_without_a_hash() -> None:
    (recipe,) = re.findall(r"^\$\(READY\):.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    taken = re.findall(r"pip install (.*)", recipe)
    assert len(taken) == 4
    for words in taken:
        hashed = re.search(r"\$\(HASHED\) (\$\(HASHES\)|\$\(VENV\)/builders\.txt)", words)
        assert hashed or words == "--quiet --no-deps --no-build-isolation --editable ."
    assert "HASHED := --quiet --require-hashes --no-build-isolation --requirement\n" in MAKEFILE


def write_wheel(folder: Path) -> str:
    """A wheel of one module; its SHA-256."""
    path, info = folder / "tampered-1.0-py3-none-any.whl", "tampered-1.0.dist-info"
    files = {
        "tampered.py": "",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: tampered\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
    }
    record = ""
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
            record += f"{name},sha256={digest.decode().rstrip('=')},{len(text)}\n"
        archive.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("tool", ["uv", "pip"])
def test_a_file_with_another_hash_is_refused(tmp_path: Path, tool: str) -> None:
    """Off line: the index is a folder."""
    digest, asked = write_wheel(tmp_path), tmp_path / "asked.txt"
    uv = [str(Path(sys.executable).parent / "uv"), "pip", "install", "--python", sys.executable]
    start = uv if tool == "uv" else [sys.executable, "-m", "pip", "install"]
    where = ["--no-index", "--find-links", str(tmp_path), "--target", str(tmp_path / "site")]
    command = [*start, "--quiet", "--require-hashes", "--no-build-isolation", *where, "-r"]
    for text in ("", f" --hash=sha256:{'0' * 64}"):
        asked.write_text(f"tampered==1.0{text}\n")
        done = subprocess.run([*command, asked], capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert "hash" in done.stderr.lower()
        assert not list(tmp_path.rglob("tampered.py"))
    asked.write_text(f"tampered==1.0 --hash=sha256:{digest}\n")
    subprocess.run([*command, asked], capture_output=True, check=True)
    assert (tmp_path / "site/tampered.py").is_file()


# licences ---------------------------------------------------------------------------------------


def rows() -> dict[str, tuple[str, str]]:
    """Name to version and licence, with its mark, of the page."""
    page = (ROOT / "docs/licences.md").read_text(encoding="utf-8").partition("## Why")[0]
    found = re.findall(r"^\| ([a-z0-9.-]+) \| (\d\S*) \| ([^|]+) \| \w+ \|$", page, re.MULTILINE)
    return {name: (version, licence) for name, version, licence in found}


def test_the_page_lists_every_pin_with_the_licence_it_states() -> None:
    table, known = rows(), pins()
    how = "python -m tests.licences >docs/licences.md"
    assert {name: version for name, (version, _) in table.items()} == known, how
    seen = 0
    for name, (version, licence) in table.items():
        try:
            here = distribution(name)
        except PackageNotFoundError:  # of another platform or Python
            continue
        if here.version == version:
            said = re.sub(r" \([a-z0-9-]+\)$", "", licence)
            assert said == (stated(here) or "none stated"), how
            seen += 1
    assert seen > 20


def test_every_licence_suits_or_has_a_reason() -> None:
    for name, (_, licence) in rows().items():
        said = re.sub(r" \([a-z0-9-]+\)$", "", licence)
        assert suits(said) or reason_for(name, said), f"{name}: {said}"
    table = rows()
    assert [name for name in REASONS if suits(table[name][1])] == []  # needed no more
    assert table["albumentations"] == ("2.0.8", "MIT License")


@pytest.mark.parametrize(
    "licence",
    [
        *("GPL-3.0-only", "MIT AND AGPL-3.0-or-later", "SSPL-1.0", "CC-BY-NC-4.0", "", "Other"),
        *("LGPL-2.1-or-later", "Proprietary", "GNU General Public License v3 (GPLv3)"),
        *("BSD License and GNU Affero General Public License v3", "(MIT OR ISC) AND GPL-2.0-only"),
    ],
)
def test_a_licence_that_does_not_suit_is_found(licence: str) -> None:
    assert not suits(licence)
    assert reason_for("some-package", licence) == ""


def test_a_choice_suits_where_one_side_does() -> None:
    assert suits("MIT OR GPL-2.0-only")
    assert suits("Apache-2.0 AND BSD-3-Clause")
    assert not suits("MIT AND GPL-2.0-only OR AGPL-3.0-only")


def test_gnu_licences_within_wheels_are_known() -> None:
    found = {
        name for name, of in installed("medpsp", licences.EXTRAS[1:]).items() if any(gnu_texts(of))
    }
    assert found <= set(BUNDLED)
    assert "numpy" in found  # libgfortran


# bill of materials ------------------------------------------------------------------------------

COMPONENT = {"type", "bom-ref", "name", "version", "purl", "scope", "licenses"}


def licence_is_valid(choice: dict[str, Any]) -> bool:
    """CycloneDX 1.6, licenseChoice: an SPDX expression alone, or a license with an id or a name."""
    if set(choice) == {"expression"}:
        return bool(canonicalize_license_expression(choice["expression"]))
    return set(choice) == {"license"} and set(choice["license"]) == {"name"}


def test_the_bill_of_an_install_follows_cyclonedx_1_6() -> None:
    bill = bill_of_install()
    assert set(bill) == {
        *("bomFormat", "specVersion", "version", "serialNumber"),
        *("metadata", "components", "dependencies"),
    }
    assert (bill["bomFormat"], bill["specVersion"], bill["version"]) == ("CycloneDX", "1.6", 1)
    assert bill["serialNumber"] == f"urn:uuid:{uuid.UUID(bill['serialNumber'][9:])}"
    own = bill["metadata"]["component"]
    assert (own["type"], own["name"]) == ("application", "medpsp")
    parts = [own, *bill["components"]]
    for part in parts:
        assert set(part) <= COMPONENT
        assert part["type"] in ("application", "library", "platform")
        assert part.get("scope", "required") in ("required", "optional")
        assert part["type"] == "platform" or re.fullmatch(r"pkg:pypi/[a-z0-9.-]+@\S+", part["purl"])
        assert len(part.get("licenses", ())) <= 1
        assert all(map(licence_is_valid, part.get("licenses", ())))
    refs = [part["bom-ref"] for part in parts]
    assert len(set(refs)) == len(refs)
    named = [one["ref"] for one in bill["dependencies"]]
    assert sorted(named) == sorted(set(refs) - {"python"})
    for one in bill["dependencies"]:
        assert len(set(one["dependsOn"])) == len(one["dependsOn"])
        assert set(one["dependsOn"]) <= set(refs)


def test_the_bill_says_what_is_installed_and_what_asked_for_it() -> None:
    bill = bill_of_install()
    parts = {part["name"]: part for part in bill["components"]}
    graph = {one["ref"]: one["dependsOn"] for one in bill["dependencies"]}
    for name, of in installed("medpsp").items():
        if name != "medpsp":
            assert (parts[name]["version"], parts[name]["scope"]) == (of.version, "required")
    assert parts["torch"]["scope"] == parts["pytest"]["scope"] == "optional"
    pydantic, core = parts["pydantic"]["purl"], parts["pydantic-core"]["purl"]
    assert core in graph[pydantic]
    assert pydantic in graph[bill["metadata"]["component"]["bom-ref"]]
    assert bill == bill_of_install()


def test_extras_of_requirements_count() -> None:
    """zarr and others ask for `name[extra]`, and so does medpsp for its own extras."""
    graph = requirement_graph("medpsp", ["docs"])
    assert "mkdocstrings-python" in graph  # of mkdocstrings[python]
    assert "mkdocstrings-python" in graph["mkdocstrings"][1]
    assert "torch" not in graph
    assert "torch" in installed("medpsp", ["all"])


def test_a_bill_of_what_is_not_installed_is_one_line() -> None:
    with pytest.raises(ExportError, match="nosuch is on the path, but not installed"):
        bill_of_install("nosuch")


# advisories -------------------------------------------------------------------------------------


def asked(*packages: dict[str, Any]) -> str:
    return json.dumps({"dependencies": packages, "fixes": []})


CLEAN: dict[str, Any] = {"name": "a", "version": "1", "vulns": []}
BAD = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2"]}


@pytest.mark.parametrize(
    ("told", "problem", "code", "said"),
    [
        (asked(CLEAN), "", 0, "1 packages were asked about"),
        (asked(CLEAN, {**CLEAN, "vulns": [BAD]}), "", 1, "a 1: PYSEC-1, CVE-1; mended in 2"),
        (
            "",
            "Traceback\nConnectionError: no name",
            2,
            "nothing is known: ConnectionError: no name",
        ),
        ("", "", 2, "nothing is known: it said nothing"),
        (
            asked(CLEAN, {"name": "b", "skip_reason": "not found"}),
            "",
            2,
            "about 1 of 2 packages: b",
        ),
        (asked(), "", 2, "about 0 of 0"),
    ],
)
def test_an_audit_says_what_it_knows(told: str, problem: str, code: int, said: str) -> None:
    """pip-audit ends with 0 and "No known vulnerabilities" where it could ask about none."""
    found, lines = audit.verdict(told, problem)
    assert found == code
    assert said in "\n".join(lines)
