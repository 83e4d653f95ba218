"""Tables of what an export measured, for its dossier and for the page of the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from launch.trained import FEW_PATIENTS
from medpsp.deploy.dossier import AgreementFact, Facts, ParityFact
from medpsp.words import many
from shards.page import Html, join, table, tag
from shards.sections import section

NOT_MEASURED = tag("p", "not measured", css="quiet")
NONE = "–"
BUSY = 0.2
"""Cores that other processes take, from which on times are not those of the machine."""
T = TypeVar("T")


def gates_section(facts: Facts) -> Html:
    """Gates that were not met: whose files were refused, and which were allowed, and why. Below
    them all gates with what was found."""
    allowed, refused = facts.get("allowances"), facts.get("refusals", ())
    if allowed is None and not refused:
        return section("allowances", "Gates", NOT_MEASURED)
    if not allowed and not refused:
        return section("allowances", "Gates", tag("p", "Every gate was met."), *_found(facts))
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
    return tag(
        "section", *parts, *_found(facts), id="allowances", style="border:2px solid var(--mark)"
    )


def _found(facts: Facts) -> Iterator[Html]:
    """What each gate found, and of how many patients."""
    gates = facts.get("gates")
    if not gates:
        return
    rows = [(g["gate"], g["variant"], "yes" if g["passed"] else "no", g["says"]) for g in gates]
    yield table(("gate", "file", "met", "found, and expected"), rows, ())
    splits = facts["training"]["splits"] if "training" in facts else {}
    if "val" in splits:
        patients = splits["val"]["patients"]
        text = f"Masks were compared on slices of {many(patients, 'validation patient')}."
        if patients < FEW_PATIENTS:
            text += " So few say little about others: compare masks of your own before use."
        yield tag("p", text, css="quiet")


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


def parity_tables(facts: Facts) -> list[Html]:
    """The worst shape, and all of them where one looks for them."""
    given = facts.get("parity", ())
    text = (
        "Largest difference of the logits, the same relative to the largest logit, and pixels of "
        "another class. Near ties: those of them whose two largest logits lay within 0.0002."
    )
    if not given:
        return []
    worst = max(given, key=lambda r: (r["changed"] - r["near_ties"], r["relative"]))
    summary = tag("summary", f"All {len(given)} shapes")
    return [
        tag("p", text, " Shown is the worst of ", len(given), " shapes.", css="quiet"),
        _parity_table([worst]),
        tag("details", summary, _parity_table(given)) if len(given) > 1 else Html(),
    ]


def _parity_table(given: Sequence[ParityFact]) -> Html:
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
    return table(head, rows, range(1, 6))


def in_order(facts: Facts, classes: Mapping[str, T]) -> dict[str, T]:
    """Values by class in the order of the classes: `dossier.json` has them by their letters."""
    order = {name: place for place, name in enumerate(facts.get("model", {}).get("classes", ()))}
    return dict(sorted(classes.items(), key=lambda item: order.get(item[0], len(order))))


def agreement_tables(facts: Facts) -> list[Html]:
    """The masks of each variant beside those of fp32."""
    given = facts.get("agreement", ())
    if not given:
        return []
    text = (
        "Dice of the masks against those of fp32, and of both against the labels, of slices of "
        "validation patients, those with foreground if any has; the scores are of test patients, "
        "where there are any. SQNR of the logits by the kernels of this CPU and by float emulation "
        "of the same graph, which a CPU that does not saturate computes."
    )
    rows = [
        (_variant(facts, fact["variant"]), *row) for fact in given for row in _classes(facts, fact)
    ]
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


def _classes(facts: Facts, fact: AgreementFact) -> Iterator[tuple[str, ...]]:
    for name, dice in in_order(facts, fact["against_fp32"]).items():
        before, after = fact["labels_fp32"].get(name), fact["labels"].get(name)
        change = NONE if before is None or after is None else _signed(after - before)
        yield name, *(_digits(value, 4) for value in (dice, before, after)), change


def _signed(value: float) -> str:
    text = f"{value:+.4f}"
    return "0.0000" if float(text) == 0 else text


def _digits(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


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
    lines = tag("p", about, css="quiet"), _load(facts), table(head, rows, range(1, 6))
    return [*lines] if rows else []


def _load(facts: Facts) -> Html:
    """How busy the machine was with other things, which makes times longer."""
    load = facts.get("load")
    if load is None or load["others"] is None:
        return Html()
    cores, others = load["cores"], load["others"]
    text = f"Other processes took {others:.1f} of {cores} cores meanwhile"
    if others < BUSY:
        return tag("p", f"{text}.", css="quiet")
    more = ": the times are too long, those of several threads most; measure on an idle machine."
    return tag("p", tag("strong", text), more, css="quiet")
