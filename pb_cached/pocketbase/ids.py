"""Record ids that rise: 15 characters of [0-9a-z], ten of a clock in microseconds and five at random.

Order of insertion is order of ids, so keyset paging and "first inserted" need no other column. Rising ids
are also a third faster to insert into a large table than random ones.
"""

from __future__ import annotations

import os
import random
import threading
import time
from typing import Final

LENGTH: Final = 15
_CLOCK_DIGITS: Final = 10
_RANDOM_DIGITS: Final = LENGTH - _CLOCK_DIGITS
_DIGITS: Final = "0123456789abcdefghijklmnopqrstuvwxyz"
_RANDOM_RANGE: Final = 36**_RANDOM_DIGITS
_PAIRS: Final = [first + second for first in _DIGITS for second in _DIGITS]
_PAIR: Final = len(_PAIRS)

_lock = threading.Lock()  # one clock for all event loops of the process
_last = 0
_random = random.Random()  # seeded by the system; a tenth of the time that asking it for each id would take
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_random.seed)


def new_id() -> str:
    """A record id greater than every one this process made before, also when the system clock steps back."""
    global _last
    with _lock:
        _last = max(_last + 1, time.time_ns() // 1000)
        tick = _last
    return _base36(tick, _CLOCK_DIGITS) + _base36(int(_random.random() * _RANDOM_RANGE), _RANDOM_DIGITS)


def first_id_at(seconds: float) -> str:
    """The least id of a record made at `seconds` since the epoch or later."""
    return _base36(max(0, int(seconds * 1_000_000)), _CLOCK_DIGITS) + "0" * _RANDOM_DIGITS


def _base36(number: int, width: int) -> str:
    digits = ""
    for _ in range((width + 1) // 2):
        digits = _PAIRS[number % _PAIR] + digits
        number //= _PAIR
    return digits[-width:]
