"""Work as a user whom the modes of files hold back: root is not, unless it lays down two of its capabilities."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

_VERSION_3 = 0x20080522  # of the structures of capset(2)
_DAC_OVERRIDE, _DAC_READ_SEARCH = 1, 2


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@contextlib.contextmanager
def held_back_by_modes() -> Iterator[None]:
    """This thread, and those it starts meanwhile, may not open what a mode forbids its owner."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = _Header(_VERSION_3, 0), (_Data * 2)()

    def call(function: str) -> None:
        if getattr(libc, function)(ctypes.byref(header), data):
            raise OSError(ctypes.get_errno(), function)

    call("capget")
    before = data[0].effective
    data[0].effective &= ~(1 << _DAC_OVERRIDE | 1 << _DAC_READ_SEARCH)
    call("capset")
    try:
        yield
    finally:
        data[0].effective = before
        call("capset")


@contextlib.contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """Within this nobody without privileges may read the file, or enter the folder."""
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        with held_back_by_modes():
            assert not os.access(path, os.R_OK, effective_ids=True)
            yield
    finally:
        path.chmod(mode)
