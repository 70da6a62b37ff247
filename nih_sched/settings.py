"""Frozen Settings: each field says its default, its help and where else it may be set; CLI and docs come from it."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from nih_sched import clock
from nih_sched.errors import BadConfigFile, BadSetting

CONFIG_FILE = "nih-sched.toml"
YEAR = 365 * 86400.0


def _option(  # the one place that words a setting
    default: Any,
    help: str,  # noqa: A002 - what click calls it
    *,
    env: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    metavar: str = "",
    shown: str = "",
    secret: bool = False,
    group: str = "common",
    check: Callable[[Any], object] | None = None,  # raises ValueError
    expected: str = "",
) -> Any:
    facts = {
        "help": help,
        "env": env,
        "low": low,
        "high": high,
        "choices": choices,
        "metavar": metavar,
        "shown": shown,
        "secret": secret,
        "group": group,
        "check": check,
        "expected": expected,
    }
    return dataclasses.field(default=default, metadata=facts, repr=not secret)


def kept_seconds(text: str) -> tuple[float, float]:
    """For how many seconds --keep-history keeps done claims, and all others; what it doesn't name has its default.

    Raises:
        ValueError: it names something else, or no time.
    """
    times = {"done": 86400.0, "others": 30 * 86400.0}
    for part in text.split(","):
        name, _, time = part.partition("=")
        if name.strip() not in times:
            raise ValueError(name)
        times[name.strip()] = clock.period(time)
    return times["done"], times["others"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What one scheduler does. Precedence: option, environment, config file, default."""

    max_concurrent_jobs: int = _option(
        0,
        "Worker processes of this instance: so many rows run at once.",
        env=("WEB_CONCURRENCY",),
        low=1,
        high=1024,
        shown="the cores that this process may use",
        group="first",
    )
    status_key: str = _option("state", "The status column.", metavar="COLUMN", group="first")
    ready_val: str = _option("Pending", "The word in it that makes a row ready.", metavar="WORD", group="first")
    tries: int = _option(
        3, "Retries after the first attempt; a row runs at most 1 + N times.", low=0, high=1000, group="first"
    )
    delay: float = _option(
        2.0, "Seconds from a row's first failure to its first retry.", low=0, high=YEAR, group="first"
    )
    backoff: float = _option(
        2.0, "Each further wait is this many times as long as the one before.", low=1e-3, high=1000, group="first"
    )
    max_delay: float = _option(86400.0, "No wait is longer than these seconds.", low=0, high=YEAR)
    jitter: float = _option(
        0.0, "Lengthen each wait by up to this fraction, at random, so that retries spread.", low=0, high=10
    )
    database_url: str = _option(
        "sqlite:///jobs.db",
        "The database, as an SQLAlchemy URL; postgres:// and mysql:// work too.",
        env=("DATABASE_URL",),
        metavar="URL",
        secret=True,
    )
    redis_url: str | None = _option(
        None,
        "The Redis that carries the jobs: redis://, rediss:// or unix://.",
        env=("REDIS_URL",),
        metavar="URL",
        shown="an embedded Redis, private to you and the database",
        secret=True,
    )
    table: str = _option("jobs", "The table whose rows are jobs, or schema.table.", metavar="TABLE")
    primary_key: str | None = _option(
        None, "Columns that tell rows apart, by commas.", metavar="COLUMNS", shown="the table's own"
    )
    where: str | None = _option(
        None, "SQL over the row's columns: which ready rows are ours.", metavar="SQL", shown="all"
    )
    created_column: str | None = _option(
        None,
        "The column that says when a row was added, for the age of the oldest ready one.",
        metavar="COLUMN",
        shown="",
        group="look",
    )
    queued_val: str | None = _option(None, "The word for a claimed row.", metavar="WORD", shown="Queued")
    started_val: str | None = _option(None, "The word for a running row.", metavar="WORD", shown="Started")
    done_val: str | None = _option(None, "The word for a row that succeeded.", metavar="WORD", shown="Done")
    failed_val: str | None = _option(None, "The word for a row that failed for good.", metavar="WORD", shown="Failed")
    cancelled_val: str | None = _option(None, "The word for a cancelled row.", metavar="WORD", shown="Cancelled")
    retrying_val: str | None = _option(
        None, "The word for a row that waits for its retry.", metavar="WORD", shown="the queued word"
    )
    states: str | None = _option(
        None, "All state words at once: ready=new,started=processing,done=ok,failed=error.", metavar="WORDS", shown=""
    )
    ledger_schema: str | None = _option(
        None, "The schema of our own tables nih_sched_*.", metavar="SCHEMA", shown="the connection's own"
    )
    job: str | None = _option(None, "The function to run for each row.", metavar="MODULE:FUNCTION", shown="")
    command: str | None = _option(
        None, "The command to run for each row; {column} is filled in, no shell is used.", metavar="COMMAND", shown=""
    )
    job_column: str | None = _option(
        None, "The column that picks one of the config file's [handlers] for each row.", metavar="COLUMN", shown=""
    )
    handlers: Mapping[str, str] | None = _option(None, "The [handlers] table of the config file.", group="file")
    preload: str | None = _option(
        None,
        "A module to import, or module:function to call, before workers fork, such as django:setup.",
        metavar="MODULE[:FUNCTION]",
        shown="",
    )
    on_horse_start: str | None = _option(
        None, "A function to call in each horse before its first row.", metavar="MODULE:FUNCTION", shown=""
    )
    timeout: float = _option(3600.0, "Seconds that one attempt of a row may take.", low=1e-3, high=YEAR)
    lease: float = _option(
        120.0,
        "Seconds for which a worker that can't be seen is presumed alive; then its rows move again.",
        low=2,
        high=86400,
    )
    max_interruptions: int = _option(
        10, "A row that is interrupted so many times in a row fails.", low=1, high=1_000_000
    )
    grace: float = _option(25.0, "Seconds that running rows get to end when we are told to stop.", low=0, high=86400)
    poll_interval: float = _option(
        2.5,
        "Seconds between looks at an idle table; shorter while rows run, at least 5 where we are told of new rows.",
        low=0.01,
        high=3600,
    )
    batch_size: int = _option(
        0,
        "Rows that one RQ job carries: as many as run in two seconds, or always this many.",
        low=1,
        high=1000,
        metavar="auto|N",
        shown="auto",
        group="run",
    )
    keep_history: str = _option(
        "done=1d,others=30d",
        "How long the history of ended claims is kept, done ones and others; 0 for hardly any.",
        metavar="TIMES",
        group="run",
        check=kept_seconds,
        expected="times such as done=1d,others=30d",
    )
    dry_run: bool = _option(False, "Show the claim's SQL, its plan, the count and the first 10 keys.", group="run")
    max_rows: int | None = _option(
        None, "Claim this many rows, see them to their end, then exit: a canary.", low=1, group="run", shown=""
    )
    burst: bool = _option(
        False, "Exit when nothing is left to do: 0 if all rows were done, 1 if one failed.", group="run"
    )
    log_format: str = _option("text", "How events are logged.", choices=("text", "json"))
    quiet: bool = _option(False, "Log only what went wrong.")
    dashboard_host: str = _option("127.0.0.1", "The address to listen on.", metavar="HOST", group="dashboard")
    dashboard_port: int = _option(9181, "The port to listen on.", env=("PORT",), low=1, high=65535, group="dashboard")
    dashboard_password: str | None = _option(
        None,
        "The password, for any user name.",
        metavar="PASSWORD",
        shown="on a terminal and on loopback: made up and shown",
        secret=True,
        group="dashboard",
    )
    dashboard_token: str | None = _option(
        None,
        "A token for programs: Authorization: Bearer TOKEN.",
        metavar="TOKEN",
        shown="",
        secret=True,
        group="dashboard",
    )
    dashboard_read_only: bool = _option(False, "Show everything, change nothing.", group="dashboard")
    metrics_port: int | None = _option(
        None, "Answer /metrics, /healthz and /readyz on this port.", low=1, high=65535, shown="", group="metrics"
    )
    metrics_host: str = _option(
        "127.0.0.1",
        "Its address; beyond loopback the dashboard's password or token is needed.",
        metavar="HOST",
        group="metrics",
    )
    dyno: str | None = _option(None, "Set by Heroku.", env=("DYNO",), group="hidden")
    config: str | None = _option(
        None, "The config file.", metavar="FILE", shown=f"{CONFIG_FILE} if there", group="file"
    )
    origins: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """What load() does, for Settings made in Python: fill in, spread --states, check."""
        values: dict[str, Any] = {"states": self.states}
        origins = dict(self.origins) or {"states": "option"}
        if not self.origins:
            taken = {n: "option" for n, f in fields().items() if n.endswith("_val") and getattr(self, n) != f.default}
            _spread_states(values, origins | taken)
            for name, field in fields().items():
                if getattr(self, name) not in (None, field.default):
                    _checked(name, field, getattr(self, name), "given")
        if self.max_concurrent_jobs == 0:
            values["max_concurrent_jobs"] = usable_cores()
        for name, value in values.items():
            object.__setattr__(self, name, value)  # frozen from here on

    def origin(self, name: str) -> str:
        """Where the value of field `name` came from, in words."""
        return self.origins.get(name, "default")


