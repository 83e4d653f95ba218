"""Numbers and lists in lines for people."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

_SHOWN = frozenset(
    ".dcm .ima .nii .nii.gz .nrrd .mha .mhd .png .jpg .jpeg .tif .tiff .bmp .txt .csv .tsv .json "
    ".xml .yaml .md .pdf .html .zip .tar .gz .7z .rar .mat .npy .npz .h5 .img .hdr .raw .stl .obj "
    ".ply .xlsx .docx .log .py".split()
)
"""Ends of names that are shown; any other may be of a patient's name."""
OTHERS = "other"
ODD = re.compile(r"[\\\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""What a DICOM text of one value does not take (PS3.5 6.2), such as the name of a class."""


def many(count: int, one: str) -> str:
    """A number of things: 1 patient, 2 patients, 2 series, 2 classes."""
    if count == 1:
        return f"{count} {one}"
    end = "es" if one.endswith(("ss", "ch")) else "" if one.endswith("s") else "s"
    return f"{count} {one}{end}"


def listed(words: Sequence[str]) -> str:
    """Words with commas, and an "and"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def end_of(name: str) -> str:
    """What a name ends in, of lower case; empty where that may be of a patient's name."""
    ends = PurePosixPath(name.lower()).suffixes
    return next((end for end in ("".join(ends[-2:]), "".join(ends[-1:])) if end in _SHOWN), "")


def ends_of(names: Iterable[str]) -> str:
    """How many names there are of each kind, by what they end in; nothing else of them."""
    counts = Counter(end_of(name) or OTHERS for name in names)
    often = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return listed([f"{count} {end}" for end, count in often]) if often else "none"
