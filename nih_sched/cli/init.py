"""scheduler init."""

from __future__ import annotations

import click
from sqlalchemy import Engine, text
from sqlalchemy.exc import SQLAlchemyError

from nih_sched import ledger, sample
from nih_sched.cli.options import TABLE, settings_options
from nih_sched.dialects import address, connect, dialect_of
from nih_sched.dialects.base import reason
from nih_sched.errors import CantNotify, DatabaseRefused, NoSuchTable
from nih_sched.model import State
from nih_sched.settings import Settings
from nih_sched.table import RowTable, find_table, reflect


@click.command()
@settings_options(TABLE)
@click.option("--sample", "with_sample", is_flag=True, help="Make a table with 20 sample rows too, if it isn't there.")
@click.option("--print-sql", is_flag=True, help="Print the SQL that would be run; run nothing.")
@click.option("--create-index", is_flag=True, help="Create the recommended index on your table too.")
@click.option("--notify", is_flag=True, help="Create triggers on your table that tell of new rows; PostgreSQL only.")
def init(settings: Settings, with_sample: bool, print_sql: bool, create_index: bool, notify: bool) -> None:
    """Make our tables nih_sched_* beside yours, and recommend an index. Yours is not touched."""
    engine = connect(settings.database_url, create=True)
    own = ledger.tables(settings.ledger_schema, engine.dialect.name)
    if notify and not dialect_of(engine).unnotify_ddl(settings.ledger_schema):
        raise CantNotify(database=address(engine.url))
    if print_sql:
        statements = ledger.ddl(engine, own)
        if notify:
            statements += _notify_ddl(engine, reflect(engine, settings, address(engine.url)), settings)
        click.echo("".join(f"{one};\n\n" for one in statements).rstrip() or "-- Our tables are there and up to date.")
        return
    there = ledger.exists(engine, own, of=own.attempts)
    done = "Found" if not ledger.ensure(engine, own) else "Upgraded" if there else "Made"
    click.echo(f"{done} our tables nih_sched_* in {address(engine.url)}.")
    if with_sample:
        table = sample.sample_table(settings.table, settings.ready_val, settings.status_key)
        full_name = _full_name(engine, settings.table)
        if sample.create(engine, own, full_name, table):
            click.echo(f"Made table {settings.table} with {len(sample.rows())} sample rows.")
        else:
            click.echo(f"Table {settings.table} is there already; it was not touched.")
    try:
        rows = reflect(engine, settings, address(engine.url))
    except NoSuchTable as error:
        click.echo(f"{error}")
        return
    index = dialect_of(engine).index_ddl(rows.table, rows.status, rows.words[State.READY], rows.keys)
    if create_index:
        _create(engine, [index], "the index")
    else:
        click.echo(f"Recommended for a large table (--create-index creates it):\n  {index};")
    if notify:
        _create(engine, _notify_ddl(engine, rows, settings), "the triggers", briefly=True)
    engine.dispose()


def _notify_ddl(engine: Engine, rows: RowTable, settings: Settings) -> list[str]:
    return dialect_of(engine).notify_ddl(rows.table, rows.status, rows.words[State.READY], settings.ledger_schema)


def _create(engine: Engine, statements: list[str], what: str, *, briefly: bool = False) -> None:
    try:
        with engine.begin() as connection:
            if briefly:  # while a trigger waits for a long transaction's lock, nobody else can write
                dialect_of(engine).wait_briefly(connection)
            for statement in statements:
                connection.execute(text(statement.replace(":", "\\:")))
    except SQLAlchemyError as error:
        raise DatabaseRefused(address=address(engine.url), what=what, reason=reason(error)) from error
    click.echo("\n".join(f"Created: {statement};" for statement in statements if statement.startswith("CREATE")))


def _full_name(engine: object, name: str) -> str:
    try:
        return find_table(engine, name)[0]  # type: ignore[arg-type]
    except NoSuchTable:
        from sqlalchemy import inspect  # noqa: PLC0415

        schema, _, plain = name.rpartition(".")
        return f"{schema or inspect(engine).default_schema_name or 'main'}.{plain}"
