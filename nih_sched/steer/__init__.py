"""What a person does to a source and its rows: pause, resume, requeue, cancel. Commands and web call the same."""

from nih_sched.steer.pausing import pause, resume
from nih_sched.steer.rows import Result, cancel, requeue
from nih_sched.store.steering import ENDED, UNENDED

__all__ = ["ENDED", "UNENDED", "Result", "cancel", "pause", "requeue", "resume"]
