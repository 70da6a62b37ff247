"""Checks of who works: producers, workers, handlers, the dashboard."""

from __future__ import annotations

from nih_sched.doctor.finding import Finding, Visit
from nih_sched.errors import NihError
from nih_sched.store.pauses import Pauses

LATE = 60.0  # seconds by which a retry may be overdue
HEARD = 0.5  # seconds for which an answer is waited for


def pauses(visit: Visit) -> list[Finding]:
    """A pause that may have been forgotten."""
    return [
        Finding(
            "paused",
            f"Source {pause.source} is paused by {pause.by} since {pause.at:%Y-%m-%d %H:%M:%S} UTC: "
            f"{pause.reason or 'no reason given'}",
            "No row of it starts anywhere.",
            f"scheduler resume --source {pause.source}",
            is_problem=False,
        )
        for pause in Pauses(visit.desk).all()
    ]


def producers(visit: Visit) -> list[Finding]:
    """Work, and no producer that looks after it."""
    waiting = visit.checkup.unled(LATE)
    return [
        Finding(
            "no-producer",
            f"Source {name} has {count} open claims, and no producer leads it",
            "Nobody sends what is due, nor rescues what was lost.",
            "scheduler, or scheduler producer, with the settings of that source",
        )
        for name, count in waiting
    ]


def workers(visit: Visit) -> list[Finding]:
    """Claims that no worker will take."""
    if visit.redis is None:
        return []
    from nih_sched import redis_client  # noqa: PLC0415 - slow to import; who has a connection has done so

    found = []
    for name, count in visit.checkup.waiting(LATE / 4):
        if not redis_client.worker_names(visit.redis, name):
            found.append(
                Finding(
                    "no-worker",
                    f"{count} claims of source {name} wait, and no worker serves it",
                    "They wait until one comes.",
                    "scheduler worker, with the settings of that source",
                )
            )
    return found


def retries(visit: Visit) -> list[Finding]:
    """Retries that nobody sends."""
    count, longest = visit.checkup.overdue(LATE)
    if not count:
        return []
    return [
        Finding(
            "overdue-retries",
            f"{count} retries are overdue, the first of them by {longest:.0f} s",
            "A producer sends what is due: none is up, or Redis is away.",
            "scheduler status; then start a scheduler or a producer",
        )
    ]


def handler(visit: Visit) -> list[Finding]:
    """A handler that can't be imported, or asks for a column that isn't there."""
    settings = visit.settings
    if not (settings.job or settings.command or settings.handlers):
        return []  # this machine needs none: it isn't a worker's
    from nih_sched.runner import handler_for  # noqa: PLC0415 - it brings RQ, for this check alone

    try:
        handler_for(settings, visit.desk)
    except NihError as error:
        return [
            Finding(
                "handler", str(error), "Workers with these settings don't start.", "Mend it, then: scheduler doctor"
            )
        ]
    return []


def dashboard(visit: Visit) -> list[Finding]:
    """A dashboard on this machine that lets everybody in: ours never does, rq-dashboard by itself always."""
    import http.client  # noqa: PLC0415 - for this check alone

    port = visit.settings.dashboard_port
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=HEARD)
    try:
        for path in ("/", "/rq/", "/rq"):
            line.request("GET", path)
            answer = line.getresponse()
            text = answer.read(65536).decode("utf-8", "replace").lower()
            if answer.status == http.client.OK and ("rq dashboard" in text or "rq-dashboard" in text):
                return [
                    Finding(
                        "open-dashboard",
                        f"A dashboard answers on port {port} of this machine without a password",
                        "Whoever reaches it sees all jobs; rq-dashboard's own also changes and deletes them.",
                        "Stop it, and use: scheduler dashboard",
                    )
                ]
    except (OSError, http.client.HTTPException):
        pass  # nobody answers, or no web server does
    finally:
        line.close()
    return []
