"""A page to try a finished run on: answers of its models side by side, its report, and an attack.

It needs the extra `unsc_hf[app]`.
"""

from .opening import OpenedRun, open_run
from .page import build, load_gradio, serve

__all__ = ["OpenedRun", "build", "load_gradio", "open_run", "serve"]
