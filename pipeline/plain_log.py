"""Loggers that write no control characters, even if a label, a uri or a file name in a line has some."""

import logging
import re

# Characters that move the cursor, colour a terminal, begin a new line, or change the order in which text is shown. In
# tracebacks line breaks are allowed.
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_CONTROLS_OF_LINES = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def plain_logger(name: str) -> logging.Logger:
    """The logger of this name. From now on it writes control characters as escapes."""
    logger = logging.getLogger(name)
    if not any(isinstance(known, _Plain) for known in logger.filters):
        logger.addFilter(_Plain())
    return logger


class _Plain(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = CONTROLS.sub(escape_controls, record.getMessage()), ()
        if record.exc_info and not record.exc_text:
            record.exc_text = _CONTROLS_OF_LINES.sub(
                escape_controls, logging.Formatter().formatException(record.exc_info)
            )
        return True


def escape_controls(found: re.Match[str]) -> str:
    """The escape of a matched character, with its number in hexadecimal."""
    number = ord(found[0])
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"