@functools.cache
def fields() -> dict[str, dataclasses.Field[Any]]:
    """The settings by name, in the order in which help shows them."""
    return {f.name: f for f in dataclasses.fields(Settings) if f.metadata}


def option_name(name: str) -> str:
    """max_rows -> --max-rows."""
    return "--" + name.replace("_", "-")


def env_names(name: str) -> tuple[str, ...]:
    """The environment variables that set a field, the first that is set wins."""
    return (f"NIH_SCHED_{name.upper()}", *fields()[name].metadata["env"])


@functools.cache
def _hints() -> dict[str, Any]:
    return get_type_hints(Settings)


def value_type(name: str) -> type:
    """The plain type of a field, without its None."""
    hint = _hints()[name]
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    kind: type = get_origin(hint) or hint
    return kind


def load(
    options: Mapping[str, Any],
    environ: Mapping[str, str],
    *,
    folder: Path | None = None,
) -> Settings:
    """Settings from what was typed, the environment and the config file.

    Args:
        options: values by field name; None means not given.
        environ: usually os.environ.
        folder: where the config file is looked for when none is named; by default the current one.

    Raises:
        BadSetting: a value of a wrong type or out of range.
        BadConfigFile: an unreadable file, or unknown keys in it.
    """
    config = options.get("config") or environ.get("NIH_SCHED_CONFIG")
    file_values, file_name = _read_config(config, folder or Path())
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for name, field in fields().items():
        if options.get(name) is not None:
            raw, origin = options[name], "option"
        elif (env := next((e for e in env_names(name) if environ.get(e)), None)) and name != "handlers":
            raw, origin = environ[env], f"environment {env}"
        elif name in file_values:
            raw, origin = file_values[name], f"file {file_name}"
        else:
            continue
        values[name] = _checked(name, field, raw, origin)
        origins[name] = origin
    _spread_states(values, origins)
    return Settings(**values, origins=origins)


