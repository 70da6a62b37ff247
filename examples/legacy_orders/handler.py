"""What `scheduler` runs for each order line."""

from typing import Any

from nih_sched import Fail


def ship(attempt: int, **line: Any) -> dict[str, str]:
    """Called with all columns of the row by name: no parameter could be named "Line No", so **line takes them."""
    if line["Item"] == "no longer made":
        raise Fail("nobody makes it any more")  # final: a retry wouldn't help
    if line["Item"] == "always out of stock":
        raise LookupError("none in stock")
    if line["Item"] == "carrier is busy" and attempt == 1:
        raise ConnectionError("the carrier didn't answer")
    return {"label": f"{line['orderId']}/{line['Line No']}: {line['Stückzahl']} x {line['Item']}"}


def post(attempt: int, **line: Any) -> dict[str, str]:
    """The same for lines that go by letter; by_group.toml says which those are."""
    return ship(attempt, **line) | {"stamp": "0.95"}
