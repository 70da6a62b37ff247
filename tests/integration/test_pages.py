"""Our pages: what they show, who may change what by them, and that no row's text becomes markup."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from html import unescape
from html.parser import HTMLParser
from typing import Any
from urllib.parse import quote, urljoin

import flask
import pytest
import redis
from conftest import METHODS, RQ_PARTS, Work, address
from rq.serializers import JSONSerializer
from servers import eventually, scheduler, spawn_scheduler
from werkzeug.test import Client, TestResponse

from nih_sched import clock, pages, web
from nih_sched.ledger import Ledger
from nih_sched.model import open_key
from nih_sched.pages.blueprint import GROUP_SECONDS
from nih_sched.settings import load
from nih_sched.store import Desk, open_desk
from nih_sched.store.history import History
from nih_sched.store.steering import Steering

PASSWORD, TOKEN = "a påssword", "a-token"
EVILS = (
    "<script>document.title='XSS'</script>",
    "\"><img src=x onerror=document.title='XSS'>",
    "' onmouseover='x",
    "{{7*7}}{% raw %}${7*7}<%= 7*7 %>",
    "javascript:document.title='XSS'",
    "long" * 300,
    "\u202e\x1b[31mred",
)
SAMPLES = {**RQ_PARTS, "filename": "pages.js", "key": "1"}
HANDLER = """
def evil(id, state, kind):
    print(kind)
    raise ValueError(kind)

def fine(id):
    pass
"""


ORIGINS = (
    *("http://evil.example", "null", None, "", "http://localhost.evil.example", "http://[", "http://", "localhost"),
    *("http://localhost, http://localhost", "http://localhost,null", "http://localhost/", "http://x@localhost"),
)


class Site:
    """The app on a source's desk."""

    token: Callable[[], str]  # what its forms carry

    def __init__(self, work: Work, redis_url: str, *, read_only: bool = False) -> None:
        self.work = work
        settings = load({}, work.env)
        self.desk: Desk = open_desk(settings)
        self.redis_url = redis_url

        def make(token: Any, who: Any, client: redis.Redis) -> flask.Blueprint:
            self.token = token
            place = pages.Place(self.desk, settings, lambda: self.redis_url, lambda: client, read_only, token, who)
            return pages.make_blueprint(place)

        access = web.Access(PASSWORD, TOKEN, read_only)
        self.app = web.make_app(redis_url, access, serializer=JSONSerializer, pages=make)

    @property
    def client(self) -> Client:
        return self.app.test_client()

    def get(self, path: str) -> TestResponse:
        return self.client.get(path, headers=login())

    def post(self, path: str, origin: str | None = "http://localhost", token: str | None = None, **form: str) -> int:
        headers = login() | ({} if origin is None else {"Origin": origin})
        form["token"] = token if token is not None else self.token()
        return self.client.post(path, headers=headers, data=form).status_code

    def dump(self) -> Any:
        ledger: Ledger = self.desk.ledger
        names = [table.name for table in ledger.metadata.sorted_tables]
        return [self.work.sql(f"SELECT * FROM {name}") for name in ("work", *names)]


def login(password: str = PASSWORD) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"ada:{password}".encode()).decode()}


@pytest.fixture
def work_here(lite: Work) -> Work:
    lite.sql("DROP TABLE work")
    lite.sql("CREATE TABLE work (id INTEGER NOT NULL PRIMARY KEY, state VARCHAR(20) NOT NULL, kind VARCHAR(2000))")
    (lite.folder / "evil.py").write_text(HANDLER)
    return lite


@pytest.fixture
def site(work_here: Work, redis_url: str) -> Iterator[Site]:
    made = Site(work_here, redis_url)
    yield made
    made.desk.close()


