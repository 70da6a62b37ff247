"""Our own web pages: how a source does, its rows, one row, its failures. The same words as the commands."""

from nih_sched.pages.blueprint import PAGES, Place, make_blueprint

__all__ = ["PAGES", "Place", "make_blueprint"]
