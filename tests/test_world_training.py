"""The training of the world's models: where the codec starts, what resumes, what files hold."""

from __future__ import annotations

import numpy
import pytest

from training.world import styles


@pytest.mark.parametrize("style", styles.FILTERS)
def test_no_style_repeats_with_the_autoencoders_cells(style):
    """Equal cells can only be decoded to an even area, so a style's own pattern has another period than 8 px."""
    flat = numpy.full((64, 64, 3), 90, numpy.uint8)
    inner = styles.apply(flat, style)[8:56, 8:56].astype(int)
    even = numpy.ptp(inner, axis=(0, 1)).max() <= 2
    assert even or numpy.abs(inner[8:] - inner[:-8]).max() > 2 or numpy.abs(inner[:, 8:] - inner[:, :-8]).max() > 2
