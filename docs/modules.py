"""`make map`: writes the list of modules in docs/architecture.md again, from the first sentence of each docstring.

python -m docs.modules
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "snapchain"
PAGE = ROOT / "docs" / "architecture.md"
START = "<!-- The rest is written by `make map`. -->\n"


def sentence(path: Path) -> str:
    """The first sentence of a module's docstring, as a cell of a table."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    first = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[.?!;])\s", first)[0].rstrip(".;:").replace("|", "\\|")


def folders() -> Iterator[tuple[Path, list[Path]]]:
    """Every folder of the package with its modules, without __init__.py."""
    for folder in sorted({path.parent for path in PACKAGE.rglob("*.py")}):
        yield folder, sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")


def tables() -> str:
    parts = []
    for folder, modules in folders():
        about = sentence(folder / "__init__.py")
        rows = [f"| `{path.name}` | {sentence(path)} |" for path in modules]
        head = f"### `{folder.relative_to(ROOT)}/`\n" + (f"\n{about}.\n" if about else "")
        parts.append("\n".join([head, "| module | about |", "| --- | --- |", *rows]) if rows else head.rstrip())
    return "\n\n".join(parts) + "\n"


def main() -> None:
    text = PAGE.read_text()
    PAGE.write_text(text[: text.index(START)] + START + "\n" + tables())


if __name__ == "__main__":
    main()