@pytest.fixture
def bad(site: Site) -> Site:
    """Every row failed with a text that would like to be markup."""
    for number, evil in enumerate(EVILS, 1):
        site.work.sql("INSERT INTO work VALUES (:id, 'Pending', :kind)", id=number, kind=evil)
    site.work.sql("INSERT INTO work VALUES (99, :word, 'a word of nobody''s')", word="<b>Odd</b>")
    line = ("--job", "evil:evil", "--burst", "--tries", "0", "--quiet")
    assert scheduler(*line, env=site.work.env, cwd=site.work.folder).returncode == 1
    return site


class Strict(HTMLParser):
    """Collects what could execute."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.forms = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "script" and given.get("src") != "/own/pages.js":
            self.found.append(f"script {given}")
        self.found += [f"{tag} {name}" for name in given if name.startswith("on") or name == "style"]
        self.found += [f"{tag} {name}" for name in ("href", "src") if (given.get(name) or "").startswith("javascript")]
        if tag in ("img", "iframe", "object", "embed", "b", "base"):
            self.found.append(tag)


def ours(site: Site) -> list[str]:
    """Every page of ours that looks, from the URL map, so that a new one can't be forgotten."""
    rules = [rule for rule in site.app.url_map.iter_rules() if rule.endpoint.startswith("pages.")]
    keys = [str(number) for number in range(1, len(EVILS) + 1)] + ["99"]
    paths = []
    for rule in rules:
        if "GET" in (rule.methods or ()) and "filename" not in rule.rule:
            paths += [rule.rule.replace("<path:key>", key) for key in keys] if "<" in rule.rule else [rule.rule]
    return paths


def everywhere(site: Site) -> list[str]:
    """Every address there is, ours and rq-dashboard's, from the URL map."""
    rules = [rule.rule for rule in site.app.url_map.iter_rules()]
    assert len(rules) > 25
    return [*(address(rule, SAMPLES) for rule in rules), "/nope", "/rq/nope"]


def changes(site: Site) -> list[str]:
    rules = site.app.url_map.iter_rules()
    found = [rule.rule for rule in rules if rule.endpoint.startswith("pages.") and "POST" in (rule.methods or ())]
    assert len(found) == 5
    return found


def test_nothing_of_a_row_becomes_markup(bad: Site) -> None:
    paths = ours(bad)
    assert len(paths) == 6 + len(EVILS) + 1
    for evil in EVILS:
        for name in ("state", "text", "error", "after", "done"):
            paths += [f"/rows?{name}={quote(evil, safe='')}", f"/failures?{name}={quote(evil, safe='')}"]
        paths += [f"/rows/{quote(evil, safe='')}", f"/row?key={quote(evil, safe='')}"]
    for path in paths:
        answer = bad.get(path)
        assert answer.status_code in (200, 400, 404), path
        parser = Strict()
        parser.feed(answer.text)
        assert parser.found == [], path
        assert "script-src 'self'" in answer.headers["Content-Security-Policy"]
        assert "unsafe" not in answer.headers["Content-Security-Policy"]
    shown = bad.get("/rows/1").text
    assert "&lt;script&gt;" in shown
    assert "ValueError" in shown
    assert "{{7*7}}" in bad.get("/rows/4").text


def test_a_change_needs_login_origin_and_token(bad: Site) -> None:
    before = bad.dump()
    for path in changes(bad):
        for origin in ORIGINS:
            assert bad.post(path, origin=origin, key="1", error="x") == 403, (path, origin)
        for token in ("", "wrong", "ü"):
            assert bad.post(path, token=token, key="1", error="x") == 403, (path, token)
        odd = (
            {"HTTP_ORIGIN": "http://[", "HTTP_HOST": "["},
            {"HTTP_ORIGIN": "null", "HTTP_HOST": ""},
            {"HTTP_HOST": "é"},
        )
        for environ in odd:
            form = {"key": "1", "token": bad.token()}
            answer = bad.client.post(path, headers=login(), data=form, environ_overrides=environ)
            assert answer.status_code in (400, 403), (path, environ)
        assert bad.client.post(path, headers={"Origin": "http://localhost"}, data={"key": "1"}).status_code == 401
        assert bad.client.get(path, headers=login()).status_code in (403, 404, 405)
    assert bad.dump() == before


