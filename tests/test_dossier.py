"""The dossier page, its JSON, and the bill of materials."""

from __future__ import annotations

import io
import json
import os
import re
import time
import uuid
from html.parser import HTMLParser
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from launch.dossier import dossier_page, write_dossier
from medpsp.deploy import packages
from medpsp.deploy.dossier import Facts, cpu_facts, environment_facts, plain
from medpsp.deploy.others import Others, busy_seconds
from medpsp.deploy.packages import installed
from medpsp.deploy.sbom import bill_of_materials

DIGEST, MANIFEST = "a" * 64, "b" * 64


def value(middle: float | None, low: float | None = None, high: float | None = None) -> Any:
    return {"value": middle, "low": low, "high": high}


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 1), 128).save(buffer, "PNG")
    return buffer.getvalue()


def known() -> Facts:
    scores = {
        "dice": value(0.912, 0.88, 0.941),
        "dice_pooled": value(0.92),
        "iou": value(0.84),
        "hd95_mm": value(None),
        "nsd": value(0.97),
    }
    return {
        "model": {
            "classes": ["background", "liver <left>"],
            "codes": {"liver <left>": {"type": ["10200004", "SCT", "Liver"]}},
            "intended_use": "Research & teaching <only>",
            "licence": "CC-BY-4.0",
            "header_window": False,
            "step": 1200,
            "tool": "medpsp 1",
        },
        "files": [
            {"name": "model.onnx", "variant": "fp32", "bytes": 1234567, "sha256": DIGEST,
             "opset": 18, "ir": 8},
        ],
        "parity": [
            {"variant": "fp32", "shape": (2, 97, 121), "max_abs_diff": 3.14e-6,
             "relative": 2e-7, "changed": 3, "near_ties": 3},
        ],
        "agreement": [
            {"variant": "int8 QDQ U8S8", "slices": 40, "against_fp32": {"liver <left>": 0.99123},
             "mean": 0.99123, "labels_fp32": {"liver <left>": 0.9125},
             "labels": {"liver <left>": 0.9100}, "sqnr_real_db": 31.04,
             "sqnr_emulated_db": None, "restored": ["/conv1/Conv"]},
        ],
        "overlays": [{"title": "slice 3: 12 pixels <b>", "png": png()}],
        "latency": [
            {"variant": "fp32", "threads": 1, "size": (512, 512), "median_ms": 358.84,
             "p95_ms": 361.0, "peak_rss_mib": 249.4},
        ],
        "cpu": {"model": "Some CPU", "flags": ["avx2", "fma"]},
        "training": {
            "manifest": MANIFEST,
            "splits": {"train": {"patients": 30, "slices": 4200}},
            "classes": ["background", "liver <left>"],
        },
        "evaluation": {"split": "test", "patients": 9, "slices": 800, "step": 1200,
                       "classes": {"liver <left>": scores}},
        "allowances": [{"gate": "latency", "reason": "int8 <slower> here"}],
        "steps": ["Batch normalisation folded into convolutions."],
        "environment": {"python": "3.11.7"},
    }  # fmt: skip


