"""The API reference builds without a warning, has every public name, and none of its links leads nowhere."""

from __future__ import annotations

import html
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from docs.reference import as_markdown, public_modules, public_names

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {"xarray.DataTree"}
ROLE = re.compile(r":(\w+):`~?([\w.]+)`")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "docs.reference", str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return folder


def page_of(folder: Path, module: ModuleType) -> str:
    return (folder / f"{module.__name__.replace('.', '/')}.html").read_text()


def docstrings(module: ModuleType) -> Iterator[str]:
    """Of a page: the module's, its public names', and those of their public members."""
    yield inspect.getdoc(module) or ""
    for _, value in public_names(module):
        yield inspect.getdoc(value) or ""
        for name, member in vars(value).items() if inspect.isclass(value) else ():
            if not name.startswith("_") and callable(getattr(value, name)) or isinstance(member, property):
                yield inspect.getdoc(member) or ""


def test_every_public_name_has_its_anchor(folder: Path) -> None:
    for module in public_modules():
        page = page_of(folder, module)
        missing = [name for name, _ in public_names(module) if f'id="{name}"' not in page]
        assert missing == [], module.__name__


def test_no_cross_reference_leads_nowhere(folder: Path) -> None:
    broken = []
    for module in public_modules():
        page = page_of(folder, module)
        for kind, target in {found for text in docstrings(module) for found in ROLE.findall(text)}:
            shown = re.escape(target) + (r"(\(\))?" if kind in ("func", "meth") else "")
            # What a link shows is the reference as it is written.
            linked = re.search(rf'<code><a href="[^"]*">{shown}</a></code>', page)
            if not linked and target not in OUTSIDE:
                broken.append(f"{module.__name__}: {target}")
    assert broken == []


def test_no_link_leads_nowhere(folder: Path) -> None:
    pages = {path: re.sub(r"(?s)<script.*?</script>", "", path.read_text()) for path in folder.rglob("*.html")}
    anchors = {path: set(re.findall(r'id="([^"]+)"', text)) for path, text in pages.items()}
    broken = []
    for path, text in pages.items():
        for link in map(html.unescape, re.findall(r'href="([^"]+)"', text)):
            if link.startswith(("http", "data:", "mailto:")):
                continue
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            if target not in pages or (anchor and anchor not in anchors[target]):
                broken.append(f"{path.name}: {link}")
    assert broken == []


def test_pages_show_sections_examples_and_formulas_as_such(folder: Path) -> None:
    page = page_of(folder, next(module for module in public_modules() if module.__name__ == "pirl.metrics"))
    assert re.search(r"<h6[^>]*>Raises:</h6>\s*<ul>\s*<li><strong>InvalidRewardError:</strong>", page)
    assert re.search(r"<h6[^>]*>Example:</h6>\s*<div class=\"pdoc-code codehilite\">", page)
    everything = "".join(path.read_text() for path in folder.rglob("*.html"))
    assert not re.findall(r":(?:func|class|meth|mod|data|attr):", everything)
    assert "fonts.googleapis" not in everything and "cdn." not in everything  # it reads offline


def test_an_example_becomes_a_block_of_code_and_a_reference_a_name() -> None:
    shown: Any = as_markdown(
        "Does it.\n\nRaises:\n    Error: always; see :func:`~a.b`.\n\nExample:\n    >>> 1\n    1\n"
    )
    assert "- **Error:**  always; see `a.b()`." in shown
    assert "###### Example:\n\n```pycon\n>>> 1\n1\n```\n" in shown
