"""The dashboard in a real browser: what a person sees and presses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import Work, make_work
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from servers import Database, eventually, free_port, scheduler, spawn_scheduler

PASSWORD = "pw-of-the-browser"
HANDLER = """
import time
def some_fail(id, kind):
    print(f"row {id} says {kind}")
    if kind == "bad":
        raise ValueError(f"no such address in row {id}")
    if kind == "long":
        time.sleep(60)
"""


@pytest.fixture
def app(sqlite_db: Database, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    monkeypatch.setenv("REDIS_URL", redis_url)
    work = make_work(sqlite_db, tmp_path / "app")
    (work.folder / "shop.py").write_text(HANDLER)
    return work


class Person:
    """Who sits before it."""

    def __init__(self, browser: Any, port: int, shots: Path) -> None:
        self.browser = browser
        self._base = f"http://ada:{PASSWORD}@127.0.0.1:{port}"
        self._shots = shots

    def open(self, path: str) -> None:
        self.browser.get(self._base + path)

    @property
    def text(self) -> str:
        return str(self.browser.execute_script("return document.body.innerText"))

    def waits_for(self, words: str, seconds: float = 15) -> None:
        WebDriverWait(self.browser, seconds).until(lambda _: words in self.text, f"{words!r} isn't in {self.text}")

    def clicks(self, by: str, what: str) -> None:
        """On what is there at this moment: the page is drawn anew meanwhile, and a finger holds no element of it."""

        def click(browser: Any) -> bool:
            browser.find_element(by, what).click()
            return True

        WebDriverWait(self.browser, 5, 0.02, [StaleElementReferenceException]).until(click, f"no {what}")

    def presses(self, name: str) -> None:
        self.clicks(By.XPATH, f"//button[normalize-space()='{name}']")

    def follows(self, name: str) -> None:
        self.clicks(By.LINK_TEXT, name)

    def shoots(self, name: str) -> None:
        self.browser.save_screenshot(str(self._shots / f"{name}.png"))

    def tile(self, state: str) -> str:
        tiles = "[...document.querySelectorAll('.tiles a')].map((one) => one.innerText.split('\\n'))"
        # In one look, for the page is drawn anew meanwhile.
        return next(str(words[0]) for words in self.browser.execute_script(f"return {tiles}") if state in words[1])


def test_an_operator_at_three_in_the_morning(app: Work, browser: Any, tmp_path: Path) -> None:
    port, shots = free_port(), tmp_path
    env = {**app.env, "NIH_SCHED_DASHBOARD_PASSWORD": PASSWORD, "NIH_SCHED_DASHBOARD_PORT": str(port)}
    run = ("--job", "shop:some_fail", "--max-concurrent-jobs", "2", "--tries", "0")
    with (
        spawn_scheduler("dashboard", env=env, cwd=app.folder) as served,
        spawn_scheduler(*run, env=app.env, cwd=app.folder),
    ):
        eventually(lambda: "Dashboard on" in served.output)
        it = Person(browser, port, shots)
        it.open("/")
        assert it.tile("done") == "0"
        app.insert(*range(1, 31))
        app.insert(31, 32, 33, kind="bad")
        WebDriverWait(browser, 15).until(lambda _: (it.tile("done"), it.tile("failed")) == ("30", "3"))  # by itself
        it.waits_for("at most")
        it.shoots("overview")

        it.open("/rows?state=failed")
        it.shoots("rows")
        it.follows("31")
        it.waits_for("no such address in row 31")
        assert "Traceback" in it.text
        assert "row 31 says bad" in it.text
        it.shoots("row")
        app.sql("UPDATE work SET kind = 'good' WHERE kind = 'bad'")
        it.presses("Requeue")
        it.waits_for("Requeued.")
        it.waits_for("Done at")  # by itself

        it.open("/failures")
        it.waits_for("2 failed rows")
        it.shoots("failures")
        it.presses("Requeue all")
        it.waits_for("Requeued 2 rows.")
        eventually(lambda: app.states() == {"Done": 33})

        app.insert(40, kind="long")
        eventually(lambda: app.states().get("Started") == 1)
        it.open("/rows/40")
        it.waits_for("running for")
        it.shoots("running")
        it.clicks(By.XPATH, "//summary[contains(., 'Cancel')]")
        it.shoots("confirm")
        it.presses("Stop it")
        it.waits_for("Cancelled: it is stopped within 5 s")
        it.waits_for("cancelled after")  # by itself
        eventually(lambda: [one.outcome for one in app.attempts(40)] == ["cancelled"], timeout=10)
        source = scheduler("source", env=app.env, cwd=app.folder).stdout.strip()
        it.open(f"/rq/0/view/jobs/{source}/finished/50/asc/1")
        it.waits_for(f"{source} claim")
        it.shoots("rq")

        # What stands in a line of a list is read in a line, however long its neighbours are.
        app.insert(50, kind="bad")
        app.sql("UPDATE work SET state = 'Failed', kind = 'x' WHERE id = 33")
        claims = "UPDATE nih_sched_attempts SET outcome = 'interrupted', reason = :why WHERE row_key = '[33]'"
        app.sql(claims, why="https://" + "very-long-subdomain-" * 12)
        browser.set_window_size(760, 900)
        it.open("/rows")
        found = "[...document.querySelectorAll('thead th, td.when, td[data-name]')].filter((one) => one.innerText)"
        of_one = (
            "const text = document.createRange(); text.selectNodeContents(one); return text.getClientRects().length"
        )
        counted = browser.execute_script(f"return {found}.map((one) => {{ {of_one} }})")
        assert set(counted) == {1}

        dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
        browser.set_window_size(420, 900)
        for path, name in (("/", "phone"), ("/rows/32", "phone-row"), ("/rows", "phone-rows")):
            it.open(path)
            it.shoots(name)
            size = "document.documentElement"
            assert browser.execute_script(f"return {size}.scrollWidth <= {size}.clientWidth"), name
        it.open("/rq/")
        it.shoots("phone-rq")
        box = "document.querySelector('{}').getBoundingClientRect().{}"
        ends = (
            "document.createRange(); text.selectNodeContents(document.querySelector('p.intro'));"
            " return text.getBoundingClientRect().bottom"
        )
        assert browser.execute_script(f"const text = {ends} <= {box.format('#queues', 'top')}")
