"""Each expected error is named: by its class, its words, and so whose it is.

A bare `pytest.raises(Conflict)` passes for any conflict, that of a wrong set-up among them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOTS = {"SnapchainError", "Exception", "BaseException"}
"""Too wide for a test: it says what goes wrong, so it knows the class."""
WORDLESS = {"KeyboardInterrupt", "Interrupted", "ZeroDivisionError", "KeyError", "Crash", "StopIteration", "SystemExit"}
"""Raised without words, or by the test itself."""
FACTS = {"subject", "message", "hint", "status", "stderr", "filename"}


def expected(call: ast.Call) -> set[str]:
    """The names of the classes that it expects; empty for what is computed."""
    first = call.args[0] if call.args else ast.Tuple([])
    parts = first.elts if isinstance(first, ast.Tuple) else [first]
    return {part.id if isinstance(part, ast.Name) else part.attr for part in parts if _named(part)}  # type: ignore[attr-defined]


def _named(part: ast.expr) -> bool:
    return isinstance(part, ast.Name | ast.Attribute)


def expectations(function: ast.AST) -> Iterator[tuple[ast.Call, str | None]]:
    """Every `pytest.raises(...)` of a `with`, and the name under which it is caught."""
    for node in ast.walk(function):
        if isinstance(node, ast.With):
            for item in node.items:
                call = item.context_expr
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.raises":
                    yield call, item.optional_vars.id if isinstance(item.optional_vars, ast.Name) else None


def looked_at(function: ast.AST, caught: str) -> bool:
    """Whether a fact of the error that was caught is read, or its text."""
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and node.attr in FACTS and ast.unparse(node.value) == f"{caught}.value":
            return True
        if isinstance(node, ast.Call) and ast.unparse(node) == f"str({caught}.value)":
            return True
    return False


def faults(source: str) -> Iterator[str]:
    seen = set()
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        for call, caught in expectations(function):
            if call.lineno in seen:
                continue
            classes = expected(call)
            if classes & ROOTS:
                yield f"{call.lineno}: name the class, not {', '.join(sorted(classes & ROOTS))}"
            elif any(keyword.arg in {"match", "check"} for keyword in call.keywords) or (
                classes and classes <= WORDLESS
            ):
                seen.add(call.lineno)
            elif caught is None or not looked_at(function, caught):
                yield f"{call.lineno}: say whose error it is: match=..., or look at the subject of what was caught"
            else:
                seen.add(call.lineno)


def test_every_expected_error_is_named() -> None:
    wrong = [
        f"{path.relative_to(TESTS.parent)}:{fault}"
        for path in sorted(TESTS.rglob("*.py"))
        for fault in dict.fromkeys(faults(path.read_text()))
    ]
    assert not wrong, "\n".join(wrong)
