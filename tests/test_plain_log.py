"""Names that hold control characters reach no log as they are."""

import io
import logging

import pytest

from pipeline.plain_log import plain_logger


def lines_of(write: str, *, traceback: bool = False) -> str:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = plain_logger("tests.plain")
    logger.addHandler(handler)
    try:
        if traceback:
            try:
                raise ValueError(write)
            except ValueError:
                logger.exception("request %s failed", write)
        else:
            logger.warning("%s is there", write)
    finally:
        logger.removeHandler(handler)
    return stream.getvalue()


@pytest.mark.parametrize(
    "name", ["\x1b]0;PWNED\x07", "\x1b[2J", "a\nb", "a\rb", "\x9b31m", "\u202etxt", "\x00", "\x7f"]
)
def test_a_line_stays_one_line_of_plain_text(name: str) -> None:
    said = lines_of(name)
    assert said.count("\n") == 1
    assert said.rstrip("\n").isprintable()
    assert plain_logger("tests.plain").filters == logging.getLogger("tests.plain").filters


def test_a_traceback_keeps_its_lines_and_nothing_else() -> None:
    said = lines_of("\x1b[31m", traceback=True)
    assert "Traceback" in said
    assert "ValueError: \\x1b[31m" in said
    assert all(line.isprintable() for line in said.splitlines())
