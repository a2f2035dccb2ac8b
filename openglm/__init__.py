"""OpenGLM: the GLM language models in one package. Importing it does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["load", "__version__"]

if TYPE_CHECKING:
    from openglm.chat import load


def __getattr__(name: str) -> Any:
    if name == "load":
        from openglm.chat import load

        return load
    raise AttributeError(f"module 'openglm' has no attribute {name!r}")
