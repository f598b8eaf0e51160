"""Whether draws come from a distribution."""

import numpy as np
from scipy import stats


def p_value(seen, chances) -> float:
    """Chi-square of counts against chances in any unit; cells of fewer than 5 draws are taken as one."""
    seen, chances = np.asarray(seen, np.float64), np.asarray(chances, np.float64)
    wanted = chances / chances.sum() * seen.sum()
    rare = wanted < 5
    pooled = [np.array([*x[~rare], x[rare].sum()]) for x in (seen, wanted)]
    there = pooled[1] > 0
    assert pooled[0][~there].sum() == 0, "draws of what has no chance"
    return stats.chisquare(*(x[there] for x in pooled)).pvalue