def _read_config(config: str | None, folder: Path) -> tuple[dict[str, Any], str]:
    path = Path(config) if config else folder / CONFIG_FILE
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        if config:
            raise BadConfigFile(path=path, reason="no such file.") from None
        return {}, ""
    except (OSError, ValueError) as error:
        raise BadConfigFile(path=path, reason=f"{error}.") from error
    import tomllib  # noqa: PLC0415 - for those who have such a file

    try:
        table = tomllib.loads(text)
    except ValueError as error:
        raise BadConfigFile(path=path, reason=f"{error}.") from error
    values = {key.replace("-", "_"): value for key, value in table.items()}
    known = {name for name, f in fields().items() if f.metadata["group"] != "hidden"} - {"config"}
    if unknown := sorted(set(values) - known):
        names = ", ".join(sorted(n.replace("_", "-") for n in known))
        raise BadConfigFile(path=path, reason=f"unknown keys: {', '.join(unknown)}. Known ones: {names}.")
    return values, path.name


def _checked(name: str, field: dataclasses.Field[Any], raw: Any, origin: str) -> Any:
    kind = value_type(name)
    facts = field.metadata
    if name == "handlers":
        if not isinstance(raw, dict) or not all(isinstance(v, str) for v in raw.values()):
            raise BadSetting(name="[handlers]", value=raw, origin=origin, expected='lines like email = "app.mail:send"')
        return dict(raw)
    shown = "…" if facts["secret"] else raw
    if kind is int and raw and raw == facts["shown"]:  # --batch-size auto
        return field.default
    try:
        value = _parse(kind, raw)
        if facts["check"]:
            facts["check"](value)
    except (ValueError, TypeError, OverflowError):  # TOML has dates, and whole numbers beyond every float
        expected = facts["expected"] or {int: "a whole number", float: "a number", bool: "true or false"}.get(
            kind, "text"
        )
        raise BadSetting(name=option_name(name), value=shown, origin=origin, expected=expected) from None
    low, high = facts["low"], facts["high"]
    if low is not None and not (low <= value <= (high if high is not None else math.inf)):
        bounds = f"{low:g} or more" if high is None else f"{low:g} to {high:.9g}"
        raise BadSetting(name=option_name(name), value=raw, origin=origin, expected=bounds)
    if facts["choices"] and value not in facts["choices"]:
        raise BadSetting(
            name=option_name(name), value=raw, origin=origin, expected=" or ".join(map(repr, facts["choices"]))
        )
    return value


