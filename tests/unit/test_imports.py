"""What a command doesn't need it doesn't import: RQ, Redis and SQLAlchemy take longer to import than to ask."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import ModuleType

import pytest

LOADED = (
    "import sys; print(*sorted({name.split('.')[0] for name in sys.modules} & {'redis', 'rich', 'rq', 'sqlalchemy'}))"
)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("cli", ""),
        ("cli.status", "sqlalchemy"),
        ("cli.source", "sqlalchemy"),
        ("cli.rows", "sqlalchemy"),
        ("cli.change", "sqlalchemy"),
        ("cli.doctor", "sqlalchemy"),
    ],
)
def test_importing_a_command_brings_no_more_than_it_needs(module: str, expected: str) -> None:
    code = f"import nih_sched.{module}; {LOADED}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def _modules(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_a_command_brings_none_of_our_modules_that_it_does_not_need() -> None:
    ours = {name for name in _modules("import nih_sched.cli.source") if name.startswith("nih_sched.")}
    assert {name for name in ours if name.startswith("nih_sched.store.")} == {
        "nih_sched.store.desk",
        "nih_sched.store.unreadable",
    }
    assert not ours & {"nih_sched.embedded", "nih_sched.reports", "nih_sched.sample"}
    status = _modules("from nih_sched import reports; reports.status")
    assert "nih_sched.store.overview" in status
    assert not status & {f"nih_sched.reports.{name}" for name in ("listed", "minutes", "reasons", "shown")}
    assert not status & {f"nih_sched.store.{name}" for name in ("attempts", "claims", "listing", "orphans", "records")}


def test_the_command_line_brings_nothing_for_shells_and_config_files_alone() -> None:
    brought = _modules("import nih_sched.cli") - _modules("pass")  # whoever measures us reads files of its own
    assert not brought & {"click.shell_completion", "tomllib"}


def test_who_claims_and_begins_rows_brings_no_databases_dialect() -> None:
    brought = _modules("import nih_sched.store.attempts, nih_sched.store.claims")
    assert not {name for name in brought if name.startswith("sqlalchemy.dialects.")}


@pytest.mark.parametrize("name", ["nih_sched", "nih_sched.reports", "nih_sched.store"])
def test_names_that_are_imported_when_used_are_those_that_are_promised(name: str) -> None:
    package = importlib.import_module(name)
    for promised in package.__all__:
        assert not isinstance(getattr(package, promised), ModuleType), promised
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = package.nothing_such


def test_the_ledger_for_one_database_brings_no_other_dialect() -> None:
    code = "import sys; from nih_sched import ledger; ledger.tables(None, 'sqlite')"
    shown = "print(*sorted(name for name in sys.modules if name.startswith('sqlalchemy.dialects.')))"
    done = subprocess.run([sys.executable, "-c", f"{code}; {shown}"], capture_output=True, text=True, check=True)
    assert not any(name in done.stdout for name in ("postgresql", "mysql"))
