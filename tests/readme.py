"""The README's examples, as tests run them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def python_blocks(text: str | None = None) -> list[str]:
    """Every block of Python in the README, or in a part of it, in order."""
    text = (ROOT / "README.md").read_text() if text is None else text
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
