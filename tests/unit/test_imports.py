"""What a command doesn't need it doesn't import: RQ, Redis and SQLAlchemy take longer to import than to ask."""

from __future__ import annotations

import subprocess
import sys

import pytest

LOADED = (
    "import sys; print(*sorted({name.split('.')[0] for name in sys.modules} & {'redis', 'rich', 'rq', 'sqlalchemy'}))"
)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("cli", ""),
        ("cli.look", "sqlalchemy"),
        ("cli.rows", "sqlalchemy"),
        ("cli.change", "sqlalchemy"),
        ("cli.doctor", "redis sqlalchemy"),
    ],
)
def test_importing_a_command_brings_no_more_than_it_needs(module: str, expected: str) -> None:
    code = f"import nih_sched.{module}; {LOADED}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def test_the_ledger_for_one_database_brings_no_other_dialect() -> None:
    code = "import sys; from nih_sched import ledger; ledger.tables(None, 'sqlite')"
    shown = "print(*sorted(name for name in sys.modules if name.startswith('sqlalchemy.dialects.')))"
    done = subprocess.run([sys.executable, "-c", f"{code}; {shown}"], capture_output=True, text=True, check=True)
    assert not any(name in done.stdout for name in ("postgresql", "mysql"))
