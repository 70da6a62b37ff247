"""Create the table `files`, with one row for each file of this Python's standard library."""

import argparse
import os
import sysconfig
from pathlib import Path

from sqlalchemy import Column, Integer, MetaData, String, Table, create_engine, insert

NOT_OURS = {"site-packages", "dist-packages", "__pycache__"}

files = Table(
    "files",
    MetaData(),
    Column("id", Integer, primary_key=True),
    Column("path", String(700), nullable=False, unique=True),
    Column("state", String(20), nullable=False, server_default="Pending"),
)


def library_files() -> list[str]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = (path for path in folder.rglob("*") if not NOT_OURS & set(path.parts) and path.is_file())
    return sorted(map(str, found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database-url", default=os.environ.get("DATABASE_URL", "sqlite:///jobs.db"))
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take every Nth file only")
    args = parser.parse_args()

    rows = [{"path": path} for path in library_files()[:: args.every]]
    engine = create_engine(args.database_url)
    files.create(engine)  # raises if there is a table of that name: it may be somebody's
    with engine.begin() as connection:
        connection.execute(insert(files), rows)
    print(f"{len(rows)} files, all Pending")


if __name__ == "__main__":
    main()
