"""The options that name a guest: the same for every verb, and what contradicts itself is refused with a remedy."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from snapchain.cli import completion, guest_options, options
from snapchain.cli.output import Output
from snapchain.errors import InvalidInput
from snapchain.guest.address import GuestAddress

NOTHING = {"domain": None, "connect": None, "qmp": None, "agent": None, "name": None}


def test_each_kind_is_named_by_its_options() -> None:
    assert guest_options.guest_address(**NOTHING) is None
    here = guest_options.guest_address(domain="web1", connect="qemu:///session", qmp=None, agent=None, name=None)
    assert here == GuestAddress(domain="web1", connect="qemu:///session")
    socket = guest_options.guest_address(domain=None, connect=None, qmp=Path("/q"), agent=Path("/a"), name="web1")
    assert socket == GuestAddress(qmp=Path("/q"), agent=Path("/a"), name="web1")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"domain": "web1", "qmp": Path("/q")}, "--domain and --qmp name two guests"),
        ({"connect": "qemu:///system"}, "--connect is given without --domain"),
        ({"connect": "qemu:///system", "qmp": Path("/q")}, "--connect is given without --domain"),
        ({"agent": Path("/a")}, "--agent belongs to --qmp; no guest is named"),
        ({"domain": "web1", "agent": Path("/a")}, "--agent belongs to --qmp; libvirt has"),
        ({"name": "web1"}, "--guest belongs to --qmp; no guest is named"),
        ({"domain": "web1", "name": "other"}, "--guest belongs to --qmp; libvirt has"),
        ({"domain": ""}, "--domain is empty"),
        ({"domain": "web1", "connect": ""}, "--connect is empty"),
    ],
)
def test_options_that_contradict_are_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        guest_options.guest_address(**{**NOTHING, **given})  # type: ignore[arg-type]
    assert words in str(refused.value)


def test_an_image_or_a_guest_and_not_both() -> None:
    guest = GuestAddress(domain="web1")
    guest_options.check_either(Path("a.qcow2"), None)
    guest_options.check_either(None, guest)
    guest_options.check_either([], guest)
    with pytest.raises(InvalidInput, match="IMAGE and --domain are both given") as both:
        guest_options.check_either(Path("a.qcow2"), guest)
    assert (both.value.subject, both.value.hint) == ("a.qcow2", "leave out IMAGE, or --domain")
    with pytest.raises(InvalidInput, match="neither ADDRESS nor a guest"):
        guest_options.check_either(None, None, metavar="ADDRESS")


@pytest.fixture
def command() -> Callable[..., str]:
    """A verb that takes both, run by its words: what it prints."""
    app = typer.Typer(rich_markup_mode="rich")

    @app.command()
    @options.takes_output()
    @guest_options.takes_guest(instead_of="image")
    def seal(
        image: Annotated[Path | None, typer.Argument(metavar="IMAGE")] = None,
        *,
        guest: GuestAddress | None,
        out: Output,
    ) -> None:
        print(image, guest, out.as_json)

    def run(*words: str) -> str:
        done = CliRunner().invoke(app, words, env={"COLUMNS": "100", "TERM": "dumb"}, catch_exceptions=False)
        return done.output

    return run


def test_a_verb_gets_the_address(command: Callable[..., str]) -> None:
    assert command("x.qcow2") == "x.qcow2 None False\n"
    assert command("--domain", "web1", "--json") == f"None {GuestAddress(domain='web1')} True\n"
    assert command("--qmp", "/q", "--guest", "g") == f"None {GuestAddress(qmp=Path('/q'), name='g')} False\n"
    with pytest.raises(InvalidInput, match="both given"):
        command("x.qcow2", "--qmp", "/q")
    shown = command("--help")
    assert "Guest" in shown
    assert all(option in shown for option in ("--domain", "--connect", "--qmp", "--agent", "--guest"))


def test_domains_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    virsh = tmp_path / "virsh"
    virsh.write_text(
        "#!/bin/sh\n"
        f'printf "%s\\n" "$*" >>{tmp_path}/calls\n'
        'printf "web1\\nweb2\\nmy machine\\n\\n"\n'
    )  # fmt: skip
    virsh.chmod(virsh.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("LIBVIRT_DEFAULT_URI", raising=False)
    assert completion.domains("web", None) == ["web1", "web2"]
    assert completion.domains("", "qemu:///session") == ["web1", "web2", "my machine"]
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "qemu+unix:///system?socket=/run/other")
    completion.domains("", None)
    asked = (tmp_path / "calls").read_text().splitlines()
    uris = [line.split("--connect ")[1].split()[0] for line in asked]
    assert uris == ["qemu:///system", "qemu:///session", "qemu+unix:///system?socket=/run/other"]


def test_where_libvirt_does_not_answer_nothing_is_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert completion.domains("web", None) == []
