"""scheduler doctor."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
from sqlalchemy.exc import SQLAlchemyError

from nih_sched import doctor, telemetry
from nih_sched.cli.look import looking, redis_url_of
from nih_sched.cli.options import COMMON, settings_options
from nih_sched.dialects import address
from nih_sched.dialects.base import reason
from nih_sched.doctor import Finding
from nih_sched.errors import BadLedger, DatabaseRefused, NoSuchTable, UnreachableDatabase, UnreachableRedis
from nih_sched.settings import Settings

if TYPE_CHECKING:
    from redis import Redis


@click.command("doctor")
@settings_options((*COMMON, "dashboard_port"))
@click.option("--fix", is_flag=True, help="Put right what can be put right from here.")
@click.option("--json", "as_json", is_flag=True, help="Print a list for programs.")
def doctor_(settings: Settings, fix: bool, as_json: bool) -> int:
    """Look for what is wrong in database, Redis and workers: what it is, why it matters, what to type.

    Exit code 1 if a problem was found and not fixed; advice alone is no problem.
    """
    found = _found(settings)
    fixed = {finding.name: _fixed(finding, settings) for finding in found if fix and finding.fix is not None}
    if as_json:
        click.echo(json.dumps([finding.as_json() | {"fixed": fixed.get(finding.name)} for finding in found], indent=2))
    else:
        click.echo("\n".join(_words(finding, fixed.get(finding.name)) for finding in found) or "Nothing is wrong.")
    return 1 if any(finding.is_problem and finding.name not in fixed for finding in found) else 0


def _words(finding: Finding, fixed: str | None) -> str:
    what = telemetry.one_line(finding.what)
    lines = [
        f"{what}{'' if what.endswith('.') else '.'}",
        f"  {finding.why}",
        f"  {telemetry.one_line(finding.remedy)}",
    ]
    return "\n".join(lines + ([f"  {fixed}"] if fixed else []))


def _fixed(finding: Finding, settings: Settings) -> str:
    assert finding.fix is not None  # noqa: S101 - the caller has looked
    try:
        return finding.fix()
    except SQLAlchemyError as error:
        raise DatabaseRefused(
            address=address(settings.database_url), what="the fix; nothing was changed", reason=reason(error)
        ) from error


def _found(settings: Settings) -> list[Finding]:
    with contextlib.ExitStack() as end:

        @functools.cache
        def reach() -> tuple[Redis | None, Sequence[Finding]]:
            connection, found = _redis(settings)
            if connection is not None:
                end.callback(connection.close)
            return connection, found

        try:
            with looking(settings) as desk:
                return doctor.findings(settings, desk, reach)
        except (UnreachableDatabase, NoSuchTable, BadLedger, DatabaseRefused) as error:
            why, remedy = "Nothing runs without it.", "Mend that first, then: scheduler doctor"
            return [*reach()[1], Finding("database", str(error), why, remedy)]


def _redis(settings: Settings) -> tuple[Redis | None, Sequence[Finding]]:
    """A connection; or what to say of there being none. An embedded Redis lives with its scheduler: none is no news."""
    url = redis_url_of(settings)
    if url is None:
        return None, []
    from nih_sched import redis_client  # noqa: PLC0415 - slow to import

    try:
        return redis_client.connect(url), []
    except UnreachableRedis as error:
        why = "Nothing is claimed while Redis is away. What was claimed is sent again when it is back."
        return None, [Finding("redis", str(error), why, "Start Redis, or set --redis-url.")]
