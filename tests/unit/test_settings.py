"""Where each setting comes from, what it may be, and what is never shown."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from nih_sched import broker
from nih_sched.dialects import connect
from nih_sched.errors import BadConfigFile, BadSetting, NihError
from nih_sched.settings import Settings, env_names, fields, kept_seconds, load, option_name, usable_cores, value_type

hypothesis_settings.register_profile(
    "patient", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
hypothesis_settings.load_profile("patient")

SECRETS = [name for name, field in fields().items() if field.metadata["secret"]]
NUMBERS = [name for name in fields() if value_type(name) in (int, float)]
BOOLEANS = [name for name in fields() if value_type(name) is bool]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(folder: Path, text: str, name: str = "nih-sched.toml") -> Path:
    path = folder / name
    path.write_text(text, "utf-8")
    return path


def test_defaults_are_those_of_the_issue() -> None:
    found = load({}, {})
    assert (found.status_key, found.ready_val, found.tries, found.delay, found.backoff) == (
        "state",
        "Pending",
        3,
        2.0,
        2.0,
    )
    assert found.max_concurrent_jobs == usable_cores() >= 1
    assert (found.database_url, found.redis_url, found.table) == ("sqlite:///jobs.db", None, "jobs")
    assert (found.timeout, found.grace) == (3600.0, 25.0)
    assert all(found.origin(name) == "default" for name in fields())
    first = [name for name, field in fields().items() if field.metadata["group"] == "first"]
    assert first == ["max_concurrent_jobs", "status_key", "ready_val", "tries", "delay", "backoff"]


def test_an_option_beats_the_environment_beats_the_file_beats_the_default(folder: Path) -> None:
    config(folder, 'status-key = "from file"\nready_val = "from file"\ntable = "from file"\n')
    environ = {"NIH_SCHED_READY_VAL": "from env", "NIH_SCHED_TABLE": "from env"}
    found = load({"table": "typed", "where": None}, environ)
    assert (found.table, found.origin("table")) == ("typed", "option")
    assert (found.ready_val, found.origin("ready_val")) == ("from env", "environment NIH_SCHED_READY_VAL")
    assert (found.status_key, found.origin("status_key")) == ("from file", "file nih-sched.toml")
    assert (found.where, found.origin("where")) == (None, "default")


SAMPLES: dict[str, Any] = {
    "database_url": "sqlite:///x.db",
    "redis_url": "redis://h",
    "log_format": "json",
    "states": "done=ok",
    "keep_history": "done=0,others=90d",
    "config": None,
}


@pytest.mark.parametrize("name", [name for name in fields() if name not in ("handlers", "config")])
def test_each_setting_is_read_from_each_place(name: str, folder: Path) -> None:
    kind = value_type(name)
    typed = SAMPLES.get(name) or {int: "7", float: "2.5", bool: "true"}.get(kind, "word")
    value = {int: 7, float: 2.5, bool: True}.get(kind, typed)
    if kind is bool:
        assert getattr(load({name: True}, {}), name) is True
    else:
        assert getattr(load({name: typed}, {}), name) == value
    for variable in env_names(name):
        found = load({}, {variable: typed})
        assert getattr(found, name) == value
        assert type(getattr(found, name)) is kind
        assert found.origin(name) == f"environment {variable}"
    if fields()[name].metadata["group"] == "hidden":
        return
    written = f'"{value}"' if kind is str else str(value).lower()
    path = config(folder, f"{name.replace('_', '-')} = {written}\n", "other.toml")
    found = load({"config": str(path)}, {})
    assert (getattr(found, name), found.origin(name)) == (value, "file other.toml")


def test_our_own_variable_beats_the_hosts(folder: Path) -> None:
    environ = {
        "WEB_CONCURRENCY": "2",
        "DATABASE_URL": "postgres://u:p@h/d",
        "REDIS_URL": "rediss://:p@h:1",
        "PORT": "8000",
        "DYNO": "web.1",
    }
    found = load({}, environ)
    assert found.max_concurrent_jobs == 2
    assert found.origin("max_concurrent_jobs") == "environment WEB_CONCURRENCY"
    assert found.database_url == "postgres://u:p@h/d"
    assert found.redis_url == "rediss://:p@h:1"
    assert found.dashboard_port == 8000
    assert found.dyno == "web.1"
    found = load(
        {},
        {
            **environ,
            "NIH_SCHED_MAX_CONCURRENT_JOBS": "3",
            "NIH_SCHED_DATABASE_URL": "sqlite:///y",
            "NIH_SCHED_REDIS_URL": "",
        },
    )
    assert (found.max_concurrent_jobs, found.database_url) == (3, "sqlite:///y")
    assert found.redis_url == "rediss://:p@h:1"  # set to nothing is not set


def test_the_environment_is_only_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIH_SCHED_TABLE", "elsewhere")
    monkeypatch.setenv("DATABASE_URL", "sqlite:///elsewhere")
    assert load({}, {}).table == "jobs"
    assert load({}, {}).database_url == "sqlite:///jobs.db"
    assert load({}, os.environ).table == "elsewhere"


# The config file


def test_a_named_file_must_exist_and_the_usual_one_need_not(folder: Path) -> None:
    assert load({}, {}, folder=folder / "nowhere").table == "jobs"
    with pytest.raises(BadConfigFile, match=r"missing\.toml: no such file\."):
        load({"config": "missing.toml"}, {})
    with pytest.raises(BadConfigFile, match="no such file"):
        load({}, {"NIH_SCHED_CONFIG": "missing.toml"})
    with pytest.raises(BadConfigFile, match="directory"):
        load({"config": str(folder)}, {})


def test_the_file_is_looked_for_in_the_given_folder(folder: Path) -> None:
    (folder / "sub").mkdir()
    config(folder / "sub", 'table = "there"')
    assert load({}, {}).table == "jobs"
    assert load({}, {}, folder=folder / "sub").table == "there"
    named = config(folder, 'table = "named"', "n.toml")
    assert load({}, {"NIH_SCHED_CONFIG": str(named)}, folder=folder / "sub").table == "named"


@pytest.mark.parametrize("name", ["tabel", "config", "dyno", "origins", "Table", "max_rows_"])
def test_unknown_keys_are_all_named_with_the_known_ones(folder: Path, name: str) -> None:
    config(folder, f'zzz = 1\ntable = "ok"\n{name} = "x"\n')
    with pytest.raises(BadConfigFile) as caught:
        load({}, {})
    text = str(caught.value)
    assert f"nih-sched.toml: unknown keys: {', '.join(sorted([name, 'zzz']))}. Known ones: " in text
    assert "max-rows" in text
    assert "dyno," not in text.partition("Known")[2]
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("content", [b"table = ", b'table = "\xff"', b"\0", b"table = 'a'\ntable = 'b'"])
def test_a_file_that_is_no_toml_is_refused_in_one_line(folder: Path, content: bytes) -> None:
    (folder / "nih-sched.toml").write_bytes(content)
    with pytest.raises(BadConfigFile) as caught:
        load({}, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["1979-05-27", "1979-05-27T07:32:00Z", "07:32:00", "[1]", "{a = 1}", "true"])
@pytest.mark.parametrize("name", ["tries", "delay", "max-rows"])
def test_a_value_of_a_wrong_kind_is_refused(folder: Path, name: str, value: str) -> None:
    config(folder, f"{name} = {value}\n")
    with pytest.raises(BadSetting, match=f"--{name} is .* \\(file nih-sched.toml\\), expected a (whole )?number"):
        load({}, {})


@pytest.mark.parametrize("value", ["true", "[1]", "{a = 1}"])
def test_a_text_is_a_text(folder: Path, value: str) -> None:
    config(folder, f"table = {value}\n")
    with pytest.raises(BadSetting, match="expected text"):
        load({}, {})


def test_numbers_may_be_state_words(folder: Path) -> None:
    config(folder, "ready-val = 0\ndone-val = 2\n")
    found = load({}, {})
    assert (found.ready_val, found.done_val) == ("0", "2")


def test_handlers_are_a_table_of_the_file_alone(folder: Path) -> None:
    config(folder, 'job-column = "kind"\n[handlers]\nemail = "app.mail:send"\n"odd kind" = "app:odd"\n')
    found = load({}, {"NIH_SCHED_HANDLERS": "email=os:system"})
    assert found.handlers == {"email": "app.mail:send", "odd kind": "app:odd"}
    assert found.origin("handlers") == "file nih-sched.toml"
    assert load({}, {"NIH_SCHED_HANDLERS": "email=os:system"}, folder=folder / "none").handlers is None


@pytest.mark.parametrize("text", ['handlers = "a:b"', "[handlers]\nemail = 1", '[handlers]\nemail = ["a:b"]'])
def test_handlers_that_are_no_lines_of_texts_are_refused(folder: Path, text: str) -> None:
    config(folder, text)
    with pytest.raises(BadSetting, match=r'expected lines like email = "app\.mail:send"'):
        load({}, {})


# Ranges


ABSURD = ["nan", "inf", "-inf", "-1", "-0.001", "1e400", "9" * 400, "1e9999999", "", "x", "0x1"]
UNBOUNDED = {("max_rows", "9" * 400)}


@pytest.mark.parametrize(("name", "raw"), sorted({(n, raw) for n in NUMBERS for raw in ABSURD} - UNBOUNDED))
def test_absurd_numbers_are_refused(name: str, raw: str) -> None:
    with pytest.raises(BadSetting) as caught:
        load({name: raw}, {})
    text = str(caught.value)
    assert text.startswith(f"{option_name(name)} is {raw!r} (option), expected ")
    assert "\n" not in text


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("max_concurrent_jobs", ["0", "1025", "1.5"], ["1", "1024"]),
        ("tries", ["-1", "1001", "2.0"], ["0", "1000"]),
        ("delay", ["31536001"], ["0", "0.5", "31536000"]),
        ("backoff", ["0", "1001"], ["0.001", "1", "1000"]),
        ("max_delay", ["31536001"], ["0"]),
        ("jitter", ["10.5"], ["0", "10"]),
        ("timeout", ["0", "31536001"], ["0.001", "31536000"]),
        ("grace", ["86401"], ["0"]),
        ("poll_interval", ["0", "3601"], ["0.01"]),
        ("max_rows", ["0", "1.0"], ["1", "1000000000000"]),
        ("dashboard_port", ["0", "65536"], ["1", "65535"]),
    ],
)
def test_bounds_are_where_they_are_said_to_be(name: str, bad: list[str], good: list[str]) -> None:
    for raw in good:
        assert getattr(load({name: raw}, {}), name) == float(raw)
    for raw in bad:
        with pytest.raises(BadSetting, match="expected"):
            load({name: raw}, {})


@given(st.sampled_from(NUMBERS), st.floats() | st.integers() | st.text())
def test_a_number_is_in_its_range_or_refused(name: str, raw: object) -> None:
    facts = fields()[name].metadata
    try:
        value = getattr(load({name: raw}, {}), name)
    except BadSetting:
        return
    assert type(value) is value_type(name)
    assert facts["low"] <= value
    assert facts["high"] is None or value <= facts["high"]


@pytest.mark.parametrize("name", BOOLEANS)
def test_booleans_are_words(name: str) -> None:
    variable = env_names(name)[0]
    for word in ("1", "true", "TRUE", "yes", "On"):
        assert getattr(load({}, {variable: word}), name) is True
    for word in ("0", "false", "No", "OFF"):
        assert getattr(load({}, {variable: word}), name) is False
    for word in ("2", "y", "truee", " "):
        with pytest.raises(BadSetting, match="expected true or false"):
            load({}, {variable: word})
    assert load({name: False}, {variable: "true"}).__getattribute__(name) is False


def test_choices() -> None:
    with pytest.raises(BadSetting, match="--log-format is 'xml' \\(option\\), expected 'text' or 'json'"):
        load({"log_format": "xml"}, {})


# --states


def test_states_spread_over_the_single_words() -> None:
    found = load({"states": "ready=new, started = processing,done=it's ok,failed=a=b,retrying=again"}, {})
    assert (found.ready_val, found.started_val, found.done_val) == ("new", "processing", "it's ok")
    assert (found.failed_val, found.retrying_val) == ("a=b", "again")
    assert (found.queued_val, found.cancelled_val) == (None, None)
    assert found.origin("done_val") == "option"


def test_a_single_word_beats_states() -> None:
    found = load({"states": "ready=new,done=ok", "done_val": "Finished"}, {})
    assert (found.ready_val, found.done_val) == ("new", "Finished")
    found = load({"done_val": "Finished"}, {"NIH_SCHED_STATES": "ready=new,done=ok"})
    assert (found.ready_val, found.done_val) == ("new", "Finished")
    assert found.origin("ready_val") == "environment NIH_SCHED_STATES"


def test_but_what_is_typed_still_beats_what_a_file_says(folder: Path) -> None:
    config(folder, 'done-val = "from file"\nfailed-val = "from file"\nready-val = "from file"\n')
    found = load({"states": "ready=new,done=ok"}, {"NIH_SCHED_READY_VAL": "from env"})
    assert (found.done_val, found.origin("done_val")) == ("ok", "option")
    assert (found.failed_val, found.origin("failed_val")) == ("from file", "file nih-sched.toml")
    assert found.ready_val == "new"
    config(folder, 'done-val = "single"\nstates = "ready=new,done=ok"\n')
    assert load({}, {}).done_val == "single"
    assert load({}, {"NIH_SCHED_STATES": "done=env"}).done_val == "env"


@pytest.mark.parametrize("text", ["done", "done=", "=ok", "finished=ok", "done=ok,", "Done=ok", "done=ok;failed=no,x"])
def test_states_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(BadSetting, match="expected state=word pairs by commas, the states being ready, queued"):
        load({"states": text}, {})


# Secrets


def test_the_secret_settings_are_known() -> None:
    assert SECRETS == ["database_url", "redis_url", "dashboard_password", "dashboard_token"]


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_never_shown(name: str, folder: Path) -> None:
    found = load({name: "scheme://user:hunter2@host"}, {})
    assert getattr(found, name) == "scheme://user:hunter2@host"
    assert "hunter2" not in repr(found)
    assert "hunter2" not in str(found)
    assert "hunter2" not in f"{fields()[name]}"
    config(folder, f'{name} = ["hunter2"]\n')
    with pytest.raises(BadSetting) as caught:
        load({}, {})
    assert "hunter2" not in str(caught.value)
    assert option_name(name) in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ['database-url = "x:hunter2@', 'database-url = "a:hunter2"\ndatabase-url = "b:hunter2"', "redis-url = hunter2"],
)
def test_a_broken_files_content_is_not_shown(folder: Path, text: str) -> None:
    config(folder, text)
    with pytest.raises(BadConfigFile) as caught:
        load({}, {})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:hunter2@127.0.0.1:1/db?password=hunter2",
        "mysql://user:hunter2@127.0.0.1:1/db?ssl_key_password=hunter2",
        "postgresql://user:hunter2@127.0.0.1:hunter2/db",
        "oracle://user:hunter2@127.0.0.1/db",
        "sqlite+no_such_driver://user:hunter2@/db",
        "user:hunter2@127.0.0.1",
    ],
)
def test_a_database_that_cannot_be_used_is_told_without_its_password(url: str) -> None:
    with pytest.raises(NihError) as caught:
        connect(url)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://user:hunter2@127.0.0.1:1/0?password=hunter2",
        "rediss://:hunter2@127.0.0.1:1",
        "http://:hunter2@h",
        "redis://:hunter2@h:port",
    ],
)
def test_a_redis_that_cannot_be_used_is_told_without_its_password(url: str) -> None:
    with pytest.raises(NihError) as caught:
        broker.connect(url)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_are_frozen() -> None:
    with pytest.raises(AttributeError):
        load({}, {}).tries = 4  # type: ignore[misc]
    with pytest.raises(TypeError):
        Settings(5)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("done=0,others=90d", (0.0, 90 * 86400.0)),
        ("others=12h", (86400.0, 43200.0)),
        ("done=1.5h, others=2w", (5400.0, 14 * 86400.0)),
    ],
)
def test_times_for_which_history_is_kept(text: str, seconds: tuple[float, float]) -> None:
    assert kept_seconds(text) == seconds


@pytest.mark.parametrize("text", ["30d", "failed=1d", "done=", "done=soon", "done=-1d", "done=1y", "done=9999999999d"])
def test_times_that_are_none_are_refused_with_an_example(text: str, folder: Path) -> None:
    with pytest.raises(BadSetting, match=r"--keep-history is .* expected times such as done=1d,others=30d\."):
        load({"keep_history": text}, {}, folder=folder)
