"""init: an empty repository in a directory or an S3 bucket."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from snapchain.destinations import check_is_made
from snapchain.errors import InvalidInput
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.repository.crypto import AES, SUITES
from snapchain.repository.opening import check_can_be_made, create_repository
from snapchain.repository.repository import BLOCK_BYTES, Passphrase, check_pack_size


class InitPlan(BaseModel):
    """What `init` would make.

    block_size: guest bytes at whose multiples data is cut for deduplication
    pack_size: bytes that an object has at most
    """

    model_config = ConfigDict(frozen=True)

    destination: str
    encryption: str
    block_size: int
    pack_size: int | None = None


class InitReport(BaseModel):
    """What `init` made. conditional_put: whether the store lets several writers work at once."""

    model_config = ConfigDict(frozen=True)

    destination: str
    repository: str
    encryption: str
    block_size: int
    conditional_put: bool
    pack_size: int | None = None
    findings: tuple[str, ...]


def plan(
    destination: str,
    *,
    encryption: str | None = None,
    block_size: int | None = None,
    pack_size: int | None = None,
) -> InitPlan:
    """Decide the parameters, which are for ever. Raises InvalidInput, and Conflict for a place that is not free."""
    check_is_made(destination)
    suite = AES if encryption is None else encryption
    if suite not in SUITES:
        raise InvalidInput(f"unknown encryption {suite!r}", hint=f"one of {', '.join(SUITES)}")
    check_pack_size(pack_size, block_size or BLOCK_BYTES)
    check_can_be_made(destination)
    return InitPlan(
        destination=destination,
        encryption=suite,
        block_size=BLOCK_BYTES if block_size is None else block_size,
        pack_size=pack_size,
    )


def run(plan: InitPlan, *, passphrase: Passphrase, on_event: OnEvent = ignore) -> InitReport:
    """Make the repository. Raises Conflict when there is one, and what the store raises."""
    made = create_repository(
        plan.destination,
        passphrase=passphrase,
        encryption=plan.encryption,
        block_size=plan.block_size,
        pack_size=plan.pack_size,
    )
    for notice in made.notices:
        on_event(Notice(notice))
    return InitReport(
        destination=made.store.url,
        repository=made.config.id,
        encryption=made.config.encryption,
        block_size=made.config.block_size,
        conditional_put=made.conditional,
        pack_size=made.config.pack_size,
        findings=tuple(made.notices),
    )
