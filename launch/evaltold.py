"""What `medpsp evaluate` says of its scores."""

from __future__ import annotations

import logging
from pathlib import Path
from shlex import quote
from typing import Any

from launch.trained import BY_CASE, POOLED, shown
from medpsp.words import many

log = logging.getLogger("medpsp")
SHOWN = 6
"""Patients whose pseudonyms are on the console; all are in the files."""


def _doubt(result: dict[str, Any]) -> None:
    """Say of which classes the network may have learnt nothing that holds for other patients."""
    from launch.scores import doubt_of  # scipy comes with it, which devices have not

    for name, of in result["classes"].items():
        if doubt := doubt_of(of):
            dice, blind = of["dice_pooled"], of["dice_constant_mask"]["value"]
            inside = "" if dice["low"] is None else f", 95 % from {shown(dice['low'])}"
            log.warning(
                "evaluate: %s is %s than a mask that ignores the image: pooled Dice %s%s, that "
                "mask %s; look at the pictures; label more patients, or train longer where "
                "validation was still rising",
                name,
                doubt,
                shown(dice["value"]),
                inside,
                shown(blind),
            )


def tell(result: dict[str, Any], place: Path) -> None:
    """Log the headline of each class, who was held out, what to doubt, and where the page is.

    Args:
        result: Of `evaluate_job`.
        place: The file of it.
    """
    log.info(
        "held-out %s (%s, %s, %s):",
        BY_CASE,
        result["split"],
        many(result["patients"], "patient"),
        many(result["slices"], "slice"),
    )
    for name, of in result["classes"].items():
        log.info("  %-12s %s, %s", name, _interval(of["dice"]), _distances(of))
        log.info(
            "  %-12s %s: %s, constant mask %s",
            "",
            POOLED,
            _interval(of["dice_pooled"]),
            shown(of["dice_constant_mask"]["value"]),
        )
    who = result["held_out"]
    more = f" and {len(who) - SHOWN} more" if len(who) > SHOWN else ""
    log.info(
        "held out, by pseudonym: %s%s; `medpsp shards %s data.crosswalk=FILE` tells their files",
        ", ".join(who[:SHOWN]),
        more,
        quote(str(place.with_name("config.yaml"))),
    )
    _doubt(result)
    log.info("page: %s", place.with_suffix(".html"))


def _interval(of: dict[str, Any]) -> str:
    ends = "" if of["low"] is None else f" (95 % {shown(of['low'])} to {shown(of['high'])})"
    return f"{shown(of['value'])}{ends}"


def _distances(of: dict[str, Any]) -> str:
    iou, hd95, nsd = (shown(of[key]["value"]) for key in ("iou", "hd95_mm", "nsd"))
    return f"IoU {iou}, HD95 {hd95} mm, NSD {nsd}"
