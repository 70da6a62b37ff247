"""The examples on real input, through the real command line."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import sqlalchemy
from servers import Database, plain_engine, run, scheduler
from sqlalchemy import MetaData, Table, select, text

pytestmark = pytest.mark.many  # what the measured tests measure already, in many more processes

EXAMPLES = Path(__file__).parents[2] / "examples"
EVERY = 25  # of the files, for time
HANDLERS = {102: 3, 103: 1, 104: 1}  # lines that fail, and how often


class Example:
    """A copy of an example's folder, its programs run on one database."""

    def __init__(self, name: str, folder: Path, database: Database, redis_url: str) -> None:
        self.folder = shutil.copytree(EXAMPLES / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        self.engine = plain_engine(database.url, poolclass=sqlalchemy.NullPool)
        self.env = {"DATABASE_URL": database.url, "REDIS_URL": redis_url}

    def python(self, *args: str) -> subprocess.CompletedProcess[str]:
        return run([sys.executable, *args], env=self.env, cwd=self.folder)

    def scheduler(self, line: int) -> subprocess.CompletedProcess[str]:
        """The README's own command, counted from 0."""
        readme = (self.folder / "README.md").read_text("utf-8").replace("\\\n", " ")
        command = re.findall(r"^scheduler (.+)", readme, re.MULTILINE)[line]
        return scheduler(*shlex.split(command), env=self.env, cwd=self.folder, timeout=600)


def test_stdlib_digests(sqlite_db: Database, redis_url: str, tmp_path: Path) -> None:
    example = Example("stdlib_digests", tmp_path, sqlite_db, redis_url)
    made = example.python("make_table.py", "--every", str(EVERY))
    assert made.returncode == 0, made.stderr
    count = int(made.stdout.split()[0])
    assert count >= 500 / EVERY  # Debian's Python comes without its tests: 750 files

    ran = example.scheduler(0)
    assert ran.returncode == 0, ran.stderr
    checked = example.python("check.py")
    assert checked.stdout == f"{count} rows, {count} Done, {count} attempts, 0 different\n"
    assert checked.returncode == 0

    with example.engine.begin() as connection:
        connection.execute(text("UPDATE nih_sched_attempts SET result = '{}' WHERE id = 1"))
    assert example.python("check.py").returncode == 1  # it does look


@pytest.fixture
def legacy(request: pytest.FixtureRequest, redis_url: str, tmp_path: Path) -> Example:
    """The tables as the older application left them."""
    database: Database = request.getfixturevalue(f"{request.param}_db")
    example = Example("legacy_orders", tmp_path, database, redis_url)
    schema = (example.folder / f"schema_{database.name}.sql").read_text("utf-8")
    connection = example.engine.raw_connection()
    with connection.cursor() as cursor:
        for statement in re.split(r";\n(?:\n|\Z)", schema):
            if statement:
                cursor.execute(statement)
    connection.commit()
    connection.close()
    return example


@pytest.mark.parametrize(
    ("legacy", "line", "failed"),
    [
        pytest.param("postgresql", 0, {102: 3, 103: 1}, marks=pytest.mark.postgresql, id="postgresql-job"),
        pytest.param("postgresql", 1, HANDLERS, marks=pytest.mark.postgresql, id="postgresql-handlers"),
        pytest.param("mariadb", 1, HANDLERS, marks=pytest.mark.mariadb, id="mariadb-handlers"),
    ],
    indirect=["legacy"],
)
def test_legacy_orders(legacy: Example, line: int, failed: dict[int, int]) -> None:
    saved = legacy.python("compare.py", "save", "before.json")
    assert saved.returncode == 0, saved.stderr
    ran = legacy.scheduler(line)
    assert ran.returncode == 1, ran.stderr  # rows failed

    compared = legacy.python("compare.py", "check", "before.json")
    assert re.fullmatch(r"44 lines changed .*, 0 other differences\n", compared.stdout), compared.stdout
    assert compared.returncode == 0

    lines, audit, attempts = (reflect(legacy, name) for name in ("OrderLines", "StatusAudit", "nih_sched_attempts"))
    moves = select(audit.c.orderId, audit.c["Line No"], audit.c["from"], audit.c["to"])
    with legacy.engine.begin() as connection:
        codes = Counter(connection.scalars(select(lines.c.Status)))
        tried = Counter(json.loads(row_key)[1] for row_key in connection.scalars(select(attempts.c.row_key)))
        moved = Counter(map(tuple, connection.execute(moves.where(audit.c["from"] != audit.c["to"]))))
        connection.execute(lines.update().where(lines.c["Line No"] == 203).values(Stückzahl=2))
    assert codes == {1: 1, 2: 45 - len(failed), 9: 1 + len(failed)}
    assert {number: count for number, count in tried.items() if number > 100} == {101: 2, 104: 1} | failed
    # The table's own trigger saw each new line claimed once and ended once; one audit row stood there before.
    assert set(moved.values()) == {1}
    assert Counter(move[2:] for move in moved) == {(0, 1): 44, (1, 2): 45 - len(failed), (1, 9): len(failed)}
    assert legacy.python("compare.py", "check", "before.json").returncode == 1  # it does look


def reflect(example: Example, name: str) -> Table:
    return Table(name, MetaData(), autoload_with=example.engine)
