"""Our own tables, beside the user's: their shape, their making, their version."""

from nih_sched.ledger.making import SCHEMA_VERSION, check_made, ddl, drop, ensure, exists, identity, look_up, version
from nih_sched.ledger.shape import Ledger, of_row, of_rows, tables

__all__ = [
    "SCHEMA_VERSION",
    "Ledger",
    "check_made",
    "ddl",
    "drop",
    "ensure",
    "exists",
    "identity",
    "look_up",
    "of_row",
    "of_rows",
    "tables",
    "version",
]
