"""Loggers whose lines hold no control characters, whatever a label, a uri or a file's name in them does."""

import logging
import re

# Those that would move the cursor, colour a terminal, begin another line, or show text in another order than it is
# written; a traceback keeps its lines.
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_CONTROLS_OF_LINES = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def plain_logger(name: str) -> logging.Logger:
    """The logger of this name, which writes control characters as escapes from now on."""
    logger = logging.getLogger(name)
    if not any(isinstance(known, _Plain) for known in logger.filters):
        logger.addFilter(_Plain())
    return logger


class _Plain(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = CONTROLS.sub(escaped, record.getMessage()), ()
        if record.exc_info and not record.exc_text:
            record.exc_text = _CONTROLS_OF_LINES.sub(escaped, logging.Formatter().formatException(record.exc_info))
        return True


def escaped(found: re.Match[str]) -> str:
    """A character that was found, as its number."""
    number = ord(found[0])
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"
