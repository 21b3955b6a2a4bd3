"""``chanaxes report``: a page of what one run, or several of the same network, have shown."""

from chanaxes_pl.report.command import report

__all__ = ["report"]
