"""The table: every loss with its options and inputs. Tests and bench both walk it, so a loss that stands here is
tested, compiled, built for GPUs and timed.

A draw makes a loss's tensors, the differentiated ones first. An option whose value is a function is drawn too: it is
called with the input, or with something of the shape of a head's logits.
"""

from reference.cases import (
    binary,
    categorical,
    classification,
    contrastive,
    divergence,
    language,
    margin,
    metric,
    regression,
    segmentation,
    sequence,
)
from reference.cases.case import Case as Case

THEMES = (
    *(regression, binary, classification, margin, categorical, divergence, language, metric, contrastive),
    *(segmentation, sequence),
)
CASES = [case for theme in THEMES for case in theme.CASES]
