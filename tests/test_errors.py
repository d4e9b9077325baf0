"""The error tree and its exit codes are a promise to scripts: changing one is a breaking change."""

from __future__ import annotations

from snapchain import errors
from snapchain.errors import SnapchainError

# name: (parent, kind, exit code)
TREE = {
    "SnapchainError": ("Exception", "error", 1),
    "InvalidInput": ("SnapchainError", "invalid-input", 2),
    "WrongPassphrase": ("InvalidInput", "invalid-input", 2),
    "NotFound": ("SnapchainError", "not-found", 3),
    "Conflict": ("SnapchainError", "conflict", 4),
    "Diverged": ("Conflict", "diverged", 4),
    "Corrupt": ("SnapchainError", "corrupt", 5),
    "Unsupported": ("SnapchainError", "unsupported", 6),
    "Unavailable": ("SnapchainError", "unavailable", 7),
    "ToolFailed": ("SnapchainError", "tool-failed", 8),
    "Busy": ("SnapchainError", "busy", 9),
    "PartialFailure": ("SnapchainError", "partial-failure", 10),
    "OutputFailed": ("SnapchainError", "output-failed", 11),
}


def defined() -> dict[str, type[SnapchainError]]:
    return {
        name: thing
        for name, thing in vars(errors).items()
        if isinstance(thing, type) and issubclass(thing, SnapchainError)
    }


def test_the_tree_is_pinned() -> None:
    found = {name: (kind.__bases__[0].__name__, kind.kind, kind.exit_code) for name, kind in defined().items()}
    assert found == TREE


def test_the_docstring_draws_every_error_with_its_exit_code() -> None:
    assert errors.__doc__ is not None
    for name, (_, _, code) in TREE.items():
        line = next(line for line in errors.__doc__.splitlines() if name in line.split())
        assert name == "SnapchainError" or f" {code} " in line


def test_callers_may_catch_the_builtin_kin() -> None:
    assert issubclass(errors.InvalidInput, ValueError)
    assert issubclass(errors.NotFound, LookupError)


def test_a_handler_of_errors_does_not_swallow_an_interrupt() -> None:
    assert not issubclass(errors.Interrupted, Exception)
    assert issubclass(errors.Interrupted, KeyboardInterrupt)
    assert errors.Interrupted.exit_code == 130


def test_an_error_carries_facts() -> None:
    error = errors.Corrupt("L1 table ends outside the file", subject="a.qcow2", hint="restore it")
    assert (error.message, error.subject, error.hint) == ("L1 table ends outside the file", "a.qcow2", "restore it")
    assert str(error) == "a.qcow2: L1 table ends outside the file"


def test_a_failed_tool_is_told_whole() -> None:
    error = errors.ToolFailed("qemu-img exited 1", argv=["qemu-img", "info"], status=1, stderr="long\nstory")
    assert (error.argv, error.status, error.stderr) == (("qemu-img", "info"), 1, "long\nstory")
