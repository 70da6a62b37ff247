"""The keeper's parts, on real processes: memory that it shares, who lives, and the end of all that a row started."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from servers import Spawned, eventually, spawn
from sqlalchemy import Engine

from nih_sched import clock, host, keeper, ledger
from nih_sched.dialects import connect
from nih_sched.keeper import Slot, Slots
from nih_sched.settings import Settings, fields
from nih_sched.store import Leases

hypothesis_settings.register_profile("patient", deadline=None)  # a noisy machine is no failure
hypothesis_settings.load_profile("patient")

linux = pytest.mark.skipif(not host.LINUX, reason="by /proc and prctl")


# Until when


@given(st.floats(0, 1e9), st.floats(fields()["lease"].metadata["low"], fields()["lease"].metadata["high"]))
def test_a_horse_is_vouched_for_until_before_its_lease_ends(sent: float, lease: float) -> None:
    until = keeper.vouched_until(sent, lease)
    assert sent < until < sent + lease
    # There is a second at least to stop it, and most of the lease to be renewed in.
    assert sent + lease - until >= 0.999
    assert until - sent >= lease * 0.49


@given(st.floats(0, 1e6), st.floats(1e-3, 10.0))
def test_leases_of_any_length_end_after_it(sent: float, lease: float) -> None:
    assert keeper.vouched_until(sent, lease) < sent + lease


def test_each_lease_has_a_name_of_its_own_that_fits_a_slot() -> None:
    names = {keeper.new_lease() for _ in range(100)}
    assert len(names) == 100
    assert {len(name) for name in names} == {32}


# Slots


def test_a_new_slot_is_empty() -> None:
    slots = Slots(3)
    assert len(slots.slots) == 3
    assert not slots.closing
    for slot in slots.slots:
        assert (slot.worker, slot.horse, slot.lost, slot.killed, slot.lapsed) == (0, None, False, False, False)


def test_a_worker_and_its_horses_go_through_a_slot() -> None:
    slot = Slots(1).slots[0]
    lease, later = keeper.new_lease(), clock.boot() + 1000.0
    slot.occupy(2**22, 2**40, lease, later)
    assert (slot.worker, slot.born, slot.lease, slot.until, slot.horse) == (2**22, 2**40, lease, later, None)
    assert not slot.lapsed
    slot.mount(2**22 + 1, 2**41, later + 5.0)
    assert (slot.horse, slot.until, slot.lapsed) == ((2**22 + 1, 2**41), later + 5.0, False)
    slot.kill_noted()
    assert slot.killed
    slot.dismount()
    assert (slot.horse, slot.killed, slot.worker) == (None, False, 2**22)
    slot.mount(5, 6, later)
    assert (slot.horse, slot.until) == ((5, 6), later + 5.0)
    slot.leave()
    assert (slot.worker, slot.horse, slot.lapsed) == (0, None, False)


def test_being_vouched_for_never_ends_earlier_than_it_was_said() -> None:
    # Statements overtake each other: the older one's answer may come last.
    slot = Slots(1).slots[0]
    slot.occupy(1, 2, "a", 100.0)
    slot.vouch(300.0)
    slot.vouch(200.0)
    assert slot.until == 300.0
    slot.mount(3, 4, 250.0)
    assert slot.until == 300.0


def test_a_renewal_that_comes_late_takes_nothing_from_a_start_since() -> None:
    # Keeper and horse write at the same moment: neither may undo what the other has just written.
    slot = Slots(1).slots[0]
    slot.occupy(1, 2, "a", 100.0)
    seen = slot._get

    def start_meanwhile(name: str) -> float:
        before = float(seen(name))
        if name == "kept":
            slot.mount(3, 4, 900.0)
        return before

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slot, "_get", start_meanwhile)
        slot.vouch(200.0)
    assert slot.until == 900.0


def test_a_horse_lapses_when_its_time_is_over_or_its_lease_is_lost() -> None:
    slot = Slots(1).slots[0]
    slot.occupy(1, 2, "a", clock.boot() - 1.0)
    assert not slot.lapsed  # no horse, no harm
    slot.mount(3, 4, clock.boot() - 1.0)
    assert slot.lapsed
    slot.vouch(clock.boot() + 1000.0)
    assert not slot.lapsed
    slot.lose()
    assert slot.lost
    assert slot.lapsed
    slot.vouch(clock.boot() + 2000.0)
    assert slot.lapsed  # nothing but another lease helps
    slot.dismount()
    assert not slot.lapsed
    assert slot.lost


def test_a_new_lease_begins_with_a_clean_slot() -> None:
    slot = Slots(1).slots[0]
    slot.occupy(1, 2, "a" * 32, 1e9)
    slot.mount(3, 4, 1e9)
    slot.lose()
    slot.kill_noted()
    slot.occupy(1, 2, "b", 5.0)  # ends earlier than the old one's, too
    assert (slot.lease, slot.until, slot.horse, slot.lost, slot.killed) == ("b", 5.0, None, False, False)


def test_slots_do_not_touch_each_other() -> None:
    slots = Slots(3)
    before, slot, behind = slots.slots
    for number, one in enumerate((before, behind), 1):
        one.occupy(number, number, str(number) * 32, float(number))
    slot.occupy(2**62, 2**62, "x" * 32, 1e300)
    slot.mount(2**62, 2**62, 1e300)
    slot.lose()
    slot.kill_noted()
    slots.close()
    assert slots.closing
    for number, one in enumerate((before, behind), 1):
        found = (one.worker, one.born, one.lease, one.until, one.horse, one.lost, one.killed)
        assert found == (number, number, str(number) * 32, float(number), None, False, False)
    assert slot.lease == "x" * 32


def test_slots_are_shared_with_forks() -> None:
    slots = Slots(2)
    child = os.fork()
    if child == 0:
        try:
            slots.slots[1].occupy(os.getpid(), 7, "of the child", 9.0)
            slots.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert (slots.slots[1].worker, slots.slots[1].lease, slots.slots[0].worker) == (child, "of the child", 0)
    assert slots.closing


# Who lives


@contextlib.contextmanager
def running(code: str, *args: str, lease: str | None = None, claim: int = 1) -> Iterator[Spawned]:
    """A Python process in a session of its own, which has said that it is ready; marked, if a lease is named."""
    env = {host.MARK: None if lease is None else f"{lease} {claim}"}
    with spawn([sys.executable, "-c", f"import os, sys, time\n{code}", *args], env=env) as process:
        eventually(lambda: "ready" in process.output)
        yield process


SLEEP = "print('ready', flush=True); time.sleep(600)"


def test_a_process_is_known_by_its_pid_and_its_birth() -> None:
    me = os.getpid()
    mine = host.born(me)
    assert mine is not None
    assert host.born(me) == mine
    assert host.lives(me, mine)
    assert not host.lives(me, mine + 1)  # the number has gone to another process
    assert not host.lives(me, None)
    assert not host.lives(0, mine)
    with running(SLEEP) as process:
        born = host.born(process.pid)
        assert born is not None
        assert born >= mine
        assert host.lives(process.pid, born)
        process.kill()
        process.wait()
        assert host.born(process.pid) is None
        assert not host.lives(process.pid, born)


def test_a_dead_process_that_nobody_has_waited_for_is_dead() -> None:
    child = os.fork()
    if child == 0:
        time.sleep(600)
    try:
        born = host.born(child)
        assert host.lives(child, born)
        os.kill(child, signal.SIGKILL)
        eventually(lambda: psutil.Process(child).status() == psutil.STATUS_ZOMBIE)
        assert host.born(child) is None
        assert not host.lives(child, born)
    finally:
        os.waitpid(child, 0)


@linux
def test_a_processes_name_hides_nothing() -> None:
    code = f"from nih_sched import host; host.name_process(sys.argv[1]); {SLEEP}"
    for name in ("a) Z 1 2 3 (b", ")", "Z Z Z", "x" * 50, "größe"):
        with running(code, name) as process:
            assert psutil.Process(process.pid).name() != "python"
            started = psutil.Process(process.pid).create_time() - psutil.boot_time()
            born = host.born(process.pid)
            assert born is not None
            assert abs(born / os.sysconf("SC_CLK_TCK") - started) < 60.0  # the date may have been changed a little
            assert host.lives(process.pid, born)


def test_this_hosts_name_is_one_for_all_its_processes_and_fits_its_column() -> None:
    code = "from nih_sched import host; print(host.host_id())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert said == host.host_id()
    assert 0 < len(said) <= ledger.tables().leases.c.host.type.length


@linux
def test_a_process_may_die_with_its_parent() -> None:
    code = """
