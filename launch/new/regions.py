"""Names of segments and regions to classes. A name may be somebody's, so not every one is shown."""

from __future__ import annotations

import glob
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

MODALITY_WORDS = frozenset(
    "adc cbct ct dwi flair mr mri nm pet pt swi t1 t1c t1w t2 t2w us".split()
)
"""At the end of a name they say which images it was drawn on, not what was drawn."""
MOST_CLASSES = 254
_WORD = re.compile(r"[^\s_.\-]+")
Key = tuple[str, ...]


class Seen(NamedTuple):
    """A name of a label object that belongs to a series.

    Attributes:
        patient: Whose; the real one, for memory only.
        own: It holds a word of a person or an id of its object.
    """

    name: str
    patient: str
    modality: str
    own: bool


@dataclass(frozen=True, kw_only=True)
class Classes:
    """What names become.

    Attributes:
        names: Of the classes without the background.
        spelt: Name of a region to that of its class; empty where they are the same.
        merged: Classes that stand for names which differ by the modality.
        rare: Names in fewer than half of the patients, and in how many.
        hidden: Number of names that are not shown, since they may be somebody's.
    """

    names: tuple[str, ...] = ()
    spelt: dict[str, str] = field(default_factory=dict)
    merged: tuple[str, ...] = ()
    rare: dict[str, int] = field(default_factory=dict)
    hidden: int = 0


def classes_of_names(seen: Iterable[Seen], *, told: bool) -> Classes:
    """Classes of the names that several patients have.

    Args:
        seen: Names of the label objects.
        told: Who asks has named these labels: where they are of one patient, all names count.
    """
    seen = list(seen)
    patients = {one.patient for one in seen}
    least = 1 if told and len(patients) == 1 else 2
    groups: dict[Key, list[Seen]] = defaultdict(list)
    hidden = {one.name.casefold() for one in seen if one.own or not is_name(one.name)}
    for one in seen:
        if one.name.casefold() not in hidden:
            groups[_key(one.name)].append(one)
    merged = _without_modality(groups)
    merged.pop(("background",), None)  # a name that is no class is that anyway
    shown = {key: some for key, some in merged.items() if _patients(some) >= least}
    kept_back = (some for key, some in merged.items() if key not in shown)
    hidden |= {one.name.casefold() for some in kept_back for one in some}
    often = [key for key, some in shown.items() if 2 * _patients(some) >= len(patients)]
    chosen = sorted(often or shown, key=lambda key: (-_patients(shown[key]), key))[:MOST_CLASSES]
    titles = {key: _title(key, shown[key]) for key in shown}
    return Classes(
        names=tuple(titles[key] for key in chosen),
        spelt=_spelt({titles[key]: shown[key] for key in chosen}),
        merged=tuple(titles[key] for key in chosen if key not in groups),
        rare={titles[key]: _patients(shown[key]) for key in sorted(set(shown) - set(chosen))},
        hidden=len(hidden),
    )


def is_name(text: str) -> bool:
    """Whether a text can be the name of a class, and stand in a line for people."""
    return bool(_key(text)) and text.isprintable() and "\\" not in text


def _key(name: str) -> Key:
    """What counts of a name: its words, without case."""
    return tuple(_WORD.findall(name.casefold()))


def _patients(seen: Iterable[Seen]) -> int:
    return len({one.patient for one in seen})


def _without_modality(groups: dict[Key, list[Seen]]) -> dict[Key, list[Seen]]:
    """Names that differ by words of modalities at their end, and by the modality, are one."""
    stems: dict[Key, list[Key]] = defaultdict(list)
    for key in groups:
        stems[_stem(key)].append(key)
    found: dict[Key, list[Seen]] = {}
    for stem, keys in stems.items():
        drawn_on = [{one.modality for one in groups[key]} for key in keys]
        apart = sum(map(len, drawn_on)) == len(set().union(*drawn_on))
        if len(keys) > 1 and apart:
            found[stem] = [one for key in keys for one in groups[key]]
        else:
            found.update((key, groups[key]) for key in keys)
    return found


def _stem(key: Key) -> Key:
    end = len(key)
    while end > 1 and key[end - 1] in MODALITY_WORDS:
        end -= 1
    return key[:end]


def _title(key: Key, seen: Sequence[Seen]) -> str:
    """The most frequent spelling, cut where words of a modality are left out."""
    counts = Counter(one.name for one in seen)
    name = min(counts, key=lambda text: (-counts[text], text))
    words = list(_WORD.finditer(name))
    return name[: words[len(key) - 1].end()]


def _spelt(classes: dict[str, list[Seen]]) -> dict[str, str]:
    """Patterns of `data.label_names`; none where each name is that of its class, but for case."""
    spelt: dict[str, tuple[str, str]] = {}
    for title, seen in classes.items():
        for text in sorted({one.name for one in seen}):
            spelt.setdefault(text.casefold(), (text, title))
    if all(folded == title.casefold() for folded, (_, title) in spelt.items()):
        return {}
    return {glob.escape(text): title for text, title in spelt.values()}
