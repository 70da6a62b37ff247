"""The ground that all other tests stand on."""

from __future__ import annotations

import os
import sys

import redis
import sqlalchemy
from servers import Database, eventually, spawn


def test_a_fresh_database_answers_and_is_empty(database: Database) -> None:
    engine = sqlalchemy.create_engine(database.url)
    with engine.begin() as connection:
        assert connection.scalar(sqlalchemy.text("select 1")) == 1
        assert sqlalchemy.inspect(connection).get_table_names() == []
        connection.execute(sqlalchemy.text("create table leftover (word varchar(20))"))
        connection.execute(sqlalchemy.text("insert into leftover values ('Grüße 🎈')"))
        assert connection.scalar(sqlalchemy.text("select word from leftover")) == "Grüße 🎈"


def test_redis_answers_and_is_empty(redis_client: redis.Redis) -> None:
    assert redis_client.ping()
    assert redis_client.dbsize() == 0


FAMILY = """
import os, time
if os.fork():
    time.sleep(60)
os.setsid()
if os.fork():
    os._exit(0)
print("orphan", flush=True)
time.sleep(60)
"""


def test_no_spawned_process_survives_its_test() -> None:
    assert "DATABASE_URL" not in os.environ
    with spawn([sys.executable, "-c", FAMILY]) as family:
        eventually(lambda: "orphan" in family.output)
        relatives = eventually(lambda: len(found := family.processes()) == 2 and found)
    assert not any(relative.is_running() and relative.status() != "zombie" for relative in relatives)
