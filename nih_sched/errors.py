"""One tree under NihError. A class's docstring is its message: `{name}` is filled in from the arguments.

What a handler may raise on purpose, Fail and RetryLater, stands here too: nothing below imports anything.
"""

from __future__ import annotations

from typing import Any


class NihError(Exception):
    """{reason}"""

    exit_code = 2

    def __init__(self, **facts: Any) -> None:
        self.facts = facts
        super().__init__((type(self).__doc__ or "").format_map(facts))


class UsageError(NihError):
    """{reason}"""


class BadSetting(UsageError):
    """{name} is {value!r} ({origin}), expected {expected}."""


class BadConfigFile(UsageError):
    """{path}: {reason}"""


class MissingDriver(UsageError):
    """No driver for {scheme}:// is installed. Type: pip install 'nih-sched[{extra}]'"""


class UnreachableDatabase(NihError):
    """Database {address} can't be reached: {reason}"""


class UnreachableRedis(NihError):
    """Redis {address} can't be reached: {reason}"""


class DatabaseRefused(NihError):
    """Database {address} refused {what}: {reason}"""


class CantNotify(UsageError):
    """{database} can't notify: --notify is for PostgreSQL. SQLite needs nothing; else ring, see docs/wake-up.md."""


class NoSuchTable(UsageError):
    """There is no table {table} in {address}.{hint}"""


class NotATable(UsageError):
    """{table} is a view; rows of a view can't be claimed. Name the table below it with --table."""


class NoSuchColumn(UsageError):
    """Table {table} has no column {column!r} ({origin}). It has: {columns}."""


class NoPrimaryKey(UsageError):
    """Table {table} has no primary key, so its rows can't be told apart. Name unique columns with --primary-key."""


class BadStateWord(UsageError):
    """Column {column} of {table} can't hold {problems}. Its type is {type}.{hint}"""


class AmbiguousStates(UsageError):
    """The {state} word must differ from the ready word, both are {word!r}. Set {option} to another word."""


class NoHandler(UsageError):
    """No handler is set for table {table}. Name one with --job module:function, --command "…", or [handlers]."""


class BadHandler(UsageError):
    """Handler {handler} can't be used: {reason}"""


class BadLedger(NihError):
    """{reason}"""


class NewerLedger(BadLedger):
    """Our tables in {address} have schema version {found}; this nih-sched has {known}. Upgrade nih-sched."""


class OlderLedger(BadLedger):
    """Our tables in {address} are of an older nih-sched, expected version {known}. Type: scheduler init"""


class ClaimRefused(NihError):
    """The database refused to set {column} of {table} to {word!r}: {reason}. Choose words that its rules allow."""


class KeysDontMatch(NihError):
    """Column(s) {columns} of {table} don't tell rows apart, or a trigger keeps rows: of {wanted} it took {taken}."""


class UnusableKey(UsageError):
    """Column(s) {columns} can't be the key of {table}: {reason}"""


class NoSuchRow(UsageError):
    """Table {table} has no row with the key {key}."""


class CantCancel(UsageError):
    """The cancelled word {word!r} is also that of a {state} row, so it can cancel none. Set --cancelled-val."""


class NoSuchSource(UsageError):
    """There is no source {source}.{hint}"""


class ChunkRefused(NihError):
    """The database refused to change a chunk of {count} rows, {done} rows were changed before: {reason}"""


class EmbeddedRedisFailed(NihError):
    """The embedded Redis couldn't be started: {reason} Set REDIS_URL to a Redis server of your own."""


class Fail(Exception):
    """Raise it in a handler to fail the row for good: no more tries. Its text is kept as the reason."""


class RetryLater(Exception):
    """Raise it in a handler to run the row again after `seconds`; no try is spent.

    Args:
        seconds: how long to wait, from 0 to 100 years; fractions count.
    """

    LONGEST = 100 * 365 * 86400.0  # beyond it databases run out of dates

    def __init__(self, seconds: float) -> None:
        if not 0 <= seconds <= self.LONGEST:
            raise ValueError(f"RetryLater takes seconds from 0 to {self.LONGEST:.0f}, not {seconds!r}")
        self.seconds = float(seconds)
        super().__init__(self.seconds)  # as given, so that a process pool can carry it

    def __str__(self) -> str:
        return f"asked to be run again in {self.seconds:g} s"


class RowTimeout(BaseException):
    """The row ran longer than its timeout. Not an Exception, so that `except Exception` can't swallow it."""


class RowInterrupted(BaseException):
    """The row must stop now, because its worker stops. Not an Exception, for the same reason."""


class AttemptFailed(Exception):
    """What our RQ function raises once the outcome is in the ledger: it makes RQ's Retry or failed registry act.

    Carries ids only, never what the row or its exception said: RQ keeps this text in Redis.
    """
