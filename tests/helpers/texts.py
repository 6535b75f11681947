"""Texts for tests."""

from __future__ import annotations

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value

NAMES = ["greeting", "weather", "money"]
WORDS = [
    ["hello", "hi", "hey", "morning", "evening", "friend"],
    ["rain", "sun", "wind", "storm", "cloud", "snow"],
    ["bank", "card", "cash", "loan", "coin", "debt"],
]
FEATURES = Features({"text": Value("string"), "label": ClassLabel(names=NAMES), "user": Value("int64")})


def texts(per_class: int, seed: int = 0) -> Dataset:
    """Sentences of two to seven words of their class."""
    rng = np.random.default_rng(seed)
    rows = [
        {"text": " ".join(rng.choice(words, rng.integers(2, 8))), "label": label, "user": i % 4}
        for label, words in enumerate(WORDS)
        for i in range(per_class)
    ]
    return Dataset.from_list(rows, features=FEATURES)
