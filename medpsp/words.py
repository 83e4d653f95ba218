"""Numbers and lists in lines for people."""

from __future__ import annotations

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


def many(count: int, one: str) -> str:
    """A number of things: 1 patient, 2 patients, 2 series, 2 classes."""
    if count == 1:
        return f"{count} {one}"
    end = "es" if one.endswith(("ss", "ch")) else "" if one.endswith("s") else "s"
    return f"{count} {one}{end}"


def listed(words: Sequence[str]) -> str:
    """Words with commas, and an "and"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def ends_of(names: Iterable[str]) -> str:
    """How many names there are of each kind, by what they end in; nothing else of them."""
    counts: Counter[str] = Counter()
    for name in names:
        ends = "".join(PurePosixPath(name.lower()).suffixes[-2:])
        last = PurePosixPath(name).suffix.lower()
        counts[next((end for end in (ends, last) if end in _SHOWN), OTHERS)] += 1
    often = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return listed([f"{count} {end}" for end, count in often]) if often else "none"
