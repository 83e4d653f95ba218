"""Python and what medpsp stands on: there, new enough, importable, and the right `launch`."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

from launch.doctor.rows import Row, note, ok, private, problem

if TYPE_CHECKING:
    from packaging.requirements import Requirement

EXTRAS = {
    "shards": "medpsp shards",
    "train": "medpsp train",
    "export": "medpsp export",
    "cluster": "medpsp run --cluster",
    "receive": "medpsp receive",
}
"""What each is for."""
MODULES = {
    "google-crc32c": "google_crc32c",
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "pyyaml": "yaml",
}
"""Of distributions whose module has another name."""
NEED_TORCH = ("albumentations", "deepspeed", "timm", "torchvision")
"""Import torch themselves, where it is."""
SHOWN = 6
SEARCH_S = 8.0
_FIND = """
import importlib.util
found = importlib.util.find_spec("launch")
places = [found.origin or "", *(found.submodule_search_locations or [])] if found else [""]
print(next(filter(None, places), ""))
"""


def python_row() -> list[Row]:
    """The interpreter."""
    here = platform.python_version()
    try:
        wanted = distribution("medpsp").metadata["Requires-Python"]
    except PackageNotFoundError:
        return [
            note(
                "Python",
                f"{here}; medpsp is on the path, but not installed: its requirements are not known",
                "pip install medpsp, or `pip install -e .` in the source tree",
            )
        ]
    from packaging.specifiers import SpecifierSet

    if here not in SpecifierSet(wanted):
        todo = "make a virtual environment with another Python"
        return [problem("Python", f"{here}, expected {wanted}", todo)]
    return [ok("Python", here)]


def requirements() -> dict[str, list[Requirement]]:
    """What the installed medpsp asks for: of the base ("") and of each extra beyond those before.

    Empty where medpsp is not installed.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    try:
        asked = [Requirement(text) for text in distribution("medpsp").requires or []]
    except PackageNotFoundError:
        return {}
    found: dict[str, list[Requirement]] = {}
    seen = {"medpsp"}
    for one in asked:
        one.name = canonicalize_name(one.name)
    for extra in ("", *EXTRAS):
        own = [one for one in asked if not one.marker or one.marker.evaluate({"extra": extra})]
        found[extra] = [one for one in own if one.name not in seen]
        seen |= {one.name for one in own}
    return found


def package_rows(needed: list[str]) -> list[Row]:
    """A row for the base and one for each extra.

    Args:
        needed: Extras whose packages must be there.
    """
    rows = []
    for extra, wanted in requirements().items():
        what = f"medpsp[{extra}]" if extra else "packages"
        versions = {one.name: version_of(one.name) for one in wanted}
        missing = [one for one in wanted if versions[one.name] is None]
        wrong = [
            one
            for one in wanted
            if (version := versions[one.name])
            and not one.specifier.contains(version, prereleases=True)
        ]
        if missing:
            found = "missing: " + ", ".join(one.name for one in missing)
            install = "pip install " + " ".join(f"'{_plain(one)}'" for one in missing)
            if not extra or extra in needed:
                rows.append(problem(what, found, f"pip install '{what}'" if extra else install))
            else:
                rows.append(note(what, found, f"for `{EXTRAS[extra]}`: pip install '{what}'"))
        rows += [
            problem(
                what,
                f"{one.name} {versions[one.name]}, expected {one.specifier}",
                f"pip install '{_plain(one)}'",
            )
            for one in wrong
        ]
        if there := [one.name for one in wanted if versions[one.name] and one not in wrong]:
            rows.append(ok(what, ", ".join(f"{name} {versions[name]}" for name in there)))
    return rows


def _plain(one: Requirement) -> str:
    return f"{one.name}{one.specifier}"


def version_of(name: str) -> str | None:
    """Of an installed distribution; None where there is none."""
    try:
        return distribution(name).version
    except (PackageNotFoundError, KeyError):  # KeyError: metadata without a version
        return None


