"""Hold every result against what the programs `sha256sum` (on macOS `shasum -a 256`) and `wc -l` print."""

import argparse
import json
import os
import shutil
import subprocess
import sys

from sqlalchemy import create_engine, text

SHA256 = ["sha256sum"] if shutil.which("sha256sum") else ["shasum", "-a", "256"]

# One record for each attempt; `files-…` is the name of the source, and row_key is the row's key as a JSON list.
ATTEMPTS = "SELECT row_key, outcome, result FROM nih_sched_attempts WHERE source LIKE 'files-%' ORDER BY id"


def first_words(command: list[str], paths: list[str]) -> dict[str, str]:
    """What the command prints before each path."""
    words: dict[str, str] = {}
    for start in range(0, len(paths), 500):
        chunk = paths[start : start + 500]
        printed = subprocess.run([*command, *chunk], stdout=subprocess.PIPE, check=True).stdout.splitlines()
        words |= {path: line.split()[0].decode() for path, line in zip(chunk, printed, strict=False)}
    return words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database-url", default=os.environ.get("DATABASE_URL", "sqlite:///jobs.db"))
    args = parser.parse_args()

    with create_engine(args.database_url).connect() as connection:
        rows = connection.execute(text("SELECT id, path, state FROM files ORDER BY id")).all()
        attempts = connection.execute(text(ATTEMPTS)).all()
    results = {json.loads(key)[0]: json.loads(result) for key, outcome, result in attempts if outcome == "done"}

    paths = [row.path for row in rows]
    sums, lines = first_words(SHA256, paths), first_words(["wc", "-l"], paths)
    different = []
    for row in rows:
        expected = {"sha256": sums[row.path], "lines": int(lines[row.path])}
        if row.state != "Done" or results.get(row.id) != expected:
            different.append(f"{row.path} is {row.state}, {results.get(row.id)}, expected {expected}")

    done = sum(row.state == "Done" for row in rows)
    print(f"{len(rows)} rows, {done} Done, {len(attempts)} attempts, {len(different)} different")
    for line in different[:10]:
        print(line)
    sys.exit(1 if different or not rows else 0)


if __name__ == "__main__":
    main()
