"""The dashboard: our pages, and rq-dashboard at /rq, in an app of ours that lets in whom it should and no script."""

from nih_sched.access import Access
from nih_sched.web.app import Pages, make_app
from nih_sched.web.serving import serve

__all__ = ["Access", "Pages", "make_app", "serve"]
