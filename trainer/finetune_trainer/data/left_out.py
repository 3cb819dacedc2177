"""Rows of the spool that go no further, for what they say beside others: why, and in favour of which row."""

from enum import IntEnum

import numpy as np

LEFT_OUT = np.dtype([("why", "u1"), ("of", "<u8")])


class Why(IntEnum):
    """Why a row is left out; 0 stands for one that is not."""

    COPY = 1
    NEAR_COPY = 2
