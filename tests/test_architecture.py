"""The shape of the code, held by reading it: who imports whom, and what start-up costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import HANG

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "snapchain"
MODULES = sorted(PACKAGE.rglob("*.py"))

BOTTOM = {"errors"}
FLOOR = {"errors", "model", "host"}

# part -> the parts it may import besides itself. Down only; siblings do not know each other.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "model": BOTTOM,
    "host": BOTTOM,
    "objects": FLOOR,
    "image": FLOOR,
    # The protocol that every kind of destination implements, and its records.
    "destination": FLOOR | {"image"},
    # What is sealed and shipped: image files, the notes beside them, who may write them.
    "source": FLOOR | {"image"},
    # A running guest: its monitor, its agent, its block jobs.
    "guest": FLOOR | {"image", "source"},
    "merge": FLOOR | {"destination", "image", "source", "guest"},
    "repository": FLOOR | {"objects", "destination", "image", "source"},
    # A replica is a chain of images: it writes them, merges them, and reads them back to prove them.
    # It starts the QEMU of a guest that comes to its host.
    "replica": FLOOR | {"objects", "destination", "image", "source", "merge", "guest"},
    # Serves what it can read at any offset, whatever that is: it knows no kind of destination.
    "nbd": FLOOR | {"destination"},
    # A guest's file systems, read by a child without rights: it knows nothing but bytes.
    "files": FLOOR,
    # The one door: opens what a URL names.
    "destinations": FLOOR | {"objects", "destination", "repository", "replica"},
    "ops": FLOOR
    | {
        "objects",
        "image",
        "source",
        "guest",
        "merge",
        "destination",
        "destinations",
        "repository",
        "replica",
        "nbd",
        "files",
    },
    # The command line parses, opens what is named, calls ops and shows. It sees errors, to turn them into exit codes,
    # host, to run --password-command, and model, to say which points to keep.
    "cli": FLOOR | {"destination", "destinations", "ops", "guest"},
    # `snapchain` itself: the public names, each loaded when first asked for.
    "__init__": FLOOR | {"image", "source", "guest", "merge", "destination", "destinations", "ops"},
    # `python -m snapchain`
    "__main__": {"cli"},
    # Ships for users' tests; may look at everything, and nothing below may look at it.
    "testing": FLOOR
    | {
        "objects",
        "image",
        "source",
        "guest",
        "merge",
        "destination",
        "destinations",
        "repository",
        "replica",
        "nbd",
        "ops",
        "cli",
    },
}

# (importer, imported): for annotations only, under `if TYPE_CHECKING:`.
TYPE_ONLY = {("cli", "replica"), ("cli", "merge"), ("cli", "source")}

# third-party module -> the parts that may import it. What is not listed is no dependency of the project.
THIRD_PARTY: dict[str, set[str]] = {
    "sh": {"host"},
    "mfusepy": {"host"},
    "qemu": {"guest"},
    "libvirt": {"guest"},
    "boto3": {"objects"},
    "botocore": {"objects"},
    "urllib3": {"objects"},  # botocore's: its errors come through
    "mypy_boto3_s3": {"objects"},
    "typer": {"cli"},
    "click": {"cli"},
    "rich": {"cli"},
    "cryptography": {"repository"},
    "numpy": {
        "model",
        "image",
        "source",
        "guest",
        "merge",
        "destination",
        "repository",
        "replica",
        "nbd",
        "ops",
        "testing",
    },
    "blake3": {"model", "image", "source", "merge", "repository", "replica", "ops", "testing"},
    "zstandard": {"image", "repository", "replica"},
    "pydantic": {
        "model",
        "host",
        "image",
        "files",
        "source",
        "guest",
        "merge",
        "destination",
        "objects",
        "repository",
        "replica",
        "ops",
        "testing",
    },
    "prometheus_client": {"ops"},
    "hypothesis": {"testing"},
    "pytest": {"testing"},
}

# Modules of the standard library by which a pure function could touch the world.
IMPURE = {
    "asyncio", "concurrent", "ctypes", "fcntl", "glob", "io", "logging", "mmap", "multiprocessing", "os", "pathlib",
    "random", "secrets", "select", "shutil", "signal", "socket", "subprocess", "tempfile", "threading", "urllib",
}  # fmt: skip

# What `snapchain --help` must not wait for. (pydantic is no such thing: typer imports it itself.)
HEAVY = {"boto3", "qemu", "botocore", "cryptography", "numpy", "zstandard", "blake3", "sh", "hypothesis", "pytest"}


def part_of(path: Path) -> str:
    """`snapchain/image/scan.py` -> image; `snapchain/errors.py` -> errors."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """(absolute module name, line) of every import in a file, wherever it stands in it."""
    package = ("snapchain", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            yield module, node.lineno
            if module == "snapchain":  # from snapchain import image
                for name in node.names:
                    yield f"snapchain.{name.name}", node.lineno


def imports_of_package(path: Path) -> Iterator[tuple[str, int]]:
    for module, line in imported(path):
        parts = module.split(".")
        if parts[0] == "snapchain" and len(parts) > 1:
            yield parts[1], line


def type_checking_lines(path: Path) -> set[int]:
    """Lines inside `if TYPE_CHECKING:` blocks."""
    return {
        line
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def test_every_part_is_named_in_the_design() -> None:
    assert {part_of(path) for path in MODULES} <= set(MAY_IMPORT)


def test_imports_go_one_way() -> None:
    wrong = [
        f"{where(path, line)}: {part_of(path)} imports {target}"
        for path in MODULES
        for target, line in imports_of_package(path)
        if target in MAY_IMPORT and target != part_of(path) and target not in MAY_IMPORT[part_of(path)]
        if not ((part_of(path), target) in TYPE_ONLY and line in type_checking_lines(path))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_table_itself_has_no_way_back_up() -> None:
    def below(part: str) -> set[str]:
        return MAY_IMPORT[part].union(*(below(lower) for lower in MAY_IMPORT[part]))

    assert all(part not in below(part) for part in MAY_IMPORT)


def test_third_party_modules_stay_in_their_parts() -> None:
    wrong = []
    for path in MODULES:
        for module, line in imported(path):
            top = module.split(".")[0]
            if top == "snapchain" or top in sys.stdlib_module_names:
                continue
            if part_of(path) not in THIRD_PARTY.get(top, set()):
                wrong.append(f"{where(path, line)}: {part_of(path)} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_model_is_pure() -> None:
    wrong = []
    for path in (path for path in MODULES if part_of(path) == "model"):
        wrong += [f"{where(path, line)}: {name}" for name, line in imported(path) if name.split(".")[0] in IMPURE]
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"open", "print"}:
                wrong.append(f"{where(path, node.lineno)}: {node.func.id}()")
    assert not wrong, "\n".join(wrong)


def test_no_module_is_a_drawer_for_leftovers() -> None:
    drawers = {"util", "utils", "helper", "helpers", "common", "manager", "misc", "base", "core"}
    assert not [str(path.relative_to(ROOT)) for path in MODULES if path.stem in drawers or path.parent.name in drawers]


def test_every_module_says_its_idea() -> None:
    mute = [path for path in MODULES if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_bytes()))]
    assert not mute


@pytest.mark.parametrize("arguments", [["--help"], ["ship", "--help"], ["--version"]])
def test_help_starts_without_the_heavy_imports(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from snapchain.cli import main\n"
        f"status = main({arguments!r})\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=HANG, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"


def test_inspect_of_an_image_loads_what_it_uses(tmp_path: Path) -> None:
    """No destination, no cryptography, nothing that makes models of records: there are none beside this image."""
    image = tmp_path / "web1.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    program = (
        "import sys\n"
        "from snapchain.cli import main\n"
        f"status = main(['inspect', {str(image)!r}])\n"
        "print(*sys.modules, file=sys.stderr)\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=HANG, check=False)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stderr.split())
    parts = {name.split(".")[1] for name in loaded if name.startswith("snapchain.")}
    assert parts <= {"cli", "destination", "errors", "host", "image", "model", "ops", "source"}
    assert {name for name in loaded if name.startswith("snapchain.destination.")} <= {"snapchain.destination.address"}
    assert not {"boto3", "botocore", "cryptography", "blake3", "zstandard", "sh"} & loaded
    assert not {name for name in loaded if name.startswith("snapchain.source.")}


# --- files are changed through one door

DOOR = {"host/directory.py", "host/files.py"}
"""The modules through which every file is made, replaced, given an owner, linked, renamed and removed."""
BY_PATH = {
    "chmod", "chown", "lchmod", "lchown", "link", "makedirs", "mkdir", "mkfifo", "mknod", "remove", "removedirs",
    "removexattr", "rename", "renames", "replace", "rmdir", "setxattr", "symlink", "truncate", "unlink", "utime",
}  # fmt: skip
PATH_METHODS = {
    "chmod", "hardlink_to", "lchmod", "mkdir", "rmdir", "symlink_to", "touch", "unlink", "write_bytes", "write_text",
}  # fmt: skip
OTHER_DOORS: dict[str, str] = {
    "objects": "a repository's own tree, below a pinned root that no name leads out of (objects/rooted.py)",
    "replica": "a replica's own tree, which no other user may write to (replica/store.py)",
    "testing": "for tests",
}


def changes_by_path(path: Path) -> Iterator[tuple[str, int]]:
    """Calls that change a file by its path, or open it for writing; what takes a descriptor is none."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        first = ast.unparse(node.args[0]) if node.args else ""
        if isinstance(called, ast.Name) and called.id == "open" and len(node.args) + len(node.keywords) > 1:
            yield "open", node.lineno
        if not isinstance(called, ast.Attribute):
            continue
        owner, name = ast.unparse(called.value), called.attr
        if owner == "os" and name in BY_PATH and not first.endswith(("fd", ".fileno()", "memory")):
            yield f"os.{name}", node.lineno
        if owner == "os" and name == "open" and "O_CREAT" in ast.unparse(node):
            yield "os.open(O_CREAT)", node.lineno
        if owner == "shutil" and name not in {"which", "get_terminal_size"}:
            yield f"shutil.{name}", node.lineno
        takes_paths = name in PATH_METHODS or (name in {"rename", "replace"} and len(node.args) == 1)
        if takes_paths and owner not in {"os", "dataclasses"}:
            yield f".{name}", node.lineno


def test_files_are_changed_through_one_door() -> None:
    wrong = [
        f"{where(path, line)}: {name}"
        for path in MODULES
        for name, line in changes_by_path(path)
        if (inside := str(path.relative_to(PACKAGE))) not in DOOR
        if not {inside, part_of(path)} & set(OTHER_DOORS)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_door_is_seen() -> None:
    """What the test above looks for is found where it is."""
    found = {name for module in DOOR for name, _ in changes_by_path(PACKAGE / module)}
    assert {"os.mkdir", "os.rename", "os.link", "os.unlink"} <= found


def test_no_command_runs_qemu_img() -> None:
    """Images are read and written here; the wrapper is for what makes and judges them in tests."""
    users = {
        part_of(path)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Import | ast.ImportFrom) and "qemu_img" in ast.unparse(node)
    }
    assert users == {"testing"}
