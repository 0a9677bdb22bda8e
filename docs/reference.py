"""Builds the API reference from the docstrings: ``python -m docs.reference [FOLDER]``, or ``make docs``."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pirl

ROOT = Path(__file__).resolve().parents[1]

INTERNAL = {
    # Rooms whose public names are those that `pirl` itself exports.
    "pirl.continuous", "pirl.fit", "pirl.mdp", "pirl.pool", "pirl.pool.demonstrations", "pirl.pool.samples",
    "pirl.pool.tables", "pirl.rewards", "pirl.sampled", "pirl.trajectories",
    # What the rooms are built from.
    "pirl.backups", "pirl.branches", "pirl.cli", "pirl.convergence", "pirl.gaussian_integrals", "pirl.model_file",
    "pirl.quantities", "pirl.replicates", "pirl.setting", "pirl.soft_values", "pirl.stationary", "pirl.statistics",
    "pirl.study_rows", "pirl.summary", "pirl.transitions", "pirl.uniformity",
    "pirl.infer.adaptation", "pirl.infer.batched", "pirl.infer.checkpoint", "pirl.infer.datatree", "pirl.infer.engine",
    "pirl.infer.ensemble", "pirl.infer.hmc", "pirl.infer.importance", "pirl.infer.memory", "pirl.infer.population",
    "pirl.infer.potential", "pirl.infer.progress", "pirl.infer.ranks", "pirl.infer.recorded", "pirl.infer.replicated",
    "pirl.infer.sampling", "pirl.infer.user_errors",
}  # fmt: skip
"""Modules without a page of their own. Every other one is public, and so is each of its names."""

_WHOLE = (
    "pirl.baselines",
    "pirl.diagnose",
    "pirl.learning",
    "pirl.metrics",
    "pirl.partition",
    "pirl.plots",
    "pirl.posterior",
    "pirl.simulators",
    "pirl.stable_baselines",
)
"""Packages that are public by their own names, whatever file these stand in."""


def public_modules() -> list[ModuleType]:
    """Every module that has a page, the package itself first."""
    found = [module.name for module in pkgutil.walk_packages(pirl.__path__, "pirl.")]
    inner = tuple(f"{package}." for package in _WHOLE)
    hidden = [name for name in found if "._" in name or name.startswith(inner) or name in INTERNAL]
    return [pirl, *(importlib.import_module(name) for name in sorted(set(found) - set(hidden)))]


def public_names(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The functions and classes of a module: those in ``__all__``, or else those that it defines without underscore."""
    for name in getattr(module, "__all__", vars(module)):
        value = getattr(module, name)
        own = hasattr(module, "__all__") or getattr(value, "__module__", None) == module.__name__
        if own and not name.startswith("_") and (inspect.isfunction(value) or inspect.isclass(value)):
            yield name, value


def as_markdown(docstring: str) -> str:
    """Google sections, and the roles of cross-references, as pdoc shows them best.

    Examples become blocks of code of their own, and ``:func:`~pirl.a.b` `` is shown as any other reference.
    """
    from textwrap import dedent

    from pdoc.docstrings import google, rst

    def block(found: re.Match[str]) -> str:
        return f"###### Example:\n\n```pycon\n{dedent(found['code']).strip()}\n```\n"

    docstring = re.sub(r":(\w+):`~", r":\1:`", docstring)
    parts = re.split(r"^(Example:\n(?:[ \t]+.*\n?|\n)+)", docstring, flags=re.MULTILINE)
    shown = [google(rst(text, None)) for text in parts[::2]]
    code = [re.sub(r"Example:\n(?P<code>(?:.*\n?)+)", block, text) for text in parts[1::2]]
    return "".join(shown[i] + (code[i] if i < len(code) else "") for i in range(len(shown)))


class AsWritten(str):
    """An annotation as the source has it: shapes are strings, which nothing should try to evaluate."""

    def __repr__(self) -> str:
        return str(self)


def as_written(annotation: Any, *_: Any) -> Any:
    """Stands for pdoc's evaluation of annotations."""
    text = getattr(annotation, "__forward_arg__", annotation)
    return AsWritten(text) if isinstance(text, str) else annotation


def build(folder: Path) -> None:
    """Write a page for each public module, an index that is the README, and what the search needs."""
    import pdoc.doc
    import pdoc.render

    pdoc.doc.safe_eval_type = as_written
    # In the order of inheritance: pdoc's own would look for members of generic distributions in their bases first.
    pdoc.doc.Class._bases = property(lambda found: found.obj.__mro__)

    pdoc.render.configure(template_directory=ROOT / "docs" / "templates", show_source=False)
    pdoc.render.env.filters["to_markdown"] = as_markdown
    pdoc.render.env.globals["readme"] = (ROOT / "README.md").read_text()
    pages = {module.__name__: pdoc.doc.Module(module) for module in public_modules()}
    for name, page in pages.items():
        path = folder / f"{name.replace('.', '/')}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(pdoc.render.html_module(page, pages))
    (folder / "index.html").write_text(pdoc.render.html_index(pages))
    (folder / "search.js").write_text(pdoc.render.search_index(pages))


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "docs"
    build(target)
    print(f"wrote {target / 'index.html'}")