from nih_sched import host
parent = os.getpid()
child = os.fork()
if child == 0:
    host.die_with(parent)
    print("ready", os.getpid(), flush=True)
    time.sleep(600)
time.sleep(600)
"""
    with running(code) as process:
        (child,) = psutil.Process(process.pid).children()
        process.kill()
        process.wait()
        eventually(lambda: host.born(child.pid) is None)


def test_a_process_whose_parent_is_dead_already_ends_at_once() -> None:
    code = "from nih_sched import host; host.die_with(1 + os.getppid()); print('ready')"
    assert subprocess.run([sys.executable, "-c", f"import os; {code}"], check=False).returncode == 70


# The end of all that a row started


def gone(*pids: int) -> bool:
    """Whether they are dead, each of them."""
    return not any(host.born(pid) for pid in pids)


def number(process: Spawned, name: str) -> int:
    """The pid that a process has said of another."""
    words = eventually(lambda: dict(line.split("=") for line in process.output.splitlines() if "=" in line))
    return int(eventually(lambda: words.get(name)))


def family(*commands: str) -> str:
    """Code of a horse that starts commands, each in a session of its own, and says their pids."""
    lines = ["import subprocess"]
    lines += [
        f"print('c{n}=%d' % subprocess.Popen({command!r}, shell=True, start_new_session=True).pid, flush=True)"
        for n, command in enumerate(commands)
    ]
    return "\n".join([*lines, SLEEP])


def test_a_command_in_its_own_session_is_ended_with_its_horse() -> None:
    with running(family("sleep 601", "sleep 602 & sleep 603")) as horse:
        everyone = horse.processes()
        assert len(everyone) >= 4
        commands = {number(horse, "c0"), number(horse, "c1")}
        assert commands <= {process.pid for process in everyone}
        assert {os.getsid(pid) for pid in commands} == commands
        assert host.end_all([], [(horse.pid, host.born(horse.pid))])
        assert gone(*(process.pid for process in everyone))


def test_a_command_in_its_own_session_is_known_by_its_mark_when_its_horse_is_dead() -> None:
    lease = keeper.new_lease()
    with running(family("sleep 601", "trap '' TERM HUP INT; sleep 602; sleep 603"), lease=lease) as horse:
        everyone = [process.pid for process in horse.processes()]
        commands = [pid for pid in everyone if pid != horse.pid]
        born = host.born(horse.pid)
        horse.kill()
        horse.wait()
        assert not gone(*commands)
        assert host.end_all([lease], [(horse.pid, born)])
        assert gone(*commands)


def test_what_a_dead_horse_left_in_its_group_is_ended() -> None:
    # Forked, not started anew: nothing marks it, and its parent is gone.
    code = f"""