def _parse(kind: type, raw: Any) -> Any:
    if kind is bool:
        words = {
            "1": True,
            "true": True,
            "yes": True,
            "on": True,
            "0": False,
            "false": False,
            "no": False,
            "off": False,
        }
        if isinstance(raw, bool):
            return raw
        if str(raw).lower() not in words:
            raise ValueError(raw)
        return words[str(raw).lower()]
    if isinstance(raw, bool | list | dict):
        raise ValueError(raw)
    if kind is int and isinstance(raw, float):
        raise ValueError(raw)
    return kind(raw)


def _spread_states(values: dict[str, Any], origins: dict[str, str]) -> None:
    """--states ready=new,… sets the single words that weren't set by themselves, in the same place or a nearer one."""
    text = values.get("states")
    if not text:
        return
    farther = {"option": ("environment", "file"), "environment": ("file",)}.get(origins["states"].split()[0], ())
    known = ("ready", "queued", "started", "done", "failed", "cancelled", "retrying")
    for part in text.split(","):
        state, _, word = part.partition("=")
        if state.strip() not in known or not word.strip():
            raise BadSetting(
                name="--states",
                value=text,
                origin=origins["states"],
                expected=f"state=word pairs by commas, the states being {', '.join(known)}",
            )
        name = f"{state.strip()}_val"
        if name not in origins or origins[name].startswith(farther):
            values[name] = word.strip()
            origins[name] = origins["states"]


def usable_cores() -> int:
    """How many cores this process may use, by CPU affinity and cgroup quota, at least 1."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    for path, split in (("/sys/fs/cgroup/cpu.max", True), ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", False)):
        try:
            text = Path(path).read_text("ascii").split()
            quota = text[0]
            period = text[1] if split else Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us").read_text("ascii")
            if quota not in ("max", "-1"):
                cores = min(cores, int(quota) / int(period))
        except (OSError, ValueError, IndexError):
            continue
    return max(1, math.ceil(cores))
