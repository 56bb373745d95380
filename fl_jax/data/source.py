"""Records that are not yet dealt to sites."""

from typing import NamedTuple

import numpy as np


class Source(NamedTuple):
    """Records before they are dealt to sites: x [R, ...], y int32[R], and the names of classes and features."""

    name: str
    x: np.ndarray
    y: np.ndarray
    class_names: tuple[str, ...]
    feature_names: tuple[str, ...]
    notes: tuple[str, ...]