child = os.fork()
if child == 0:
    time.sleep(607)
print("child=%d" % child, flush=True)
{SLEEP}
"""
    with running(code) as horse:
        child, born = number(horse, "child"), host.born(horse.pid)
        assert os.getpgid(child) == horse.pid
        horse.kill()
        horse.wait()
        assert not gone(child)
        assert host.end_all([], [(horse.pid, born)])
        eventually(lambda: gone(child))


def test_a_command_that_has_left_its_parents_is_known_by_its_mark() -> None:
    lease = keeper.new_lease()
    code = """
for _ in range(2):
    if os.fork():
        os._exit(0)
    os.setsid()
print("ready=%d" % os.getpid(), flush=True)
os.execvp("sleep", ["sleep", "605"])
"""
    with spawn([sys.executable, "-c", f"import os, sys\n{code}"], env={host.MARK: f"{lease} 1"}) as process:
        daemon = number(process, "ready")
        process.wait()
        assert psutil.Process(daemon).ppid() != process.pid
        host.end_all([lease])
        eventually(lambda: gone(daemon))


def test_a_stopped_process_is_ended_too() -> None:
    lease = keeper.new_lease()
    with running(SLEEP, lease=lease) as process:
        process.send_signal(signal.SIGSTOP)
        eventually(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
        host.end_all([lease])
        process.wait(30)


def test_nothing_else_is_ended() -> None:
    lease = keeper.new_lease()
    with running(SLEEP, lease=keeper.new_lease()) as other, running(SLEEP) as unmarked, running(SLEEP) as recycled:
        born = host.born(recycled.pid)
        assert born is not None
        assert host.end_all([lease], [(recycled.pid, born - 1), (recycled.pid, None), (2**22 + 5, 1)])
        assert [one.poll() for one in (other, unmarked, recycled)] == [None] * 3


@pytest.mark.parametrize(
    ("leases", "horses"),
    [([], []), ([""], []), (["", "x" * 32], []), ([], [(0, None)]), ([], [(0, 0)]), ([""], [(1, -1), (1, None)])],
)
def test_what_says_nothing_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, leases: list[str], horses: list[tuple[int, int | None]]
) -> None:
    # Never for real: if this fails, it is about every process of the machine.
    ended: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: ended.append(pid))
    monkeypatch.setattr(os, "killpg", lambda pid, number: ended.append(pid))
    monkeypatch.setattr(host, "ROUNDS", 1)
    host.end_all(leases, horses)
    assert ended == []


def test_who_ends_them_goes_on_though_it_carries_the_mark_itself() -> None:
    # As the keeper of a stock worker's horse, which is its child.
    lease = keeper.new_lease()
    code = "from nih_sched import host; host.end_all([sys.argv[1]], [(os.getppid(), host.born(os.getppid()))])"
    horse = f"""
