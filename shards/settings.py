"""What decides the bytes of shards besides their sources."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from medpsp.dataconfig import DECODE_MEMORY_MIB, DECODE_SECONDS, DataConfig
from medpsp.dicom.names import NameRule, name_rule
from medpsp.types import Window


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteSettings:
    """What of the configuration decides the bytes of a shard.

    The last two are limits of the sandbox and decide nothing; see `text`.
    """

    source: str
    labels: NameRule
    label_map: tuple[tuple[int, int], ...]
    mask_geometry: str
    mask_resample: str
    window: Window | None
    header_window: bool
    padding: str
    shard_slices: int
    profile: str = "default"
    decode_seconds: int = DECODE_SECONDS
    decode_memory_mib: int = DECODE_MEMORY_MIB

    @property
    def classes(self) -> int:
        """Number of classes K."""
        return len(self.labels.classes)

    @property
    def text(self) -> str:
        """Stable text of what decides the bytes, for the plan's digest."""
        tree = asdict(self)
        del tree["decode_seconds"], tree["decode_memory_mib"]
        return json.dumps(tree, sort_keys=True)


def write_settings(data: DataConfig) -> WriteSettings:
    """The settings of a configuration."""
    return WriteSettings(
        source=data.source,
        labels=name_rule(data),
        label_map=tuple(sorted(data.label_map.items())),
        mask_geometry=data.mask_geometry,
        mask_resample=data.mask_resample,
        window=data.fixed_window,
        header_window=data.header_window,
        padding=data.padding,
        shard_slices=data.shard_slices,
        profile=data.profile,
        decode_seconds=data.decode_seconds,
        decode_memory_mib=data.decode_memory_mib,
    )
