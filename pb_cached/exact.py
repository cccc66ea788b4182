"""JSON as bytes that come back as what they were: integers of any size, and strings that UTF-8 cannot hold."""

from __future__ import annotations

import json
from typing import Any, Final

import msgspec

Json = Any
"""A JSON value as Python has it: dict, list, str, int, float, bool, None."""

_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder().decode


def dumps(value: Json) -> bytes:
    """JSON as bytes. Lone surrogates, which UTF-8 cannot hold, are written as escapes."""
    try:
        return _encode(value)
    except UnicodeEncodeError:
        return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


def loads(text: str | bytes) -> Json:
    """JSON that `dumps` wrote, or that a foreign hand did."""
    try:
        return _decode(text)
    except msgspec.DecodeError:
        return json.loads(text)  # lone surrogates


def copied(value: Json) -> Json:
    """A copy that shares nothing with the value.

    Raises:
        ValueError: not all of it is JSON, or it is nested too deeply.
    """
    try:
        copy = loads(dumps(value))
        if copy == value:  # what came back is what went in, so all of it was JSON
            return copy
    except (TypeError, RecursionError, msgspec.MsgspecError) as error:
        raise ValueError("no JSON") from error
    raise ValueError("no JSON")
