"""Machine unlearning by null-space calibration (UNSC, IJCAI 2024, arXiv 2404.13588) for Hugging Face models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .comparison.compare_methods import audit as audit
    from .comparison.compare_methods import compare as compare
    from .config import UNSCConfig as UNSCConfig
    from .data.selection import Split as Split
    from .data.selection import split_dataset as split_dataset
    from .errors import UNSCError as UNSCError
    from .evaluation.certificate import Certificate as Certificate
    from .nullspace.api import NullSpace as NullSpace
    from .nullspace.statistics import ActivationStatistics as ActivationStatistics
    from .nullspace.subspace import Subspace as Subspace
    from .runs.job import UnlearningResult as UnlearningResult
    from .runs.language_audit import audit_language_model as audit_language_model
    from .runs.language_evaluation import evaluate_language_model as evaluate_language_model
    from .runs.unlearn import unlearn as unlearn
    from .trainer.callbacks import NullSpaceCallback as NullSpaceCallback
    from .trainer.sequence import serve_request as serve_request
    from .trainer.trainer import UNSCTrainer as UNSCTrainer

__version__ = "0.2.0"

# Where each name lives. Modules are imported when a name is first asked for (PEP 562), so that `import unsc_hf` and
# `unsc --help` need no torch.
_MODULES = {
    "ActivationStatistics": "nullspace.statistics",
    "Certificate": "evaluation.certificate",
    "NullSpace": "nullspace.api",
    "NullSpaceCallback": "trainer.callbacks",
    "Split": "data.selection",
    "Subspace": "nullspace.subspace",
    "UNSCConfig": "config",
    "UNSCError": "errors",
    "UNSCTrainer": "trainer.trainer",
    "UnlearningResult": "runs.job",
    "audit": "comparison.compare_methods",
    "audit_language_model": "runs.language_audit",
    "compare": "comparison.compare_methods",
    "evaluate_language_model": "runs.language_evaluation",
    "serve_request": "trainer.sequence",
    "split_dataset": "data.selection",
    "unlearn": "runs.unlearn",
}
__all__ = [*_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
