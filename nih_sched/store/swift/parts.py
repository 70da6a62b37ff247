"""What both ways have in common."""

from __future__ import annotations

from typing import Any, NamedTuple

from sqlalchemy import literal
from sqlalchemy.sql.expression import bindparam

from nih_sched.model import Claim
from nih_sched.store.desk import Desk


class Taken(NamedTuple):
    """What was claimed, and whether the careful way has more to do."""

    claims: list[Claim]
    more: bool


def new_record(desk: Desk) -> dict[str, Any]:
    """What the record of each new claim has; its parameters are in given()."""
    c = desk.ledger.attempts.c
    return {
        "source": literal(desk.source.name),
        "attempt": literal(1),
        "failures": literal(0),
        "tries": bindparam("its_tries", type_=c.tries.type),
        "claimed_by": bindparam("its_producer", type_=c.claimed_by.type),
    }


def given(desk: Desk, producer: str, tries: int) -> dict[str, Any]:
    """Parameters of a claim: those of new_record(), and the start of what an open_key is made of."""
    return {"its_table": f"{desk.rows.name}\0".encode(), "its_producer": producer, "its_tries": tries}
