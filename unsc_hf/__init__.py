"""Machine unlearning by null-space calibration (UNSC, IJCAI 2024, arXiv 2404.13588) for Hugging Face models."""

from .config import UNSCConfig
from .data.selection import Split, split_dataset
from .errors import UNSCError
from .evaluation.certificate import Certificate
from .nullspace.statistics import ActivationStatistics
from .nullspace.subspace import Subspace
from .trainer.sequence import serve_request
from .trainer.trainer import UNSCTrainer

__version__ = "0.1.0"
__all__ = [
    "ActivationStatistics",
    "Certificate",
    "Split",
    "Subspace",
    "UNSCConfig",
    "UNSCError",
    "UNSCTrainer",
    "__version__",
    "serve_request",
    "split_dataset",
]