def test_looking_changes_nothing(bad: Site, redis_client: redis.Redis) -> None:
    before, keys = bad.dump(), {key: redis_client.dump(key) for key in redis_client.scan_iter()}
    for path in ours(bad):
        bad.get(path)
    assert bad.dump() == before
    assert {key: redis_client.dump(key) for key in redis_client.scan_iter()} == keys


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("Bearer a-token", 200),
        ("Bearer wrong", 401),
        ("Bearer ", 401),
        ("Basic a-token", 401),
        ("Basic " + base64.b64encode(b"ada:a-token").decode(), 401),
        ("Digest x", 401),
    ],
)
def test_who_gets_in_on_every_route(site: Site, header: str | None, status: int) -> None:
    headers = {"Authorization": header} if header else {}
    for path in ("/", "/rows", "/failures", "/own/pages.css", "/rq/", "/nope"):
        answer = site.client.get(path, headers=headers)
        assert answer.status_code == (404 if path == "/nope" and status == 200 else status), path
    for path in () if status == 200 else everywhere(site):
        for method in METHODS:
            answer = site.client.open(path, method=method, headers=headers, data={"token": site.token()})
            is_open = path == "/healthz" and method in ("GET", "HEAD", "OPTIONS")
            assert answer.status_code == (200 if is_open else 401), (method, path)


def test_no_other_site_can_change_anything_anywhere(site: Site, redis_client: redis.Redis) -> None:
    site.work.sql("INSERT INTO work VALUES (1, 'Failed', 'x')")
    before, keys = site.dump(), {key: redis_client.dump(key) for key in redis_client.scan_iter()}
    crossing = [{"Origin": origin} for origin in ORIGINS if origin is not None]
    crossing += [
        {},
        {"Referer": "http://evil.example/"},
        *({"Origin": "http://localhost", "Sec-Fetch-Site": one} for one in ("cross-site", "same-site", "none")),
    ]
    for path in everywhere(site):
        for method in ("POST", "PUT", "PATCH", "DELETE"):
            for headers in crossing if method == "POST" else crossing[:1]:
                form = {"token": site.token(), "key": "1", "error": "not by us", "reason": "x"}
                answer = site.client.open(path, method=method, headers=login() | headers, data=form)
                assert answer.status_code == 403, (method, path, headers)
    assert site.dump() == before
    assert {key: redis_client.dump(key) for key in redis_client.scan_iter()} == keys


def test_read_only_changes_nothing_and_has_no_buttons(work_here: Work, redis_url: str) -> None:
    work_here.sql("INSERT INTO work VALUES (1, 'Failed', 'x')")
    site = Site(work_here, redis_url, read_only=True)
    before = site.dump()
    for path in changes(site):
        headers, form = login() | {"Origin": "http://localhost"}, {"key": "1", "token": site.token()}
        answer = site.client.post(path, headers=headers, data=form)
        assert (answer.status_code, "read-only" in answer.text) == (403, True), path
    assert site.dump() == before
    for path in ("/", "/rows/1", "/failures"):
        assert 'method="post"' not in site.get(path).text
    site.desk.close()


def test_a_row_is_requeued_a_group_too_and_one_that_waits_is_cancelled(bad: Site) -> None:
    assert "Failed for good" in bad.get("/rows/1").text
    assert bad.post("/requeue", key="1") == 303
    assert bad.work.sql("SELECT state FROM work WHERE id = 1") == [("Pending",)]
    assert "Requeued." in bad.get("/rows/1?done=requeued").text
    assert bad.post("/cancel", key="1") == 303
    assert bad.work.sql("SELECT state FROM work WHERE id = 1") == [("Cancelled",)]
    page = bad.get("/failures").text
    group = re.search(r'name="error" value="([^"]+)"', page)
    assert group is not None
    assert "evil.py" in group[1]
    assert bad.post("/requeue-group", error=group[1]) == 303
    assert bad.work.states() == {"Pending": len(EVILS) - 1, "Cancelled": 1, "<b>Odd</b>": 1}


