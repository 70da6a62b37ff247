"""Save a dump of the database DATABASE_URL; later hold the database against it: what else changed than may change?

Allowed are "Status" and "changedAt" of lines that were new, and audit rows that were added. nih-sched's own tables are
left out of the dump; everything else is in it, the schema too.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, MetaData, create_engine, inspect, select, text

LINES, AUDIT = "OrderLines", "StatusAudit"
SCHEMA_VIEWS = {  # view in information_schema: its column that names the schema
    "columns": "table_schema",
    "table_constraints": "table_schema",
    "key_column_usage": "table_schema",
    "referential_constraints": "constraint_schema",
    "check_constraints": "constraint_schema",
    "triggers": "trigger_schema",
    "routines": "routine_schema",
}


def dump(connection: Connection) -> dict[str, dict[str, Any]]:
    """{table: {key: row}}, and as if they were tables too, what information_schema and the indexes say."""
    inspector = inspect(connection)
    found: dict[str, dict[str, Any]] = {}
    for view, column in SCHEMA_VIEWS.items():
        query = text(f"SELECT * FROM information_schema.{view} WHERE {column} = :schema")
        facts = connection.execute(query, {"schema": inspector.default_schema_name})
        lines = [str(dict(row._mapping)) for row in facts]
        found[view] = {line: line for line in lines if "nih_sched_" not in line and "_not_null" not in line}
    tables = MetaData()
    tables.reflect(connection, only=lambda name, _: not name.startswith("nih_sched_"))
    for name, table in tables.tables.items():
        found[f"indexes of {name}"] = {str(index["name"]): str(index) for index in inspector.get_indexes(name)}
        rows = connection.execute(select(table))
        found[name] = {
            ",".join(str(row._mapping[column]) for column in table.primary_key): {
                column: str(value) for column, value in row._mapping.items()
            }
            for row in rows
        }
    return found


def differences(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> tuple[list[str], int, int]:
    """What changed that may not, how many lines changed as they may, and how many audit rows were added."""
    wrong: list[str] = []
    changed = audited = 0
    for table in sorted(before.keys() | after.keys()):
        old_rows, new_rows = before.get(table, {}), after.get(table, {})
        for key in old_rows.keys() | new_rows.keys():
            old, new = old_rows.get(key), new_rows.get(key)
            if old == new:
                continue
            if table == AUDIT and old is None:
                audited += 1
            elif table == LINES and old and new and old["Status"] == "0" and may_change(old) == may_change(new):
                changed += 1
            else:
                wrong.append(f"{table} {key}:\n  before {old}\n  after  {new}")
    return wrong, changed, audited


def may_change(line: dict[str, str]) -> dict[str, str]:
    return {column: value for column, value in line.items() if column not in ("Status", "changedAt")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["save", "check"])
    parser.add_argument("file", type=Path)
    args = parser.parse_args()

    with create_engine(os.environ["DATABASE_URL"]).connect() as connection:
        now = dump(connection)
    if args.action == "save":
        args.file.write_text(json.dumps(now, indent=1), encoding="utf-8")
        return
    wrong, changed, audited = differences(json.loads(args.file.read_text(encoding="utf-8")), now)
    for line in wrong:
        print(line)
    print(f"{changed} lines changed their status, {audited} audit rows were added, {len(wrong)} other differences")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
