"""Checks of Redis. It only carries: what is lost there is sent again, so little of this is a problem."""

from __future__ import annotations

from typing import Any

from nih_sched.doctor.finding import Finding, Visit

OLDEST = (5, 0)
FULL = 0.9  # of maxmemory


def version(visit: Visit) -> list[Finding]:
    """A server older than RQ's oldest."""
    facts = _facts(visit)
    found = str(facts.get("redis_version", ""))
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdecimal())
    if not numbers or numbers >= OLDEST:
        return []
    return [
        Finding(
            "old-redis",
            f"Redis is version {found}; RQ needs {'.'.join(map(str, OLDEST))} or newer",
            "Workers may fail to fetch jobs.",
            "Upgrade Redis, or use Valkey.",
        )
    ]


def memory(visit: Visit) -> list[Finding]:
    """A server that drops keys, or soon refuses new ones."""
    facts = _facts(visit)
    most, policy = int(facts.get("maxmemory", 0)), str(facts.get("maxmemory_policy", "noeviction"))
    found = []
    if most and policy != "noeviction":
        found.append(
            Finding(
                "redis-evicts",
                f"Redis drops keys when its memory is full: maxmemory-policy is {policy}",
                "Jobs of claimed rows would vanish. They are sent again, some seconds later each time.",
                "redis-cli CONFIG SET maxmemory-policy noeviction",
                is_problem=False,
            )
        )
    used = int(facts.get("used_memory", 0))
    if most and used > FULL * most:
        found.append(
            Finding(
                "redis-full",
                f"Redis uses {used / 2**20:.0f} MB of its {most / 2**20:.0f} MB",
                "Once it is full, it refuses jobs, and nothing is claimed.",
                "Raise maxmemory, or look for what else fills it: redis-cli --bigkeys",
            )
        )
    return found


def persistence(visit: Visit) -> list[Finding]:
    """A server that refuses writes since it could not save; none of our data needs to be saved."""
    facts = _facts(visit)
    ills = [name for name in ("rdb_last_bgsave_status", "aof_last_write_status") if facts.get(name, "ok") != "ok"]
    if not ills:
        return []
    return [
        Finding(
            "redis-cant-save",
            f"Redis could not save its data: {', '.join(ills)} is not ok",
            "It refuses all writes then, and nothing is claimed. Nothing of ours needs saving: the table is the truth.",
            "Free disk space; or, if Redis is ours alone: redis-cli CONFIG SET save '' appendonly no",
        )
    ]


def _facts(visit: Visit) -> dict[str, Any]:
    if visit.redis is None:
        return {}
    from nih_sched import redis_client  # noqa: PLC0415 - slow to import; who has a connection has done so

    return redis_client.server_facts(visit.redis)