def tested_row() -> list[Row]:
    """Whether the versions are those of constraints.txt, which are tested together."""
    from packaging.requirements import Requirement

    from launch.rundir import data_folder

    file = data_folder("configs").parent / "constraints.txt"
    lines = file.read_text(encoding="utf-8").splitlines()
    pins = {r.name: r for r in map(Requirement, (x for x in lines if x and x[0] != "#"))}
    others = []
    for one in [one for own in requirements().values() for one in own]:
        version, pin = version_of(one.name), pins.get(one.name)
        if version and pin and not pin.specifier.contains(version, prereleases=True):
            others.append(f"{one.name} {version} ({str(pin.specifier).strip('=')})")
    if not others:
        return [ok("tested versions", "all as in constraints.txt")]
    more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
    found = f"others than in constraints.txt: {', '.join(others[:SHOWN])}{more}"
    todo = "nothing while all works; else install again with `--constraint constraints.txt`"
    return [note("tested versions", found, todo)]


def importable(needed: Iterable[str]) -> dict[str, str]:
    """Distribution to module, of all that is installed; those that others import first.

    Args:
        needed: Extras, and "" for the base.
    """
    wanted = requirements()
    names = [one.name for extra in needed for one in wanted.get(extra, [])]
    names.sort(key=lambda name: (name in NEED_TORCH, name != "torch"))
    return {n: MODULES.get(n, n.replace("-", "_")) for n in names if version_of(n)}


def import_row(name: str, module: str) -> list[Row]:
    """Import one package; the caller bears what that may do to the process."""
    try:
        importlib.import_module(module)
    except Exception as error:  # noqa: BLE001 - packages of unlike versions raise anything
        from launch.diagnose import diagnosis

        again = f"pip install --force-reinstall '{name}'"
        line = diagnosis(error) if isinstance(error, ImportError | OSError) else None
        if line is None:
            line = f"{type(error).__name__}: {private(error)}; {again}"
        found, _, todo = line.rpartition("; ")
        said = private(found).removeprefix(f"{module} ")
        return [problem("imports", f"{name}: {said}", todo.removeprefix("install it again: "))]
    return [ok("imports", name)]


def launch_row() -> list[Row]:
    """Whether processes that are started from here find our `launch`: ROS 2 has one, too."""
    import launch

    ours = Path(str(launch.__file__)).resolve().parent
    done = subprocess.run(
        [sys.executable, "-c", _FIND],
        capture_output=True,
        text=True,
        timeout=SEARCH_S,
        check=False,
    )
    found = Path(done.stdout.strip()) if done.stdout.strip() else None
    if found is None:
        todo = "pip install medpsp, or put the source tree on PYTHONPATH"
        return [problem("launch", "jobs and ranks that start here find no package `launch`", todo)]
    folder = (found if found.is_dir() else found.parent).resolve()
    if folder != ours:
        text = f"jobs and ranks that start here would import another one, {private(folder)}"
        return [problem("launch", text, _way_out(folder))]
    return [_other_launch(ours) or ok("launch", "of medpsp")]


def _way_out(folder: Path) -> str:
    if folder.parent == Path.cwd():
        return "give the command from another folder: Python looks into the current one first"
    paths = [Path(entry).resolve() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    if folder.parent in paths:
        return (
            f"take {private(folder.parent)} out of PYTHONPATH, for example with `unset PYTHONPATH`"
        )
    return "install medpsp into a virtual environment of its own"


def _other_launch(ours: Path) -> Row | None:
    todo = "install medpsp into a virtual environment of its own"
    try:
        other: Distribution | None = distribution("launch")
    except PackageNotFoundError:
        other = None
    if other and Path(str(other.locate_file("launch"))).resolve() == ours:
        text = "ROS 2's is in the same folder: files of one may have replaced those of the other"
        return problem("launch", text, todo)
    for entry in sys.path:
        place = Path(entry or ".") / "launch"
        if (place / "__init__.py").is_file() and place.resolve() != ours:
            text = f"of medpsp; another one is further back on the path, {private(place)}"
            keep = "keep one of them in this environment: which is taken depends on the order"
            return note("launch", text, keep)
    return None
