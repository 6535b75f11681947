"""What a job does at the moment: a log record for each phase, which the command line shows as a line of its own."""

from __future__ import annotations

import logging

PHASES = logging.getLogger("unsc_hf.phase")


def phase(title: str) -> None:
    """Say that a phase begins; the one before it has ended."""
    PHASES.info(title)