if os.fork() == 0:
    os.setsid()
    {code}
    print("over", flush=True)
    os._exit(0)
{SLEEP}
"""
    with running(horse, lease, lease=lease) as process:
        assert process.wait(60) == -signal.SIGKILL
        eventually(lambda: "over" in process.output)


def test_the_commands_of_some_claims_may_be_ended_alone() -> None:
    one, other = keeper.new_lease(), keeper.new_lease()
    with (
        running(SLEEP, lease=one, claim=1) as first,
        running(SLEEP, lease=one, claim=11) as second,
        running(SLEEP, lease=other, claim=1) as third,
    ):
        assert host.end_all([one], claims=[1, 2])
        assert first.wait(30) == -signal.SIGKILL
        assert (second.poll(), third.poll()) == (None, None)
        assert host.end_all([one])
        assert second.wait(30) == -signal.SIGKILL
        assert third.poll() is None


def test_a_horse_marks_what_it_starts_from_then_on() -> None:
    code = """
import subprocess
from nih_sched import host
for claim in (7, 8):
    host.mark(sys.argv[1], claim)
    print("c%d=%d" % (claim, subprocess.Popen(["sleep", "606"], start_new_session=True).pid), flush=True)
"""
    lease = keeper.new_lease()
    with running(f"{code}\n{SLEEP}", lease) as horse:
        seventh, eighth = number(horse, "c7"), number(horse, "c8")
        assert host.end_all([lease], claims=[7])
        eventually(lambda: gone(seventh))
        assert not gone(eighth)
        assert horse.poll() is None
        assert host.end_all([lease], claims=[8])
        eventually(lambda: gone(eighth))


def test_several_leases_are_ended_at_once() -> None:
    one, other, spared = (keeper.new_lease() for _ in range(3))
    with (
        running(SLEEP, lease=one) as first,
        running(SLEEP, lease=other) as second,
        running(SLEEP, lease=spared) as third,
    ):
        host.end_all([one, other])
        assert [process.wait(30) for process in (first, second)] == [-signal.SIGKILL] * 2
        assert third.poll() is None


def test_what_starts_a_session_between_the_look_and_the_kill_is_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # A command that starts another in a session of its own and ends: just after we have looked for marks.
    lease, look = keeper.new_lease(), psutil.pids
    launcher = """
