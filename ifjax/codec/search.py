"""Searches: which scales to try."""

import numpy as np


def _trials(search, fmt):
    """(whether relative to the block maximum's own scale byte, int32 bytes to try)."""
    if search == "exhaustive":
        return False, np.arange(1, fmt.scale.top + 1, dtype=np.int32)
    # Measured on normal data, blocks of 16: -3..+6 finds all that the exhaustive search does for IF4 and NVFP4, -2..+2
    # does not. Smaller scales clip the maximum, larger ones trade its error for the others'.
    return True, np.array([-3, -2, -1, 1, 2, 3, 4, 5, 6], np.int32)
