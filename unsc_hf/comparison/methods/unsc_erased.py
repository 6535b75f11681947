"""UNSC, then what a linear probe reads of the features is erased in closed form.

The construction is LEACE's (Belrose et al., arXiv 2306.03819), in the layers that write the features.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ..workbench import Workbench
from .registry import method
from .unsc import SETTINGS


@method("UNSC, features erased", SETTINGS)
def unsc_erased(bench: Workbench, **settings: Any) -> PreTrainedModel:
    """UNSC, then erasure of every hidden state and of the head's input, at the default strength."""
    return bench.unlearn(feature_erasure="layers", **settings)
