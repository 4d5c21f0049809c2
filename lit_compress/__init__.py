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
    from lit_compress.checkpoint import load_pruned, shrink_checkpoint
    from lit_compress.latency import Stopwatch
    from lit_compress.layers.linear_substitution import substitute_linear
    from lit_compress.layers.substitution import Substitution, substitute_blocks, substitutions_of
    from lit_compress.plan import Plan
    from lit_compress.recipe import Recipe
    from lit_compress.report import CostTable, cost_table, count_mult_adds, count_parameters
    from lit_compress.surgery import cut

__version__ = "0.1.0"

# Public name -> module that holds it. Loaded on first use, so that `import lit_compress` needs no torch.
_HOMES = {
    "Analysis": "lit_compress.analysis",
    "CostTable": "lit_compress.report",
    "Plan": "lit_compress.plan",
    "Recipe": "lit_compress.recipe",
    "Stopwatch": "lit_compress.latency",
    "Substitution": "lit_compress.layers.substitution",
    "analyze": "lit_compress.analysis",
    "cost_table": "lit_compress.report",
    "count_mult_adds": "lit_compress.report",
    "count_parameters": "lit_compress.report",
    "cut": "lit_compress.surgery",
    "load_pruned": "lit_compress.checkpoint",
    "shrink_checkpoint": "lit_compress.checkpoint",
    "substitute_blocks": "lit_compress.layers.substitution",
    "substitute_linear": "lit_compress.layers.linear_substitution",
    "substitutions_of": "lit_compress.layers.substitution",
}

__all__ = [
    "Analysis",
    "CostTable",
    "Plan",
    "Recipe",
    "Stopwatch",
    "Substitution",
    "analyze",
    "cost_table",
    "count_mult_adds",
    "count_parameters",
    "cut",
    "load_pruned",
    "shrink_checkpoint",
    "substitute_blocks",
    "substitute_linear",
    "substitutions_of",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lit_compress' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
