"""Make networks smaller inside a running PyTorch Lightning Trainer."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Installed, `callbacks/`, `datamodules/` and `configs/` lie in this folder. In a checkout, they lie beside it.
_FOLDER = Path(__file__).resolve().parent
if not (_FOLDER / "callbacks" / "__init__.py").exists():
    __path__.append(str(_FOLDER.parent))

if TYPE_CHECKING:
    from lit_compress.analysis import Analysis, analyze
    from lit_compress.checkpoint import load_pruned
    from lit_compress.initialisation import reinitialize
    from lit_compress.plan import Plan
    from lit_compress.recipe import Recipe
    from lit_compress.report import count_mult_adds, count_parameters
    from lit_compress.surgery import cut

__version__ = "0.1.0"

# Public name -> module that holds it. Loaded on first use, so that `import lit_compress` needs no torch.
_HOMES = {
    "Analysis": "lit_compress.analysis",
    "Plan": "lit_compress.plan",
    "Recipe": "lit_compress.recipe",
    "analyze": "lit_compress.analysis",
    "count_mult_adds": "lit_compress.report",
    "count_parameters": "lit_compress.report",
    "cut": "lit_compress.surgery",
    "load_pruned": "lit_compress.checkpoint",
    "reinitialize": "lit_compress.initialisation",
}

__all__ = ["Analysis", "Plan", "Recipe", "analyze", "count_mult_adds", "count_parameters", "cut", "load_pruned", "reinitialize"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lit_compress' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