def test_one_that_runs_is_cancelled_only_by_who_confirms(site: Site) -> None:
    site.work.sql("INSERT INTO work VALUES (1, 'Started', 'x')")
    desk, now = site.desk, datetime.now(UTC)
    record = {"source": desk.source.name, "row_key": "[1]", "open_key": open_key(desk.rows.name, (1,)), "attempt": 1}
    record |= {"failures": 0, "tries": 0, "claimed_at": now, "started_at": now, "worker": "w"}
    with desk.engine.begin() as connection:
        connection.execute(desk.ledger.attempts.insert(), record)
    page = site.get("/rows/1").text
    assert "running for" in page
    assert page.count('action="/cancel') == page.count('name="running"') == 1
    assert site.post("/cancel?key=1") == 303
    assert site.work.states() == {"Started": 1}
    assert "it runs by now" in site.get("/rows/1?done=runs").text
    assert site.post("/cancel?key=1", running="1") == 303
    assert site.work.states() == {"Cancelled": 1}


def test_a_huge_group_is_requeued_press_by_press(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    number = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2500)"
    site.work.sql(f"{number} INSERT INTO work SELECT i, 'Failed', 'x' FROM n")
    real, now, ahead = Steering.requeue, clock.monotonic, 0.0

    def slowly(self: Steering, keys: Any) -> Any:
        nonlocal ahead
        ahead += GROUP_SECONDS  # each chunk takes all of the time; a slow machine has as much for finding its rows
        return real(self, keys)

    monkeypatch.setattr(clock, "monotonic", lambda: now() + ahead)
    monkeypatch.setattr(Steering, "requeue", slowly)
    for ready, said in (
        (1000, "1,500 of the group are left"),
        (2000, "500 of the group are left"),
        (2500, "500 rows."),
    ):
        assert site.post("/requeue-group", error="not by us") == 303
        assert site.work.states() == {"Pending": ready} | ({"Failed": 2500 - ready} if ready < 2500 else {})
        assert said in site.get("/failures?done=group&count=500&error=not+by+us").text


