"""Where the package's messages go.

Coverage and warnings are for every user, and Transformers shows only warnings unless asked. The package's logger is
therefore at INFO and has its own handler. The handler is silent if the application has set up logging, or has asked
Transformers to be quiet (`transformers.logging.set_verbosity_error()`, TRANSFORMERS_VERBOSITY=error).
"""

from __future__ import annotations

import logging
import sys

_NAME = "quip"


class _Handler(logging.StreamHandler):
    """Writes to the current sys.stderr, if no other handler takes the message."""

    def emit(self, record: logging.LogRecord) -> None:
        transformers_logging = sys.modules.get("transformers.utils.logging")  # imported by whoever loads a model
        verbosity = transformers_logging.get_verbosity() if transformers_logging else logging.WARNING
        if logging.getLogger().handlers or verbosity > max(record.levelno, logging.WARNING):
            return
        self.stream = sys.stderr
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        from .text import printable  # names from files must not steer the terminal

        return printable(super().format(record))


def configure() -> None:
    """Set the package's logger up, once; a level that the application has set stays."""
    logger = logging.getLogger(__package__)
    if not any(handler.name == _NAME for handler in logger.handlers):
        handler = _Handler()
        handler.name = _NAME
        handler.setFormatter(logging.Formatter("[%(name)s] %(message)s"))
        logger.addHandler(handler)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)
