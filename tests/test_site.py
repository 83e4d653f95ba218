"""The site of the pages: built without a warning, no dead link, nothing from another host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

from tests.pages import PAGES, ROOT, outside_fences

FETCHED = {"img": "src", "script": "src", "iframe": "src", "source": "src", "link": "href"}
"""What a browser loads by itself, and the attribute that says from where."""


class Page(HTMLParser):
    """Anchors, links and what is fetched."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = {""}
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found.get("id", ""), found.get("name", "")}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if FETCHED.get(tag, "") in found:
            self.fetched.append(found[FETCHED[tag]])


def build(config: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """As `make docs` does; with --quiet nothing would be strict."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(
        [*command, "-f", str(config), "-d", str(out)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", out)
    assert done.returncode == 0, done.stderr
    return out


def test_make_docs_builds_what_is_tested_here():
    make = ["make", "--no-print-directory", "-n", "-o", ".venv/.ready", "docs"]
    said = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    command = "NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict"
    assert said == f"{command}\n"


@pytest.mark.parametrize(
    ("planted", "told"),
    [("[a](nowhere.md)", "nowhere.md"), ("[a](#nowhere)", "#nowhere"), ("[a](/b)", "/b")],
)
def test_a_dead_link_fails_the_build(tmp_path: Path, planted: str, told: str):
    """By our settings; of anchors mkdocs alone would say nothing."""
    text = (ROOT / "mkdocs.yml").read_text()
    settings = re.search(r"^validation:\n(?: .*\n)+", text, re.MULTILINE)
    assert settings
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text(f"# Title\n\n{planted}\n")
    (tmp_path / "mkdocs.yml").write_text("site_name: a\n" + settings[0])
    done = build(tmp_path / "mkdocs.yml", tmp_path / "out")
    assert done.returncode == 1
    assert told in done.stderr
    (tmp_path / "docs/index.md").write_text("# Title\n\n[a](#title)\n")
    assert build(tmp_path / "mkdocs.yml", tmp_path / "out").returncode == 0


def test_every_page_is_there_and_no_link_is_dead(site: Path):
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    names = {path.stem for path in PAGES} - {"README"}
    assert {path.stem for path in pages} == names | {"404"}
    for path, page in pages.items():
        for link in [*page.links, *page.fetched]:
            if re.match(r"https?:|mailto:|data:", link):
                continue
            name, anchor = urldefrag(unquote(link))
            target = (path.parent / name).resolve() if name else path
            if path.stem == "404":  # it may be shown at any depth, and begins at the root
                target = site / name.removeprefix("/")
            assert target.exists(), f"{path.name}: {link}"
            if anchor and target in pages:
                assert anchor in pages[target].anchors, f"{path.name}: {link}"


def test_nothing_comes_from_another_host(site: Path):
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        fetched = Page(path).fetched
        assert len(fetched) > 5
        assert [name for name in fetched if re.match(r"(https?:)?//", name)] == []
        assert 'class="mermaid"' not in text  # the theme would fetch what draws them
        assert re.findall(r"url\(['\"]?(?:https?:)?//", text) == []
    for path in site.rglob("*.css"):
        assert re.findall(r"(?:url\(|@import )['\"]?(?:https?:)?//", path.read_text()) == []


def test_links_of_the_readme_lead_to_files():
    text = outside_fences((ROOT / "README.md").read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 10
    assert [name for name in links if not (ROOT / name.partition("#")[0]).is_file()] == []
