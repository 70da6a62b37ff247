"""Who may come in, and where a form came from: whatever a header holds."""

from __future__ import annotations

import base64
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from nih_sched.access import Access, sender_of, user_of
from nih_sched.metrics.endpoint import Endpoint

PASSWORD, TOKEN = "a påssword", "a tökenⓣ"
ACCESS = Access(PASSWORD, TOKEN)


def wsgi(text: str) -> str:
    """As a server hands on what came in UTF-8."""
    return text.encode().decode("latin-1")


def basic(text: str | bytes) -> str:
    return "Basic " + base64.b64encode(text if isinstance(text, bytes) else text.encode()).decode()


BAD = [
    None,
    "",
    " ",
    "Basic",
    "Basic ",
    "Basic !",
    "Basic \xff\xfe",
    "Basic é",
    "Basic YQ",
    "Basic €",
    "Basic \udc80",
    basic("admin"),
    basic("admin:"),
    basic(b"admin:\xff\xfe"),
    basic(f"admin:{TOKEN}"),
    basic(f"admin:{PASSWORD}x"),
    basic(f"admin:x:{PASSWORD}"),
    basic(f"admin:{PASSWORD}\0"),
    f"{basic(f'a:{PASSWORD}')}, {basic(f'a:{PASSWORD}')}",
    "Bearer",
    "Bearer é",
    "Bearer €",
    "Bearer \udc80",
    wsgi(f"Bearer {PASSWORD}"),
    wsgi(f"Token {TOKEN}"),
    wsgi(TOKEN),
    "Digest x",
    "\0",
    "Bearer " + "x" * 100_000,
]


def test_what_cannot_be_read_or_is_wrong_opens_nothing_on_either_port() -> None:
    nothing: Any = None
    port = Endpoint(nothing, nothing, "", None, ACCESS)
    for header in BAD:
        assert not ACCESS.admits(header), header
        assert not Access().admits(header)
        assert not Access("", "").admits(header)
        user_of(header)  # says something, or nothing
        said: list[Any] = []
        environ = {"PATH_INFO": "/metrics", "REQUEST_METHOD": "GET"}
        port(
            environ if header is None else environ | {"HTTP_AUTHORIZATION": header},
            lambda *told, said=said: said.append(told),
        )
        assert said[0][0].startswith("401"), header


@given(st.text())
def test_no_header_is_too_odd(header: str) -> None:
    for one in (header, f"Basic {header}", f"Bearer {header}"):
        assert not ACCESS.admits(one)
        user_of(one)
        sender_of(header, None)
        sender_of(None, header)


def test_password_and_token_open_each_its_own_way() -> None:
    for header in (
        basic(f"ada:{PASSWORD}"),
        basic(f":{PASSWORD}").replace("Basic", "bAsIC "),
        wsgi(f"bearer {TOKEN} "),
    ):
        assert ACCESS.admits(header), header


def test_a_password_that_is_not_utf_8_opens_as_the_environment_has_it() -> None:
    assert Access("caf\udce9").admits(basic(b"ada:caf\xe9"))


def test_a_user_name_is_one_line() -> None:
    assert user_of(basic("ada\n\0\x1b[31m:x")) == "ada???[31m"
    assert user_of("Bearer x") is None


def test_an_origin_that_is_not_one_is_nobodys() -> None:
    odd = [
        "",
        "null",
        "http://[",
        "http://",
        "h",
        "https://h/",
        "https://u@h",
        "http://h http://h",
        "http://h, http://h",
    ]
    odd += ["http://h,http://h", "//h", "file://h", "http://h?", "http://h#", "http://h\\x", "http:\\\\h", "script://h"]
    for origin in odd:
        assert sender_of(origin, "http://h/") is None, origin


def test_a_sender_is_told_by_its_origin_or_else_by_its_referer() -> None:
    assert sender_of("https://H:81", "http://other/") == "h:81"
    assert sender_of("http://[::1]:9181", None) == "[::1]:9181"
    assert sender_of(None, "http://h/rows/1?x=[") == "h"
    assert sender_of(None, None) is None


def test_forms_of_one_password_are_everybodys_and_do_not_tell_it() -> None:
    assert Access("a").form_token() == Access("a", "b", read_only=True).form_token() != Access("b").form_token()
    assert Access(None, "a").form_token() == Access("a").form_token()
    assert Access().form_token() != Access().form_token()
    assert len(Access("a").form_token()) == 64
