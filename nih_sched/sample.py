"""The sample table `jobs` that `scheduler init --sample` makes, and the stand-in handler that runs on it alone."""

from __future__ import annotations

import time

from sqlalchemy import Column, Connection, Engine, Float, Integer, MetaData, String, Table, insert, inspect, select

from nih_sched.dialects import dialect_of
from nih_sched.errors import Fail
from nih_sched.ledger import Ledger

STAND_IN = "nih_sched.sample:arbitrary_job"
_MARK = "sample"
_COLUMNS = ("id", "state", "name", "seconds", "fails")


def sample_table(name: str = "jobs", ready: str = "Pending", status_key: str = "state") -> Table:
    """The sample's shape: fails says how many of the first attempts fail, -1 that the row can't be done at all."""
    schema, _, plain = name.rpartition(".")
    return Table(
        plain,
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column(status_key, String(32), nullable=False, server_default=ready, index=False),
        Column("name", String(100), nullable=False),
        Column("seconds", Float, nullable=False, server_default="0.1"),
        Column("fails", Integer, nullable=False, server_default="0"),
        schema=schema or None,
    )


def rows() -> list[dict[str, object]]:
    """Twenty rows: eighteen that are done at once, one that needs a retry, one that fails for good."""
    plain = [{"name": f"sample {n}", "seconds": 0.05 * (1 + n % 4), "fails": 0} for n in range(1, 19)]
    return [
        *plain,
        {"name": "fails once", "seconds": 0.1, "fails": 1},
        {"name": "always fails", "seconds": 0.1, "fails": -1},
    ]


def create(engine: Engine, ledger: Ledger, full_name: str, table: Table) -> bool:
    """Make the sample table with its rows; False, and nothing touched, when a table of that name is there."""
    if inspect(engine).has_table(table.name, schema=table.schema):
        return False
    table.create(engine)
    with engine.begin() as connection:
        connection.execute(insert(table), rows())
        mark(connection, ledger, full_name)
    return True


def mark(connection: Connection, ledger: Ledger, full_name: str) -> None:
    """Remember that this table is our sample."""
    name = _mark_name(full_name)
    if connection.execute(select(ledger.meta.c.value).where(ledger.meta.c.name == name)).scalar() is None:
        connection.execute(insert(ledger.meta).values(name=name, value=_MARK))


def is_sample(engine: Engine, ledger: Ledger, full_name: str, columns: tuple[str, ...]) -> bool:
    """Whether `init --sample` made this table; one of the user's own by the same name has other columns."""
    if not {"seconds", "fails", "name"} <= set(columns) or len(columns) != len(_COLUMNS):
        return False
    query = select(ledger.meta.c.value).where(ledger.meta.c.name == _mark_name(full_name))
    with dialect_of(engine).reading(engine) as connection:
        return connection.execute(query).scalar() == _MARK


def _mark_name(full_name: str) -> str:
    return f"sample:{full_name}"[:190]


def arbitrary_job(name: str, seconds: float, fails: int, attempt: int) -> str:
    """Stand in for a real handler: sleep, and fail as often as the row says.

    Raises:
        Fail: when `fails` is negative. RuntimeError: in the first `fails` attempts.
    """
    time.sleep(seconds)
    if fails < 0:
        raise Fail("this sample row can't be done")
    if attempt <= fails:
        raise RuntimeError(f"attempt {attempt} fails, as the row asks")
    return f"{name}: slept {seconds:g} s"