def test_failures_are_looked_for_further_only_when_asked(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.work.sql("INSERT INTO work VALUES (1, 'Failed', 'x')")
    assert "Look further" not in site.get("/failures").text
    monkeypatch.setattr("nih_sched.pages.blueprint.QUICK", 0.0)
    page = site.get("/failures").text
    assert "None found so far." in page
    (further,) = re.findall(r'<a href="([^"]*)">Look further</a>', page)
    page = site.get(unescape(further)).text
    assert "1 failed rows" in page
    assert "Look further" not in page


def test_what_a_page_says_is_ours(site: Site) -> None:
    site.work.sql("INSERT INTO work VALUES (1, 'Failed', 'x')")
    for path in ("/rows/1", "/row?key=1", "/failures", "/"):
        for done in ("Call 555", "", "group", "Requeued.", "requeued'", "unchanged%00"):
            for count in ("", "-1", "1e3", "9" * 40, "²", "Call 555"):
                text = site.get(
                    f"{path}{'&' if '?' in path else '?'}done={done}&count={quote(count)}&error=Call+555"
                ).text
                assert "555" not in text.partition("<main")[2].partition("data-url")[0]
                assert 'role="status"' not in text
    assert "Requeued 7 rows." in site.get("/failures?done=group&count=7").text


def test_a_pause_by_a_button_holds_a_scheduler(site: Site) -> None:
    line = ("--job", "evil:fine", "--max-concurrent-jobs", "1")
    with spawn_scheduler(*line, env=site.work.env, cwd=site.work.folder):
        site.work.sql("INSERT INTO work VALUES (1, 'Pending', 'x')")
        eventually(lambda: site.work.states() == {"Done": 1})
        assert site.post("/pause", reason="<i>a move</i>") == 303
        page = site.get("/").text
        assert "Paused: no row starts. By ada from 127.0.0.1 by the dashboard: &lt;i&gt;a move&lt;/i&gt;" in page
        assert "idle" in page
        site.work.sql("INSERT INTO work VALUES (2, 'Pending', 'x')")
        assert site.post("/resume") == 303
        eventually(lambda: site.work.states() == {"Done": 2})


def test_rows_are_found_page_by_page(site: Site) -> None:
    for number in range(1, 121):
        site.work.sql("INSERT INTO work VALUES (:id, 'Done', :kind)", id=number, kind=f"kind {number % 2}")
    seen: list[int] = []
    path: str | None = "/rows?order=oldest&text=kind+1"
    while path:
        page = site.get(path).text
        seen += map(int, re.findall(r'href="/rows/(\d+)"', page))
        further = re.search(r'<a href="([^"]+)" rel="next"', page)
        path = further[1].replace("&amp;", "&") if further else None
    assert seen == list(range(1, 121, 2))


def test_a_list_that_was_stopped_is_looked_for_further(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(1, 10):
        site.work.sql("INSERT INTO work VALUES (:id, 'Done', 'x')", id=number)
    now, real = [0.0], History.last_errors

    def slowly(self: History, keys: Any) -> Any:
        now[0] += 1.5
        return real(self, keys)

    monkeypatch.setattr(History, "last_errors", slowly)
    monkeypatch.setattr("nih_sched.store.listing.PAGE", 2)
    monkeypatch.setattr("nih_sched.store.listing.clock.monotonic", lambda: now[0])
    page = site.get("/rows?text=nothing").text
    assert "None found so far." in page
    assert "Looked for 2 s, as far as key 6." in page
    (further,) = re.findall(r'<a href="([^"]+)" rel="next">Look further</a>', page)
    page = site.get(unescape(further)).text
    assert "as far as key 2." in page
    (further,) = re.findall(r'<a href="([^"]+)" rel="next">Look further</a>', page)
    assert "No rows." in site.get(unescape(further)).text


def test_a_key_that_no_column_holds_is_of_no_row(site: Site) -> None:
    for number in ("9" * 19, "9" * 40, "-" + "9" * 40, "9" * 4000):
        for path in (f"/rows/{number}", f"/row?key={number}", f"/rows?after={number}"):
            answer = site.get(path)
            assert (answer.status_code, "has no row with the key" in answer.text) == (404, True), path
        for path in ("/requeue", "/cancel"):
            assert site.post(path, key=number) == 404
    for key in ("9" * 5000, "x", "%00", "%ED%A0%80", "%FF", "a/b", "..", "%2e%2e", "%0A", "x" * 100_000, ""):
        for path in (f"/rows/{key}", f"/row?key={key}", f"/rows?after={key}", f"/rows?state={key}"):
            assert site.get(path).status_code < 500, path[:50]
    assert site.get("/row").status_code == 400
    env, cwd = site.work.env, site.work.folder
    for command in (["why", "9" * 40], ["show", "--", "-" + "9" * 40]):
        run = scheduler(*command, env=env, cwd=cwd)
        assert (run.returncode, "has no row with the key" in run.stderr) == (2, True), run.stderr


def test_every_text_can_be_a_key(lite: Work, redis_url: str) -> None:
    odd = ["", " ", ".", "..", "/", "//", "/x", "x/", "a//b", "a/../b", "a/./b", "%", "%2F", "%00", "?", "#", "?a=b#c"]
    odd += [
        "a\nb",
        "\n",
        "\r\n",
        "\t",
        "a\0b",
        "\\",
        "..\\x",
        "ä€😀",
        "\u202e",
        "a,b",
        "javascript:x",
        "<b>",
        "'\"&",
        "+",
    ]
    odd += ["x" * 10_000, "row", "own/pages.css", "\ufeff", "\u2028"]
    lite.sql("DROP TABLE work")
    lite.sql("CREATE TABLE work (id VARCHAR(20000) PRIMARY KEY, state VARCHAR(20))")
    for key in odd:
        lite.sql("INSERT INTO work VALUES (:id, 'Failed')", id=key)
    site = Site(lite, redis_url)
    links = [unescape(one) for one in re.findall(r'<td><a href="(/row[^"]+)"', site.get("/rows").text)]
    assert len(links) == len(set(links)) == len(odd)
    for link in links:
        seen = urljoin("http://localhost/rows", link).removeprefix("http://localhost")  # as a browser takes it
        page = site.get(seen)
        assert page.status_code == 200, link
        action = re.search(r'action="(/requeue[^"]*)"', page.text)
        assert action is not None
        assert site.post(unescape(action[1])) == 303
    assert lite.states() == {"Pending": len(odd)}
    assert len(re.findall(r'href="/row', site.get("/failures").text)) == 1  # the heading's: none is left
    lite.sql("INSERT INTO work VALUES (CAST(X'FF' AS TEXT), 'Failed')")  # SQLite takes it, and can't give it back
    assert [site.get(path).status_code for path in ("/rows", "/failures", "/rows/%FF")] == [200, 200, 404]
    assert '<td><a href="/rows/%EF%BF%BD">\ufffd</a></td>' in site.get("/rows").text
    site.desk.close()


def test_a_text_that_is_none_is_shown_and_fails_its_row_in_order(lite: Work, redis_url: str) -> None:
    lite.insert(1, 2, 3)
    lite.sql("UPDATE work SET kind = CAST(X'6162FF63' AS TEXT) WHERE id < 3")
    lite.sql("UPDATE work SET state = CAST(X'FF' AS TEXT) WHERE id = 1")  # SQLite takes any bytes for a text
    (lite.folder / "evil.py").write_text("def kind_of(id, kind):\n    pass\n")
    line = ("--job", "evil:kind_of", "--burst", "--delay", "0", "--quiet")
    assert scheduler(*line, env=lite.env, cwd=lite.folder).returncode == 1
    why = "a column's value can't be read: Could not decode to UTF-8 column 'kind' with text 'ab\ufffdc'"
    assert [(one.outcome, one.reason) for one in lite.attempts(2)] == [("failed", why)]
    assert lite.sql("SELECT state FROM work WHERE id > 1 ORDER BY id") == [("Failed",), ("Done",)]
    for command, said in (
        (("list",), "\ufffd"),
        (("list", "--csv"), "ab\ufffdc"),
        (("list", "--text", "ab", "--json"), "ab\ufffdc"),
        (("list", "--where", "error IS NOT NULL", "--csv"), "ab\ufffdc"),
        (("show", "2"), "ab\ufffdc"),
        (("why", "1"), "its state is '\ufffd'"),
        (("why", "2"), "Failed for good"),
        (("status",), "\ufffd"),
        (("doctor",), "'\ufffd' (1)"),
    ):
        run = scheduler(*command, env={**lite.env, "PYTHONIOENCODING": "utf-8"}, cwd=lite.folder)
        assert (run.returncode, said in run.stdout) == (0, True), (command, run.stdout, run.stderr)
    site = Site(lite, redis_url)
    for path, said in (
        ("/", "<small>\ufffd</small>"),
        ("/rows", "\ufffd"),
        ("/rows?text=b%EF%BF%BDc&state=failed", 'href="/rows/2"'),
        ("/rows/2", "ab\ufffdc"),
        ("/failures", "<h2>a column&#39;s value can&#39;t be read</h2>"),
        ("/metrics", 'state="other"'),
    ):
        page = site.get(path)
        assert (page.status_code, said in page.text) == (200, True), (path, page.text)
    assert site.post("/requeue-group", error="a column's value can't be read") == 303
    assert site.post("/cancel?key=1") == 303
    assert dict(lite.sql("SELECT id, hex(state) FROM work WHERE id = 1")) == {1: "FF"}  # a word of nobody's
    assert lite.sql("SELECT state FROM work WHERE id > 1 ORDER BY id") == [("Pending",), ("Done",)]
    site.desk.close()


def test_a_row_whose_key_cannot_be_read_is_left_alone_and_the_others_go_on(lite: Work, redis_url: str) -> None:
    lite.sql("DROP TABLE work")
    lite.sql("CREATE TABLE work (id VARCHAR(50) PRIMARY KEY, state VARCHAR(20))")
    for key in ("X'61'", "X'61FF'", "X'62'", "X'FF'"):  # SQLite takes any bytes for a text
        lite.sql(f"INSERT INTO work VALUES (CAST({key} AS TEXT), 'Pending')")
    (lite.folder / "fine.py").write_text("def ship(id):\n    pass\n")
    run = scheduler("--job", "fine:ship", "--burst", "--quiet", env=lite.env, cwd=lite.folder)
    assert run.returncode == 0, run.stderr
    assert lite.states() == {"Done": 2, "Pending": 2}
    for rowid in (2, 4):
        said = f"row with rowid {rowid} of main.work is left alone: its key is no text in its encoding"
        assert run.stderr.count(said) == 1, run.stderr

    lite.sql("UPDATE work SET state = 'Failed'")
    site = Site(lite, redis_url)
    same, form = login() | {"Origin": "http://localhost"}, {"token": site.token(), "error": "not by us"}
    answer = site.client.post("/requeue-group", data=form, headers=same)
    assert answer.status_code == 303, answer.text
    page = site.get(answer.headers["Location"])
    assert "Requeued 2 rows. Left out 2 whose keys can&#39;t be read: rowid 2, 4.</p>" in page.text
    assert lite.states() == {"Pending": 2, "Failed": 2}
    site.desk.close()

    # Those at the end of what is read together are passed over too.
    lite.sql("DELETE FROM work")
    numbers = "WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < 2500) SELECT n FROM s"
    lite.sql(f"INSERT INTO work SELECT printf('k%04d', n), 'Failed' FROM ({numbers})")
    for n in (1, 1000, 1001, 2002, 2500):
        lite.sql(f"UPDATE work SET id = CAST(CAST(id AS BLOB) || X'FF' AS TEXT) WHERE id = 'k{n:04}'")
    run = scheduler("requeue", "--state", "failed", "--yes", env=lite.env, cwd=lite.folder)
    assert run.stdout == "Requeued 2,495 rows.\n"
    assert re.fullmatch(
        r"Left out, for their keys can't be read:( rowid \d+,?){5}\.\n", run.stderr.splitlines(True)[-1]
    )
    assert lite.states() == {"Pending": 2495, "Failed": 5}


def test_odd_keys_have_pages(lite: Work, redis_url: str) -> None:
    lite.sql("DROP TABLE work")
    lite.sql("CREATE TABLE work (a VARCHAR(50), b INTEGER, state VARCHAR(20), PRIMARY KEY (a, b))")
    for key in ("x/y z", "ä?#%2F", "..", "a&b=c"):
        lite.sql("INSERT INTO work VALUES (:a, 1, 'Pending')", a=key)
    site = Site(lite, redis_url)
    links = re.findall(r'href="(/rows/[^"]+)"', site.get("/rows").text)
    assert len(links) == 4
    for link in links:
        assert site.get(link.replace("&amp;", "&")).status_code == 200, link
    site.desk.close()


def test_an_outage_and_a_pause_are_said_first_and_a_tile_leads_to_all_that_it_counts(site: Site) -> None:
    for number, word in enumerate(("Queued", "Queued", "Done"), 1):
        site.work.sql("INSERT INTO work VALUES (:id, :word, 'x')", id=number, word=word)
    page = site.get("/").text
    assert 'href="/rows?state=Queued"' in page  # queued and retrying have one word
    assert "can't be reached" not in page
    assert len(re.findall(r'<td><a href="/rows/\d"', site.get("/rows?state=Queued").text)) == 2
    assert site.post("/pause", reason="why") == 303
    site.redis_url = "redis://127.0.0.1:1/0"
    page = site.get("/").text
    alerts = re.findall(r'<p class="alert">(.*?)</p>', page)
    assert [one.split(":")[0] for one in alerts] == ["Paused", "Redis can't be reached"]
    assert '<a href="#steer">Resume</a>' in alerts[0]
    assert '<h2 id="steer">' in page


def test_a_sentence_in_place_of_a_page_looks_like_one(site: Site) -> None:
    answer = site.get("/rq/0/view/job/nope")
    assert answer.status_code == 404
    assert '<meta name="color-scheme" content="light dark">' in answer.text
    assert '<meta name="viewport"' in answer.text
    assert site.get(re.findall(r'rel="stylesheet" href="([^"]+)"', answer.text)[0]).status_code == 200


def test_a_long_reason_without_a_traceback_is_shown_whole(bad: Site) -> None:
    why = "exit code 3: " + "long " * 100 + "\nand a second line"
    bad.work.sql("UPDATE nih_sched_attempts SET reason = :why, traceback = NULL WHERE row_key = '[1]'", why=why)
    page = bad.get("/rows/1").text
    assert f'<pre tabindex="0">{why}</pre>' in page
    assert "…." not in page
    assert "Reason, all of it" not in bad.get("/rows/2").text


def test_the_chart_tells_the_whole_hour(site: Site) -> None:
    now = int(time.time()) // 60
    counts = {
        58: {"done": 5000, "wait_le_1": 3, "wait_le_5": 1, "wait_sum": 8},
        30: {"failed": 7000},
        61: {"done": 9e6},
    }
    for back, names in counts.items():
        for name, value in names.items():
            site.work.sql(
                "INSERT INTO nih_sched_counts VALUES (:source, :minute, :name, :value)",
                source=site.desk.source.name,
                minute=now - back,
                name=name,
                value=value,
            )
    page = site.get("/").text
    assert "at most 7,000 a minute" in page
    assert re.findall(r"<td>5,000</td><td>0</td><td>2.0 s</td>", page)
    assert "<td>0</td><td>7,000</td><td></td>" in page
    assert "9,000,000" not in page
    assert page.count('<rect class="done"') == 60
    assert page.count('<polyline class="waits"') == 1


def test_metrics_and_readiness_tell_what_is(site: Site) -> None:
    for number, state in enumerate(("Pending", "Pending", "Failed", "Done"), 1):
        site.work.sql("INSERT INTO work VALUES (:id, :state, 'x')", id=number, state=state)
    source = site.desk.source.name
    text = site.get("/metrics").text
    for line in (
        f'nih_sched_rows{{source="{source}",state="ready"}} 2.0',
        f'nih_sched_rows{{source="{source}",state="failed"}} 1.0',
        f'nih_sched_ready_rows{{source="{source}"}} 2.0',
        f'nih_sched_redis_up{{source="{source}"}} 1.0',
        f'nih_sched_paused{{source="{source}"}} 0.0',
    ):
        assert line in text.splitlines()
    assert site.client.get("/metrics").status_code == 401
    answer = site.get("/readyz")
    assert (answer.status_code, answer.text) == (200, "ready")
    assert site.client.get("/healthz").text == "ok"
    site.work.sql("ALTER TABLE work RENAME TO elsewhere")
    assert site.get("/").status_code == 503
