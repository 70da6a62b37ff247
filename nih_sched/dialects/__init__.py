"""What differs between databases: how to connect, lock, compare, insert claims, tell time and read errors."""

from nih_sched.dialects.base import Dialect
from nih_sched.dialects.connect import address, connect, dialect_of
from nih_sched.dialects.times import After, Between, Now

__all__ = ["After", "Between", "Dialect", "Now", "address", "connect", "dialect_of"]
