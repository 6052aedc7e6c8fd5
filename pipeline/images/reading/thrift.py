"""A reader of Thrift's compact protocol, as far as Parquet's footers and page headers use it.

A struct is a dict by field number. The bytes are not trusted: lengths must fit them, and structs may be nested no
deeper than MAX_DEPTH.
"""

import struct
from typing import Any

Struct = dict[int, Any]

MAX_DEPTH = 12  # Parquet needs 7

_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 11, 12
_INTEGERS = {4, 5, 6}


class Broken(Exception):
    """The bytes end within the struct, or are not a struct."""


class CutOff(Broken):
    """The bytes end within a possible struct."""


def read_struct(data: bytes) -> tuple[Struct, int]:
    """The struct at the beginning of some bytes, and its length. Raises Broken.

    Values are integers, booleans, bytes, lists and structs, by field. A double stays bytes.
    """
    reader = _Reader(data)
    try:
        found = reader.struct(0)
    except IndexError as error:
        raise CutOff from error
    except struct.error as error:
        raise Broken from error
    return found, reader.at


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def struct(self, depth: int) -> Struct:
        if depth > MAX_DEPTH:
            raise Broken
        found: Struct = {}
        number = 0
        data = self._data
        while True:
            head = data[self.at]
            self.at += 1
            if not head:
                return found
            number = number + (head >> 4) if head >> 4 else self._integer()
            kind = head & 15
            if kind in (_TRUE, _FALSE):
                found[number] = kind == _TRUE
            else:
                found[number] = self._value(kind, depth)

    def _value(self, kind: int, depth: int) -> Any:
        if kind in _INTEGERS:
            return self._integer()
        if kind == _BINARY:
            return self._bytes(self._unsigned())
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind in (_LIST, _SET):
            return self._list(depth)
        if kind == _BYTE:
            return self._bytes(1)[0]
        if kind == _DOUBLE:
            return self._bytes(8)
        raise Broken  # maps, which Parquet does not use

    def _list(self, depth: int) -> list:
        head = self._bytes(1)[0]
        size, kind = head >> 4, head & 15
        if size == 15:
            size = self._unsigned()
        if size > len(self._data) - self.at:  # each value takes at least a byte
            raise CutOff
        if kind in (_TRUE, _FALSE):
            return [byte == _TRUE for byte in self._bytes(size)]
        return [self._value(kind, depth + 1) for _ in range(size)]

    def _bytes(self, size: int) -> bytes:
        end = self.at + size
        if end > len(self._data):
            raise CutOff
        found = self._data[self.at : end]
        self.at = end
        return found

    def _integer(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)

    def _unsigned(self) -> int:
        found = shift = 0
        data, at = self._data, self.at
        while True:
            byte = data[at]
            at += 1
            found |= (byte & 0x7F) << shift
            if byte < 0x80:
                self.at = at
                return found
            shift += 7
            if shift > 63:
                raise Broken
