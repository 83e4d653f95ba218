"""The dossier of an export: `dossier.json`, `dossier.html`, `sbom.cdx.json`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launch.evalfigures import METRICS, estimate
from medpsp.deploy.dossier import AgreementFact, Facts, plain
from medpsp.deploy.sbom import bill_of_materials
from shards.page import Html, join, page, pairs, picture, table, tag
from shards.sections import section

NOT_MEASURED = tag("p", "not measured", css="quiet")
NONE = "–"

MODEL = {
    "intended_use": "intended use",
    "licence": "licence",
    "classes": "classes",
    "codes": "coded terms",
    "modalities": "modalities",
    "windows": "windows",
    "window": "window of all series",
    "header_window": "window of the header",
    "spacing_mm": "spacing, mm",
    "tile": "tile",
    "colours": "colours",
    "context": "neighbouring slices",
    "backbone": "backbone",
    "head": "head",
    "stride": "stride",
    "bins": "pyramid bins",
    "step": "training step",
    "weights": "SHA-256 of the weights",
    "tool": "made by",
}
"""Keys of the metadata that are shown, in this order, and their names."""


def write_dossier(folder: Path, facts: Facts) -> None:
    """Write the three files; the same facts and the same installed versions give the same bytes.

    Args:
        folder: Exists.
        facts: Plain Python numbers, no numpy ones. What is left out is shown as not measured.

    Raises:
        TypeError: A value that JSON has not.
    """
    digest = facts["training"]["manifest"] if "training" in facts else ""
    bill = bill_of_materials(facts.get("files", ()), facts.get("model", {}), digest)
    for name, tree in (("dossier.json", plain(facts)), ("sbom.cdx.json", bill)):
        text = json.dumps(tree, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    (folder / "dossier.html").write_text(dossier_page(facts), encoding="utf-8")


def dossier_page(facts: Facts) -> str:
    """One page: no script, nothing from a network, all text escaped."""
    parts = {
        "Files": files_table(facts),
        "What it is for": _model(facts),
        "Scores": _scores(facts),
        "Parity with the trained network": _parity(facts),
        "Quantized against fp32": agreement_tables(facts),
        "Largest disagreements": _overlays(facts),
        "Latency": latency_table(facts),
        "Training data": _training(facts),
        "What was optimised": _steps(facts),
        "Environment": _environment(facts),
    }
    numbered = list(enumerate(parts.items()))
    links = (tag("a", title, href=f"#part-{n}") for n, (title, _) in numbered)
    lead = "What the model files are, what was measured of them, and on what."
    header = tag("header", tag("h1", "Dossier"), tag("p", lead, css="lead"), tag("nav", *links))
    sections = (
        section(f"part-{n}", title, *(content or (NOT_MEASURED,)))
        for n, (title, content) in numbered
    )
    return page("Dossier", (header, gates_section(facts), *sections))


def gates_section(facts: Facts) -> Html:
    """Gates that were not met: whose files were refused, and which were allowed, and why."""
    allowed, refused = facts.get("allowances"), facts.get("refusals", ())
    if allowed is None and not refused:
        return section("allowances", "Gates", NOT_MEASURED)
    if not allowed and not refused:
        return section("allowances", "Gates", tag("p", "Every gate was met."))
    parts: list[Html] = []
    for title, lines in (
        ("Refused: files that did not pass and were not given out", [*_refused(facts)]),
        (
            "Gates that were not met and were allowed",
            [tag("li", tag("strong", a["gate"]), ": ", a["reason"]) for a in allowed or ()],
        ),
    ):
        if lines:
            parts += [tag("h2", title, style="color:var(--mark)"), tag("ul", *lines)]
    return tag("section", *parts, id="allowances", style="border:2px solid var(--mark)")


def _refused(facts: Facts) -> Iterator[Html]:
    for one in facts.get("refusals", ()):
        yield tag(
            "li", tag("strong", one["file"]), f" ({one['variant']}), ",
            tag("strong", one["gate"]), ": ", one["says"],
        )  # fmt: skip


def _variant(facts: Facts, name: str) -> Html:
    """A variant by its name, and that its file was refused."""
    refused = any(one["variant"] == name for one in facts.get("refusals", ()))
    return join([name, tag("small", "refused", style="color:var(--mark)") if refused else ""])


def files_table(facts: Facts) -> list[Html]:
    """Each file with its SHA-256."""
    rows = [
        (f["name"], f["variant"], f["bytes"], f["opset"], f["ir"], tag("code", f["sha256"]))
        for f in facts.get("files", ())
    ]
    head = ("file", "variant", "bytes", "opset", "IR", "SHA-256")
    return [table(head, rows, (2, 3, 4))] if rows else []


def _model(facts: Facts) -> list[Html]:
    given = facts.get("model")
    if given is None:
        return []
    shown = {key: name for key, name in MODEL.items() if key in given or key == "intended_use"}
    return [pairs((name, _words(given.get(key)) or "not stated") for key, name in shown.items())]


def _words(value: Any) -> str:
    """Nested JSON values in a line."""
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_words(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_words(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def _scores(facts: Facts) -> list[Html]:
    given = facts.get("evaluation")
    if given is None:
        return []
    split = "test" if given["split"] == "test" else "validation"
    text = (
        given["patients"], f" held-out patients ({split}), ", given["slices"],
        " slices, network of step ", given["step"], ". Below each value its 95 % interval, a "
        "bootstrap over patients.",
    )  # fmt: skip
    rows = (
        (tag("strong", name), *(estimate(of[key]) for key in METRICS))
        for name, of in given["classes"].items()
    )
    head = ("class", *METRICS.values())
    return [tag("p", *text, css="quiet"), table(head, rows, range(1, len(head)))]


def _parity(facts: Facts) -> list[Html]:
    given = facts.get("parity", ())
    text = (
        "Largest difference of the logits, the same relative to the largest logit, and pixels of "
        "another class. Near ties: those of them whose two largest logits lay within 0.0002."
    )
    rows = [
        (
            r["variant"],
            " x ".join(map(str, r["shape"])),
            f"{r['max_abs_diff']:.1e}",
            f"{r['relative']:.1e}",
            r["changed"],
            r["near_ties"],
        )
        for r in given
    ]
    head = ("variant", "N x H x W", "difference", "relative", "changed pixels", "near ties")
    return [tag("p", text, css="quiet"), table(head, rows, range(1, 6))] if rows else []


def agreement_tables(facts: Facts) -> list[Html]:
    """The masks of each variant beside those of fp32."""
    given = facts.get("agreement", ())
    if not given:
        return []
    text = (
        "Dice of the masks against those of fp32, and of both against the labels; SQNR of the "
        "logits by the kernels of this CPU and by float emulation of the same graph, which a CPU "
        "that does not saturate computes."
    )
    rows = [(_variant(facts, name), *row) for fact in given for name, *row in _classes(fact)]
    head = ("variant", "class", "against fp32", "fp32, labels", "variant, labels", "change")
    sqnr = [
        (
            _variant(facts, fact["variant"]),
            fact["slices"],
            _digits(fact["mean"], 4),
            _digits(fact["sqnr_real_db"], 1),
            _digits(fact["sqnr_emulated_db"], 1),
            len(fact["restored"]),
            ", ".join(fact["restored"]),
        )
        for fact in given
    ]
    whole = ("variant", "slices", "mean Dice", "SQNR, dB", "emulated, dB", "restored", "nodes")
    return [
        tag("p", text, css="quiet"),
        table(head, rows, range(2, 6)),
        table(whole, sqnr, range(1, 6)),
    ]


def _classes(fact: AgreementFact) -> Iterator[tuple[str, ...]]:
    for name, dice in fact["against_fp32"].items():
        before, after = fact["labels_fp32"].get(name), fact["labels"].get(name)
        change = NONE if before is None or after is None else f"{after - before:+.4f}"
        values = (_digits(value, 4) for value in (dice, before, after))
        yield fact["variant"], name, *values, change


def _digits(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def _overlays(facts: Facts) -> list[Html]:
    wide = "margin:0 0 14px;max-width:100%"
    return [
        tag(
            "figure",
            tag("div", picture(f["png"], f["title"]), css="scroll"),
            tag("figcaption", f["title"]),
            style=wide,
        )
        for f in facts.get("overlays", ())
    ]


def latency_table(facts: Facts) -> list[Html]:
    """Times on a CPU, and which."""
    cpu = facts.get("cpu")
    about = "CPU not recorded." if cpu is None else f"{cpu['model']}: {' '.join(cpu['flags'])}"
    rows = [
        (
            _variant(facts, r["variant"]),
            r["threads"],
            " x ".join(map(str, r["size"])),
            f"{r['median_ms']:.1f}",
            f"{r['p95_ms']:.1f}",
            _digits(r["peak_rss_mib"], 0),
        )
        for r in facts.get("latency", ())
    ]
    head = ("variant", "threads", "H x W", "median, ms", "95th percentile, ms", "peak RSS, MiB")
    return [tag("p", about, css="quiet"), table(head, rows, range(1, 6))] if rows else []


def _training(facts: Facts) -> list[Html]:
    given = facts.get("training")
    if given is None:
        return []
    about = (
        ("digest of the manifest", tag("code", given["manifest"])),
        ("label classes", ", ".join(given["classes"])),
    )
    rows = [(name, of["patients"], of["slices"]) for name, of in given["splits"].items()]
    return [pairs(about), table(("split", "patients", "slices"), rows, (1, 2), "narrow")]


def _steps(facts: Facts) -> list[Html]:
    given = facts.get("steps", ())
    return [tag("ul", *(tag("li", step) for step in given))] if given else []


def _environment(facts: Facts) -> list[Html]:
    given = facts.get("environment", {})
    return [pairs((name, tag("code", text)) for name, text in given.items())] if given else []
