"""Adding or removing a public name is a visible decision: `tests/public_surface.txt` lists them all."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

SURFACE = Path(__file__).with_name("public_surface.txt")
UPDATE = "python -m pytest tests/test_public_surface.py --update-surface"


def public_names(module: ModuleType) -> set[str]:
    """Names that a module offers, as `module:name`: its `__all__`, and what is in a module that stands there itself (`pfa`)."""
    offered = set()
    for name in getattr(module, "__all__", ()):
        offered.add(f"{module.__name__}:{name}")
        value = getattr(module, name)
        if isinstance(value, ModuleType):
            inside = {
                n for n, v in vars(value).items() if not n.startswith("_") and getattr(v, "__module__", "") == value.__name__
            }
            offered |= {f"{value.__name__}:{n}" for n in getattr(value, "__all__", inside)}
    return offered


def test_public_surface_is_as_decided(module_names, request):
    surface = sorted(set().union(*(public_names(import_module(name)) for name in module_names)))
    if request.config.getoption("--update-surface"):
        SURFACE.write_text("\n".join(surface) + "\n", encoding="utf-8")
    decided = SURFACE.read_text(encoding="utf-8").splitlines()
    added, removed = sorted(set(surface) - set(decided)), sorted(set(decided) - set(surface))
    way_out = f"If that is meant, run `{UPDATE}` and add a line to CHANGELOG.md."
    assert not added + removed, f"Public names added: {added}; removed: {removed}. {way_out}"
    assert decided == surface, f"The list is not sorted, or repeats a name. Write it anew: {UPDATE}"
    assert "lit_compress:Recipe" in surface


def test_public_names_reach_into_modules_that_stand_in_all():
    package = ModuleType("package")
    package.pfa = ModuleType("package.pfa")
    package.__all__ = ["pfa"]
    exec("from math import sqrt\ndef spectrum(): ...\ndef _helper(): ...", vars(package.pfa))
    assert public_names(package) == {"package:pfa", "package.pfa:spectrum"}
