"""get_jobs: read rows by their state from Python, streamed, changing nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import RowMapping, Select, select

from nih_sched.dialects import dialect_of
from nih_sched.table import column_of, find_table, fit

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Session


def get_jobs(
    session: Session,
    status_key: str,
    ready_val: str | int,
    columns: Sequence[str] | None = None,
    batch_size: int = 100,
    *,
    table: str = "jobs",
) -> Iterator[RowMapping]:
    """Rows whose status column holds a word, by key, streamed: memory stays flat however many there are.

    Args:
        session: an SQLAlchemy session; only read from.
        status_key: the status column.
        ready_val: the word.
        columns: the columns to select; all by default.
        batch_size: rows fetched at a time.
        table: the table, or schema.table.

    Yields:
        each row as a mapping from column name to value.

    Raises:
        NoSuchTable, NoSuchColumn: at the first row asked for.
    """
    connection = session.connection()
    query = _query(connection, status_key, ready_val, columns, table)
    # For this statement alone: set on the connection, it would stay for the session's own statements.
    with connection.execute(query, execution_options={"yield_per": batch_size}).mappings() as rows:
        yield from rows


async def get_jobs_async(
    session: AsyncSession,
    status_key: str,
    ready_val: str | int,
    columns: Sequence[str] | None = None,
    batch_size: int = 100,
    *,
    table: str = "jobs",
) -> AsyncIterator[RowMapping]:
    """get_jobs for an AsyncSession; needs `sqlalchemy[asyncio]`. Arguments, rows and errors are the same."""
    connection = await session.connection()
    query = await connection.run_sync(lambda bind: _query(bind, status_key, ready_val, columns, table))
    async with connection.stream(query, execution_options={"yield_per": batch_size}) as result:
        async for row in result.mappings():
            yield row


def _query(bind: Any, status_key: str, ready_val: str | int, columns: Sequence[str] | None, table: str) -> Select[Any]:
    _, found = find_table(bind, table)
    status = column_of(found, status_key, "argument status_key")
    wanted = found.columns if columns is None else [column_of(found, name, "argument columns") for name in columns]
    word = fit(status, str(ready_val))
    return select(*wanted).where(dialect_of(bind.engine).is_word(status, word)).order_by(*found.primary_key.columns)
