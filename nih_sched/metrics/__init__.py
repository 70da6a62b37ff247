"""What happened, counted in every process of ours, added up in the database, and told to Prometheus."""

from nih_sched.metrics.counting import Counting, adding_up, count_here
from nih_sched.metrics.reach import check, is_loopback

__all__ = ["Counting", "adding_up", "check", "count_here", "is_loopback"]
