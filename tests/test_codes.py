"""Every reason code that the source knows is explained, and none that it does not."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from medpsp.dicom.codes import CODES, UNKNOWN, code_of, codes_markdown, refusal, told_statuses

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    path
    for folder in ("medpsp", "shards")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name not in ("codes.py", "labelcodes.py")
]

WORDS = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+")
"""Most codes; those of one word are found by the calls that take them."""

NOT_CODES = re.compile(
    r"YBR_\w+|ISO_IR|LINEAR_EXACT|CLOSED_PLANAR|CLOSEDPLANAR_XOR|LPS_TO_RAS|RAY_\w+|MEDPSP_\w+|NO_ALB\w+"
    r"|\w+_(NUM_THREADS|WORLD_SIZE)|TORCH(ELASTIC)?_\w+|SLURM_\w+|DS_ACCELERATOR|LOCAL_RANK|SC_CLK_TCK"
)
"""Values of elements, names of constants, of the kernel, environment variables."""

TAKES_CODE = {"DicomError", "GeometryError", "LabelError", "refusing", "reading", "append", "add"}


def codes_in(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if WORDS.fullmatch(node.value) and not NOT_CODES.fullmatch(node.value):
                found.add(node.value)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
            name = name.id if isinstance(name, ast.Name) else name
            if name in TAKES_CODE and str(node.args[0].value).isupper():
                found.add(str(node.args[0].value))
    return found


def test_the_search_finds_codes_wherever_they_stand():
    source = """
raise DicomError("TRUNC", "text in CAPITALS_HERE")
flags.append("ZIPPED")
names.append("mixed")
code = "A_B" if x else "YBR_FULL"
return "PIX_LOST", 3
"""
    assert codes_in(source) == {"TRUNC", "ZIPPED", "A_B", "PIX_LOST"}


def test_the_table_holds_every_code_of_the_source_and_no_other():
    texts = {str(path): path.read_text(encoding="utf-8") for path in SOURCES}
    assert len(texts) > 30
    found = {code: name for name, text in texts.items() for code in codes_in(text)}
    for code in CODES:  # written out where it stands alone, as GZIP in a list
        if any(f'"{code}"' in text for text in texts.values()):
            found.setdefault(code, "")
    assert {code: name for code, name in found.items() if code not in CODES} == {}
    assert sorted(set(CODES) - set(found)) == []


def test_each_code_is_explained_in_two_short_sentences():
    assert list(CODES) == sorted(CODES)
    for name, code in CODES.items():
        assert code.status in ("kept", "skipped", "quarantined", "duplicate"), name
        for text in (code.meaning, code.action):
            assert re.fullmatch(r"\S.{4,90}\.", text), name
            assert "|" not in text, name
        assert WORDS.fullmatch(name) or name.isalpha(), name


def test_an_unknown_code_counts_as_quarantined():
    assert code_of("FROM_THE_FUTURE") == UNKNOWN
    assert UNKNOWN.status == "quarantined"
    assert refusal("f", "FROM_THE_FUTURE", "3 bytes", 2).status == "quarantined"


def test_what_is_used_is_told_as_kept():
    lines = told_statuses({"LABEL_USED": 16, "NOT_DICOM": 18, "FILE_EMPTY": 1, "LABEL_OBJECT": 2})
    assert lines == [
        "kept: 16 LABEL_USED",
        "skipped: 2 LABEL_OBJECT, 18 NOT_DICOM",
        "quarantined: 1 FILE_EMPTY",
    ]


def test_a_refused_object_is_never_kept_whatever_its_code():
    assert CODES["TS_INVALID"].status == "kept"  # as a remark on a slice that could be read
    assert refusal("f", "TS_INVALID", "").status == "quarantined"
    assert refusal("f", "NOT_DICOM", "").status == "skipped"
    assert refusal("f", "DUP_IDENTICAL", "").status == "duplicate"


def test_the_page_of_the_codes_is_the_table():
    page = ROOT / "docs/codes.md"
    assert page.read_text(encoding="utf-8") == codes_markdown(), (
        "python -c 'from medpsp.dicom.codes import *; print(codes_markdown(), end=\"\")' "
        "> docs/codes.md"
    )