print("ready", flush=True)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
import subprocess
print("next=%d" % subprocess.Popen(["sleep", "604"], start_new_session=True).pid, flush=True)
"""
    go = Path(os.environ["HOME"]) / "go"
    with running(launcher, str(go), lease=lease) as process:
        started: list[int] = []

        def look_and_be_overtaken() -> list[int]:
            found = look()
            if not started:
                go.touch()
                process.wait(30)
                started.append(number(process, "next"))
            return found

        monkeypatch.setattr(psutil, "pids", look_and_be_overtaken)
        host.end_all([lease])
        assert started
        assert gone(*started)


# The keeper at work


class Kept:
    """A keeper in a thread of this process, and a lease on a database of its own."""

    def __init__(self, url: str, lease: float = 2.0) -> None:
        self.slots = Slots(2)
        self.settings = Settings(database_url=url, lease=lease)
        self._thread: threading.Thread | None = None

    def begin(self, *, patrol: bool = False) -> None:
        work: Callable[[], None] = lambda: keeper.keep(self.slots, self.settings, os.getppid(), patrol=patrol)  # noqa: E731
        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()

    @property
    def slot(self) -> Slot:
        return self.slots.slots[0]

    def end(self) -> None:
        for slot in self.slots.slots:
            slot.leave()
        self.slots.close()
        if self._thread is not None:
            self._thread.join(60)
            assert not self._thread.is_alive()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = connect(f"sqlite:///{tmp_path}/kept.db", create=True)
    ledger.ensure(engine, ledger.tables())
    yield engine
    engine.dispose()


@pytest.fixture
def leases(engine: Engine) -> Leases:
    return Leases(engine, ledger.tables())


@pytest.fixture
def kept(engine: Engine) -> Iterator[Kept]:
    kept = Kept(str(engine.url))
    yield kept
    kept.end()


def take(leases: Leases, process: int | None = None, **facts: Any) -> str:
    """A lease for a process, by default this one; its id."""
    pid = process or os.getpid()
    name = keeper.new_lease()
    values = {"worker": "w", "host": host.host_id(), "pid": pid, "born": host.born(pid) or 0, "seconds": 2.0}
    leases.take(name, **{**values, **facts})
    return name


def one_of(leases: Leases, name: str) -> Any:
    (found,) = [lease for lease in leases.all() if lease.id == name]
    return found


def mine(slot: Slot, lease: str, until: float) -> None:
    """This process is the worker."""
    me = os.getpid()
    slot.occupy(me, host.born(me) or 0, lease, until)


def mount(slot: Slot, horse: Spawned, until: float) -> None:
    slot.mount(horse.pid, host.born(horse.pid) or 0, until)


def test_leases_are_renewed_as_long_as_their_workers_live(kept: Kept, leases: Leases) -> None:
    name = take(leases)
    begun = clock.boot()
    mine(kept.slot, name, begun)
    kept.begin()
    eventually(lambda: one_of(leases, name).beat >= 2)
    eventually(lambda: kept.slot.until > begun)
    assert kept.slot.until < clock.boot() + kept.settings.lease
    assert not kept.slot.lost
    assert one_of(leases, name).died is None


def test_a_horse_that_cannot_be_vouched_for_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    # The database doesn't answer.
    kept = Kept(f"sqlite:///{tmp_path}/nowhere/kept.db")
    lease = keeper.new_lease()
    try:
        with running(family("sleep 601"), lease=lease) as horse:
            everyone = [process.pid for process in horse.processes()]
            until = clock.boot() + 0.5
            mine(kept.slot, lease, until)
            mount(kept.slot, horse, until)
            kept.begin()
            assert horse.wait(60) == -signal.SIGKILL
            assert clock.boot() >= until
            eventually(lambda: gone(*everyone))
            assert kept.slot.killed  # it is no fault of its row
    finally:
        kept.end()


def test_a_horse_whose_lease_others_have_ended_is_stopped_at_once(kept: Kept, leases: Leases) -> None:
    name, spared = take(leases), take(leases)
    with running(SLEEP) as horse, running(SLEEP) as another:
        later = clock.boot() + 1000.0
        mine(kept.slot, name, later)
        mount(kept.slot, horse, later)
        mine(kept.slots.slots[1], spared, later)
        mount(kept.slots.slots[1], another, later)
        kept.begin()
        eventually(lambda: one_of(leases, name).beat > 0)
        assert leases.end(name, "its lease ran out")
        assert horse.wait(60) == -signal.SIGKILL
        assert (kept.slot.lost, kept.slot.killed) == (True, True)
        assert (another.poll(), kept.slots.slots[1].lost) == (None, False)


def test_a_dead_workers_horse_is_stopped_and_the_death_written_down(kept: Kept, leases: Leases) -> None:
    with running(SLEEP) as worker, running(SLEEP) as horse:
        name = take(leases, worker.pid)
        later = clock.boot() + 1000.0
        kept.slot.occupy(worker.pid, host.born(worker.pid) or 0, name, later)
        mount(kept.slot, horse, later)
        kept.begin()
        worker.kill()
        worker.wait()
        assert horse.wait(60) == -signal.SIGKILL
        eventually(lambda: one_of(leases, name).died)
        assert one_of(leases, name).died == keeper.DEATH
        assert (kept.slot.worker, kept.slot.horse) == (0, None)


def test_a_death_that_cannot_be_written_down_yet_is_written_later(leases: Leases, engine: Engine) -> None:
    path = Path(str(engine.url.database))
    away = path.with_suffix(".away")
    kept = Kept(str(engine.url), lease=60.0)
    with running(SLEEP) as worker:
        name = take(leases, worker.pid)
        engine.dispose()
        path.rename(away)
        kept.slot.occupy(worker.pid, host.born(worker.pid) or 0, name, clock.boot() + 1000.0)
        kept.begin()
        worker.kill()
        worker.wait()
        eventually(lambda: kept.slot.worker == 0)
        kept.slots.close()  # it ends, but not before that is done
        away.rename(path)
        eventually(lambda: one_of(leases, name).died, timeout=60)
    kept.end()


def test_deaths_that_nobody_saw_are_found_on_this_host_alone(kept: Kept, leases: Leases) -> None:
    lease = secrets.token_hex(16)
    with running(SLEEP) as living, running(SLEEP, lease=lease) as left:
        dead = take(leases, 2**22 + 9, born=5)
        reused = take(leases, living.pid, born=(host.born(living.pid) or 0) + 1)
        alive = take(leases, living.pid)
        elsewhere = take(leases, 2**22 + 9, born=5, host="another host")
        leases.take(lease, worker="w", host=host.host_id(), pid=2**22 + 9, born=5, seconds=2.0)
        kept.begin(patrol=True)
        assert left.wait(60) == -signal.SIGKILL
        eventually(lambda: all(one_of(leases, name).died for name in (dead, reused, lease)))
        assert {one_of(leases, name).died for name in (dead, reused, lease)} == {keeper.DEATH}
        assert one_of(leases, alive).died is None
        assert one_of(leases, elsewhere).died is None
        assert living.poll() is None


def test_a_keeper_ends_once_no_worker_is_left(kept: Kept) -> None:
    mine(kept.slot, keeper.new_lease(), clock.boot() + 1000.0)
    kept.begin()
    kept.slots.close()
    time.sleep(0.5)
    assert kept._thread is not None
    assert kept._thread.is_alive()
    kept.slot.leave()
    kept._thread.join(60)
    assert not kept._thread.is_alive()
