"""One page about a run: what it was, what it saw, how it learnt, what it scores, what it cost.

Shown are numbers, pseudonyms, words of closed vocabularies, and pictures that the evaluation may
show; no machine, and no path. The same folder gives the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from launch.dossiertables import agreement_tables, files_table, gates_section, latency_table
from launch.evalfigures import CASES, lifted_cases, scores_table
from launch.rundoubts import doubts_section
from launch.runfacts import Lack, RunFacts, config_of, facts_of
from launch.runsections import (
    cost_section,
    curves_section,
    lacks,
    repeat_section,
    what_section,
)
from launch.trained import BY_CASE, shown
from medpsp.deploy.dossier import Facts
from medpsp.dicom.codes import code_of
from medpsp.types import STATUSES
from medpsp.words import many
from shards.figures import Columns
from shards.index import REPORT, Manifest, write_bytes_durably
from shards.page import Html, coded, join, page, pairs, stacked, table, tag
from shards.sections import (
    classes_section,
    images_section,
    section,
    splits_section,
    status_of,
)

log = logging.getLogger("medpsp")


def write_run_page(root: Path) -> Path:
    """Write ``run.html`` into a run folder, of what there is by now.

    Raises:
        ConfigError: It is no run, or its configuration is damaged. Whatever else is missing or
            damaged is a line in the page, and of what is damaged a warning, too.
    """
    config, run = config_of(root)
    facts = facts_of(config, run)
    for line in facts.damaged:
        log.warning("%s", line)
    write_bytes_durably(run.page, run_page(facts).encode())
    return run.page


def run_page(facts: RunFacts) -> str:
    """The page: no script, nothing from a network."""
    parts = (
        _title(facts),
        doubts_section(facts),
        section("stand", "Where it stands", pairs(_stand(facts))),
        what_section(facts),
        *_data(facts),
        curves_section(facts),
        section("scores", "Scores", *_scores(facts)),
        _cases(facts),
        *_export(facts),
        cost_section(facts),
        repeat_section(facts),
    )
    return page(f"Run {_name(facts)}", (part for part in parts if part))


def _name(facts: RunFacts) -> str:
    return facts.run.root.resolve().name


def _title(facts: RunFacts) -> Html:
    config = facts.config
    height, width = config.train.size
    lead = (
        f"{config.model.backbone} with the {config.model.head} head, {height} × {width}, "
        f"{len(config.data.classes)} classes, seed {config.seed}."
    )
    links = {"stand": "Where it stands", "what": "What was run", "data": "Data"}
    if isinstance(facts.columns, Columns):
        links |= {"splits": "Splits", "images": "Images", "classes": "Classes"}
    links |= {"curves": "Curves", "scores": "Scores", CASES: "Cases", "export": "Export"}
    if not isinstance(facts.dossier, Lack):
        links |= {"allowances": "Gates"}
    links |= {"cost": "Cost", "repeat": "How to repeat it"}
    nav = tag("nav", *(tag("a", text, href=f"#{name}") for name, text in links.items()))
    return tag("header", tag("h1", f"Run {_name(facts)}"), tag("p", lead, css="lead"), nav)


def _stand(facts: RunFacts) -> Iterator[tuple[str, object]]:
    manifest, columns = facts.manifest, facts.columns
    if isinstance(manifest, Lack):
        yield "shards", coded(manifest.line)
    else:
        said = [many(manifest.slices, "slice")]
        if not isinstance(columns, Lack):
            said.append(many(len(set(columns.patient)), "patient"))
        yield "shards", ", ".join(said)
    yield "training", coded(_trained(facts))
    scores, dossier = facts.evaluation, facts.dossier
    if isinstance(scores, Lack):
        yield "evaluation", coded(scores.line)
    else:
        dice = ", ".join(f"{n} {shown(of['dice']['value'])}" for n, of in scores["classes"].items())
        who = many(scores["patients"], "held-out patient")
        yield "evaluation", f"{BY_CASE}, of {who}: {dice}"
    if isinstance(dossier, Lack):
        yield "export", coded(dossier.line)
    else:
        said = [
            f"{row['variant']} against fp32: Dice "
            + ("n/a" if row["mean"] is None else f"{row['mean']:.4f}")
            for row in dossier.get("agreement", ())
        ]
        yield "export", "; ".join([*(said or ["fp32 alone"]), _gates(dossier)])


def _gates(dossier: Facts) -> str:
    refused = dict.fromkeys(one["file"] for one in dossier.get("refusals", ()))
    if refused:
        return f"refused, and not given out: {', '.join(refused)}"
    allowed = dossier.get("allowances")
    if allowed is None:
        return "gates not measured"
    if not allowed:
        return "every gate was met"
    return f"not met and allowed: {', '.join(one['gate'] for one in allowed)}"


def _trained(facts: RunFacts) -> str:
    total = sum(steps for _, _, steps in facts.stages)
    if not facts.step:
        return facts.best.line if isinstance(facts.best, Lack) else "Nothing is known of it."
    told = facts.jobs.get("train")
    state = told.state if told and not isinstance(told, Lack) else "unknown"
    ends = "" if facts.step >= total > 0 else f"; not at its end yet, the job is {state}"
    best = "no checkpoint yet"
    if not isinstance(facts.best, Lack):
        best = f"best validation Dice {facts.best['best']:.3f}, of step {facts.best['step']}"
    return f"{facts.step} of {total or 'an unknown number of'} steps, {best}{ends}"


def _link(facts: RunFacts, *places: str) -> Html:
    """More of it, where that is there."""
    found = [name for name in places if (facts.run.root / name).is_file()]
    links = join(join([", " if n else "", tag("a", f, href=f)]) for n, f in enumerate(found))
    return (
        tag("p", "More in ", links, ".", css="quiet", style="margin-top:10px") if found else Html()
    )


def _data(facts: RunFacts) -> Iterator[Html]:
    manifest, columns = facts.manifest, facts.columns
    if isinstance(manifest, Lack):
        yield section("data", "Data", lacks(manifest))
        return
    yield section("data", "Data", *_found(manifest), _link(facts, f"shards/{REPORT}"))
    if isinstance(columns, Lack):
        yield section("splits", "Splits", lacks(columns))
        return
    yield splits_section(columns)
    yield images_section(columns)
    yield classes_section(manifest.classes, columns)


def _found(manifest: Manifest) -> Iterator[Html]:
    """Objects by status, which add up, and the codes of those that are not whole."""
    counts = {status: manifest.counts.get(status, 0) for status in STATUSES}
    yield stacked(list(counts.items()))
    text = " objects, which are files, or members of zip and tar files; kept ones may lack frames."
    yield tag("p", tag("strong", sum(counts.values())), text, css="quiet")
    rows = [
        (tag("code", code), status_of(code_of(code).status), number, code_of(code).meaning,
         code_of(code).action)
        for code, number in sorted(manifest.codes.items(), key=lambda item: (-item[1], item[0]))
    ]  # fmt: skip
    head = ("reason", "status", "objects", "what it means", "what to do")
    yield table(head, rows, (2,)) if rows else tag("p", "Nothing was left out.")


def _scores(facts: RunFacts) -> Iterator[Html]:
    result = facts.evaluation
    if isinstance(result, Lack):
        yield lacks(result)
        return
    split = "test" if result["split"] == "test" else "validation"
    yield tag(
        "p", result["patients"], f" held-out patients ({split}), ", result["cases"], " cases, ",
        result["slices"], " slices, network of step ", result["step"], ".",
    )  # fmt: skip
    yield from scores_table(result)
    ece = result["calibration"]["ece"]
    if ece["value"] is not None:
        yield tag("p", "Expected calibration error ", tag("strong", f"{ece['value']:.3f}"), ".")
    yield _link(facts, "evaluation.html", "evaluation.csv")


def _cases(facts: RunFacts) -> Html:
    if isinstance(facts.pictures, Lack):
        return section(CASES, "Worst, median and best case", lacks(facts.pictures))
    return lifted_cases(facts.pictures)


def _export(facts: RunFacts) -> Iterator[Html]:
    dossier = facts.dossier
    if isinstance(dossier, Lack):
        yield section("export", "Export", lacks(dossier))
        return
    parts = (*files_table(dossier), *_parity(dossier), *agreement_tables(dossier))
    speed = tag("h3", "Latency", style="margin-top:18px"), *latency_table(dossier)
    yield section("export", "Export", *parts, *speed, _link(facts, "export/dossier.html"))
    yield gates_section(dossier)


def _parity(dossier: Facts) -> Iterator[Html]:
    rows = dossier.get("parity", ())
    if rows:
        worst = max(row["max_abs_diff"] for row in rows)
        pixels = sum(row["changed"] for row in rows)
        yield tag(
            "p", "Logits of the fp32 file and of the network differ by ",
            tag("strong", f"{worst:.1e}"), " at most, over ", len(rows), " shapes; ", pixels,
            " pixels have another class.", style="margin-top:12px",
        )  # fmt: skip