class Rows(HTMLParser):
    """Cells of all tables; fails on what a closed page must not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[tuple[str, str]]] = []
        self.inside = False
        self.sources: list[str] = []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {key: text or "" for key, text in attributes}
        assert name not in ("script", "link", "iframe", "b")
        if name == "img":
            self.sources.append(given["src"])
        if name == "tr":
            self.rows.append([])
        if name in ("td", "th"):
            self.rows[-1].append((given.get("class", ""), ""))
            self.inside = True

    def handle_endtag(self, name: str) -> None:
        self.inside = self.inside and name not in ("td", "th")

    def handle_data(self, text: str) -> None:
        if self.inside:
            kind, before = self.rows[-1][-1]
            self.rows[-1][-1] = kind, before + text


def rows_of(text: str) -> list[list[tuple[str, str]]]:
    parser = Rows()
    parser.feed(text)
    assert all(source.startswith("data:image/png;base64,") for source in parser.sources)
    return parser.rows


def test_page_shows_the_numbers_escaped_and_to_the_right() -> None:
    text = dossier_page(known())
    rows = rows_of(text)
    assert [("", "model.onnx"), ("", "fp32"), ("n", "1\u202f234\u202f567"), ("n", "18"), ("n", "8"),
            ("", DIGEST)] in rows  # fmt: skip
    said = [[cell for _, cell in row] for row in rows]
    assert ["fp32", "2 x 97 x 121", "3.1e-06", "2.0e-07", "3", "3"] in said
    assert ["int8 QDQ U8S8", "liver <left>", "0.9912", "0.9125", "0.9100", "-0.0025"] in said
    assert ["int8 QDQ U8S8", "40", "0.9912", "31.0", "–", "1", "/conv1/Conv"] in said
    assert ["fp32", "1", "512 x 512", "358.8", "361.0", "249"] in said
    assert ["train", "30", "4\u202f200"] in said
    assert ["liver <left>", "0.9120.880 to 0.941", "0.920", "0.840", "–", "0.970"] in said
    assert "Research &amp; teaching &lt;only&gt;" in text
    assert "liver &lt;left&gt;: type: 10200004, SCT, Liver" in text
    assert "slice 3: 12 pixels &lt;b&gt;" in text
    assert "not measured" not in text
    assert 'name="viewport"' in text
    assert "default-src &#x27;none&#x27;" in text or "default-src 'none'" in text
    assert "http://" not in text
    assert "https://" not in text


def test_the_worst_shape_is_shown_and_the_others_are_folded() -> None:
    facts = known()
    row = facts["parity"][0]
    facts["parity"] = [
        {**row, "relative": 9e-7, "changed": 0, "near_ties": 0},
        row,
        {**row, "shape": (1, 5, 5), "relative": 1e-9, "changed": 1, "near_ties": 0},
    ]
    text = dossier_page(facts)
    shown, _, folded = text.partition("<summary>All 3 shapes</summary>")
    assert "1 x 5 x 5" in shown  # a changed pixel that is no tie is worse than any difference
    assert "2 x 97 x 121" not in shown
    assert folded.count("2 x 97 x 121") == 2
    assert '<a href="#allowances">Gates</a>' in text
    assert "<details>" not in dossier_page(known())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"windows": [{"center": 40, "width": 400}, {"center": 600, "width": 2000}]},
         "40/400 (centre/width), 600/2000 (centre/width), a channel each"),
        ({"window": {"center": 30, "width": 80}}, "30/80 (centre/width) for all series"),
        ({"header_window": True, "window": {"center": 30, "width": 80}},
         "of the header of each slice; without one 30/80 (centre/width)"),
        ({"input": {"colours": 3}}, "0 to 255 (colour)"),
        ({}, "CT: 40/400 (centre/width); MR: percentiles 0.5 to 99.5 of each series"),
    ],
)  # fmt: skip
def test_windows_are_those_that_training_used(given: dict[str, Any], said: str) -> None:
    facts = known()
    facts["model"] |= {"modalities": ["CT", "MR"], "header_window": False, **given}
    assert f"<dt>windows</dt><dd>{said}</dd>" in dossier_page(facts)


def test_classes_are_in_their_order_and_nothing_is_minus_zero() -> None:
    facts = known()
    facts["model"]["classes"] = ["background", "liver", "bone"]
    fact = facts["agreement"][0]  # as JSON has them, by their letters
    fact["against_fp32"] = {"bone": 0.99, "liver": 0.98}
    fact["labels_fp32"] = {"bone": 0.9, "liver": 0.8}
    fact["labels"] = {"bone": 0.89999, "liver": 0.7}
    said = [[cell for _, cell in row] for row in rows_of(dossier_page(facts))]
    lines = [row[1:] for row in said if len(row) == 6 and row[1] in ("bone", "liver")]
    assert lines == [
        ["liver", "0.9800", "0.8000", "0.7000", "-0.1000"],
        ["bone", "0.9900", "0.9000", "0.9000", "0.0000"],
    ]


def test_a_machine_that_others_used_is_told() -> None:
    text = dossier_page({**known(), "load": {"cores": 2, "others": 1.24}})
    assert "<strong>Other processes took 1.2 of 2 cores meanwhile</strong>: the times are" in text
    text = dossier_page({**known(), "load": {"cores": 2, "others": 0.1}})
    assert "took 0.1 of 2 cores meanwhile.<" in text
    assert "Other processes" not in dossier_page(known())


def test_work_of_others_is_counted_and_ones_own_is_not(tmp_path: Path) -> None:
    stat, ticks = tmp_path / "stat", os.sysconf("SC_CLK_TCK")
    stat.write_text("cpu 100 0 50 9000 10 1 1 3 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n")
    assert busy_seconds(stat) == pytest.approx(155 / ticks)
    others, began, own = Others(stat), time.perf_counter(), time.process_time()
    while time.perf_counter() < began + 0.2:
        pass
    stat.write_text(f"cpu {100 + 50 * ticks} 0 50 9000 10 1 1 3 0 0\n")  # 50 s in the meantime
    found, own = others.cores(), time.process_time() - own
    lasted = time.perf_counter() - began
    assert found == pytest.approx((50 - own) / lasted, rel=0.05)
    stat.write_text(f"cpu {100 + ticks // 100} 0 50 9000 10 1 1 3 0 0\n")  # less than its own
    assert others.cores() == 0
    stat.write_text("nonsense")
    assert (busy_seconds(stat), others.cores()) == (None, None)


def test_what_is_doubted_stands_first() -> None:
    facts = known()
    assert "Worth a look" not in dossier_page(facts)
    facts["training"]["changed"] = True
    assert dossier_page(facts).count("shards have changed since the network was trained") == 2
    facts["model"]["doubts"] = {"<organ>": "no better than a mask that ignores the image: 0.1"}
    said = "<strong>&lt;organ&gt;</strong> is no better than a mask that ignores the image: 0.1."
    shown = dossier_page(facts)
    assert said in shown
    assert shown.index("Worth a look") < shown.index('id="allowances"')


def test_the_constant_mask_stands_beside_the_scores() -> None:
    facts = known()
    for of in facts["evaluation"]["classes"].values():
        of["dice_constant_mask"] = value(0.371)
    said = [[cell for _, cell in row] for row in rows_of(dossier_page(facts))]
    assert "constant mask" in next(row for row in said if "Dice, pooled over voxels" in row)
    assert "0.371" in next(row for row in said if "0.9120.880 to 0.941" in row)


def test_allowances_stand_first_and_in_red() -> None:
    text = dossier_page(known())
    red = text.index("Gates that were not met and were allowed")
    assert red < text.index("<h2>Files</h2>")
    assert "border:2px solid var(--mark)" in text
    assert "<strong>latency</strong>: int8 &lt;slower&gt; here" in text
    assert "Every gate was met." in dossier_page({**known(), "allowances": []})


@pytest.mark.parametrize("allowances", [[], [{"gate": "cpu_drop", "reason": "a few steps"}]])
def test_every_gate_is_listed_with_what_was_found(allowances: list[Any]) -> None:
    """Whoever certifies a device has the dossier only."""
    facts = {**known(), "allowances": allowances}
    facts["gates"] = [
        {"gate": "cpu_dice", "variant": "int8", "passed": True, "says": "Dice 0.9954 <ok>"},
        {"gate": "cpu_drop", "variant": "int8", "passed": False, "says": "0.0061 lower"},
    ]  # fmt: skip
    facts["training"]["splits"]["val"] = {"patients": 2, "slices": 90}
    page = dossier_page(facts)  # type: ignore[arg-type]
    said = [[cell for _, cell in row] for row in rows_of(page)]
    assert ["cpu_dice", "int8", "yes", "Dice 0.9954 <ok>"] in said
    assert ["cpu_drop", "int8", "no", "0.0061 lower"] in said
    assert "slices of 2 validation patients. So few say little about others" in page
    facts["training"]["splits"]["val"]["patients"] = 10
    assert "So few" not in dossier_page(facts)  # type: ignore[arg-type]


def test_a_refused_file_stands_first_and_is_in_no_table_of_files() -> None:
    refusals = [{"gate": "cpu_drop", "variant": "int8 QDQ U8S8", "file": "model.int8.onnx",
                 "says": "Dice is <lower>"}]  # fmt: skip
    text = dossier_page({**known(), "allowances": [], "refusals": refusals})  # type: ignore[typeddict-item]
    assert "Every gate was met" not in text
    assert text.index("Refused: files that did not pass") < text.index("<h2>Files</h2>")
    assert "<strong>cpu_drop</strong>: Dice is &lt;lower&gt;" in text
    assert "were allowed" not in text
    names = {row[0][1] for row in rows_of(text)}
    assert "int8 QDQ U8S8refused" in names  # its figures, marked
    assert "fp32" in names


def test_what_is_missing_is_said_not_invented() -> None:
    text = dossier_page({})
    assert text.count("not measured") == 11  # ten parts and the gates
    assert rows_of(text) == []
    assert "Every gate was met" not in text


def test_json_holds_the_facts(tmp_path: Path) -> None:
    facts = known()
    facts["agreement"][0]["mean"] = float("nan")
    write_dossier(tmp_path, facts)
    found = json.loads((tmp_path / "dossier.json").read_text())
    assert found["agreement"][0]["mean"] is None
    assert found["parity"][0]["shape"] == [2, 97, 121]
    assert found["overlays"][0]["png"] == plain(png())  # its SHA-256: the picture is in the page
    assert len(found["overlays"][0]["png"]) == 64
    assert found["evaluation"] == facts["evaluation"]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_dossier(tmp_path, dict(reversed(facts.items())))  # type: ignore[arg-type]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert set(before) == {"dossier.json", "dossier.html", "sbom.cdx.json"}
    assert not any(str(tmp_path).encode() in data for data in before.values())


def test_values_that_json_has_not_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_dossier(tmp_path, {"evaluation": {}, "steps": [object()]})  # type: ignore[list-item]


def test_bill_has_the_fields_that_cyclonedx_1_6_requires() -> None:
    facts = known()
    bill = bill_of_materials(facts["files"], facts["model"], MANIFEST)
    assert (bill["bomFormat"], bill["specVersion"], bill["version"]) == ("CycloneDX", "1.6", 1)
    assert bill["serialNumber"].startswith("urn:uuid:")
    assert uuid.UUID(bill["serialNumber"][9:]).version == 5
    kinds = {"library", "machine-learning-model", "data"}
    scopes = {"required", "optional", "excluded"}
    for part in bill["components"]:
        assert part["type"] in kinds
        assert part["name"]
        assert part.get("scope", "required") in scopes
        for hash_ in part.get("hashes", ()):
            assert hash_["alg"] == "SHA-256"
            assert re.fullmatch("[0-9a-f]{64}", hash_["content"])
        for licence in part.get("licenses", ()):
            assert licence.get("expression") or licence["license"]["name"]
    refs = [part["bom-ref"] for part in bill["components"]]
    assert len(set(refs)) == len(refs)
    assert bill["dependencies"] == [{"ref": "medpsp-model", "dependsOn": refs}]
    assert bill["metadata"]["component"]["bom-ref"] == "medpsp-model"
    assert "timestamp" not in bill["metadata"]


def test_bill_holds_model_data_and_distributions() -> None:
    facts = known()
    bill = bill_of_materials(facts["files"], facts["model"], MANIFEST)
    parts = {part["name"]: part for part in bill["components"]}
    assert parts["model.onnx"]["hashes"][0]["content"] == DIGEST
    assert parts["model.onnx"]["licenses"] == [{"license": {"name": "CC-BY-4.0"}}]
    assert parts["training manifest"]["hashes"][0]["content"] == MANIFEST
    numpy = parts["numpy"]
    assert numpy["purl"] == f"pkg:pypi/numpy@{numpy['version']}"
    assert numpy["scope"] == parts["onnxruntime"]["scope"] == "required"
    assert parts["torch"]["scope"] == "excluded"
    assert "pydantic-core" in parts  # what a requirement requires
    assert "zarr" not in parts  # of an extra
    assert bill == bill_of_materials(facts["files"], facts["model"], MANIFEST)
    other = bill_of_materials(facts["files"], facts["model"], "c" * 64)
    assert other["serialNumber"] != bill["serialNumber"]
    names = {part["name"] for part in bill_of_materials((), {}, "")["components"]}
    assert "training manifest" not in names
    assert "hashes" not in bill_of_materials((), {}, "short")["components"][0]


def test_requirements_that_go_round_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Made(Distribution):
        def __init__(self, name: str, needs: list[str]) -> None:
            self.name_, self.needs = name, needs

        @property
        def requires(self) -> list[str]:
            return self.needs

        @property
        def metadata(self) -> Any:
            return {"Name": self.name_}

        def read_text(self, filename: str) -> str | None:
            return None

        def locate_file(self, path: Any) -> Any:
            return path

    world = {
        "a": Made("a", ["B_x>=1", "gone", "c[more] ; extra == 'x'"]),
        "B_x": Made("B.X", ["a", "d (>2) ; python_version > '3'"]),
        "d": Made("d", []),
    }
    monkeypatch.setattr(packages, "find", world.get)
    assert list(installed("a")) == ["a", "b-x", "d"]


def test_cpu_of_x86_and_arm(tmp_path: Path) -> None:
    source = tmp_path / "cpuinfo"
    source.write_text(
        "processor\t: 0\nmodel name\t: AMD EPYC 7B13\nflags\t\t: fpu avx2 fma avx512_vnni\n\n"
        "processor\t: 1\nmodel name\t: another\nflags\t: fpu\n"
    )
    assert cpu_facts(source) == {"model": "AMD EPYC 7B13", "flags": ["avx2", "avx512_vnni", "fma"]}
    source.write_text("Features\t: fp asimd asimddp\nCPU implementer\t: 0x41\nCPU part\t: 0xd42\n")
    assert cpu_facts(source) == {
        "model": "CPU implementer 0x41 CPU part 0xd42",
        "flags": ["asimd", "asimddp"],
    }
    assert cpu_facts(tmp_path / "none")["flags"] == []


def test_environment_names_versions() -> None:
    found = environment_facts()
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", found["python"])
    assert found["onnxruntime"]
