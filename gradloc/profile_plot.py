"""A GradientProfile as a heatmap: layers against probe kinds, a panel for each reference.

Colour is a layer's ratio against the mean over layers, so that the pattern shows whatever the ratios' level; what is
red in a "mean" column is what the mean threshold chooses. Only draws; where cells lie is in `profile_layout`.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gradloc.files import replacing
from gradloc.profile_layout import Panel, Section, panel_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gradloc.profile import GradientProfile

_LOSSES = {
    "all": "reference: loss on all tokens",
    "matched-spans": "reference: loss on spans as long as the probes'",
}
_INK = "#222222"
_FAINT = "#777777"
_TICKS = (1 / 16, 1 / 8, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 4, 8, 16)
# Inches.
_TOP, _BOTTOM, _LEFT, _RIGHT = 0.95, 0.55, 0.75, 1.25
_GROUP_GAP, _SECTION_GAP, _PANEL_GAP = 0.12, 0.28, 0.45
_TITLE, _LABEL = 0.26, 0.2
