"""The package is the same thing in a checkout, installed from a wheel, and installed editable."""

import ast
import json
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

import lit_compress

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAPPED = ("callbacks", "configs", "datamodules")  # top-level folders that are installed inside the package
SHIPPED = ("lit_compress", *MAPPED)


def shipped_files(root: Path = ROOT) -> list[Path]:
    """Every file that a wheel must hold, relative to the checkout."""
    files = (file for folder in SHIPPED for file in (root / folder).rglob("*"))
    return sorted(
        f.relative_to(root) for f in files if f.is_file() and "__pycache__" not in f.parts and not f.name.startswith(".")
    )


def installed(path: Path) -> Path:
    """Where a path of the checkout lies once installed."""
    return path if path.parts[0] == "lit_compress" else Path("lit_compress", path)


def module_name(path: Path) -> str:
    parts = installed(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def run(*command: str | Path, cwd: Path, path: Iterable[Path] = ()) -> str:
    """Standard output of a command that sees this environment, and in front of it the folders in `path`."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1", "NO_COLOR": "1"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} exits {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def places(python: str | Path, modules: Sequence[str], *, cwd: Path, path: Iterable[Path] = ()) -> dict[str, Path]:
    """The file of each module, as imported by a fresh interpreter started in `cwd`."""
    code = """
import importlib, json, sys
sys.path.insert(0, "")  # `python -c` has it already unless PYTHONSAFEPATH is set
print(json.dumps({name: importlib.import_module(name).__file__ for name in json.loads(sys.argv[1])}))
"""
    found = json.loads(run(python, "-c", code, json.dumps(modules), cwd=cwd, path=path))
    return {name: Path(file) for name, file in found.items()}


def copy_of_checkout(to: Path) -> Path:
    """What a build reads, copied, since a build leaves `build/` and `*.egg-info` where it runs."""
    to.mkdir()
    for folder in SHIPPED:
        shutil.copytree(ROOT / folder, to / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, to / file)
    return to


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from this checkout without network."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = copy_of_checkout(folder / "checkout")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, cwd=copy)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def target(wheel, tmp_path_factory):
    """A folder into which the wheel is installed."""
    folder = tmp_path_factory.mktemp("installed")
    options = ("--quiet", "--no-deps", "--no-index", "--no-compile")
    run(sys.executable, "-m", "pip", "install", *options, "--target", folder, wheel, cwd=folder)
    return folder


def test_package_list_equals_the_folders():
    """setuptools installs only what is listed; a forgotten folder would be missing from the wheel, and only there."""
    folders = {installed(file).parent for file in shipped_files() if file.suffix in (".py", ".yaml")}
    assert sorted(SETTINGS["tool"]["setuptools"]["packages"]) == sorted(".".join(folder.parts) for folder in folders)


def test_mapped_folders_are_installed_inside_the_package():
    assert SETTINGS["tool"]["setuptools"]["package-dir"] == {f"lit_compress.{folder}": folder for folder in MAPPED}


def test_wheel_holds_every_file_of_the_checkout(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [Path(name) for name in archive.namelist() if ".dist-info/" not in name]
    assert sorted(names) == sorted(installed(file) for file in shipped_files())
    assert {"callbacks", "configs", "datamodules"} <= {name.parts[1] for name in names}


def test_wheel_says_its_version_licence_and_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        read = {Path(name).name: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name}
    assert f"\nVersion: {lit_compress.__version__}\n" in read["METADATA"]
    assert "\nLicense-Expression: Apache-2.0\n" in read["METADATA"]
    assert read["LICENSE"] == (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "lit-compress = lit_compress.cli:main" in read["entry_points.txt"]


def test_wheel_imports_from_anywhere(target, tmp_path):
    """Every module is imported, and from the folder of the installation alone."""
    files = {module_name(file): target / installed(file) for file in shipped_files() if file.suffix == ".py"}
    assert len(files) > len(SHIPPED)
    assert places(sys.executable, sorted(files), cwd=tmp_path, path=[target]) == files


def test_wheel_offers_its_configs(target, tmp_path):
    code = (
        "from importlib.resources import files\n"
        "def names(folder, before=''):\n"
        "    for found in folder.iterdir():\n"
        "        yield from [before + found.name] if found.is_file() else names(found, f'{before}{found.name}/')\n"
        "print(*sorted(names(files('lit_compress.configs'))))"
    )
    configs = ROOT / "configs"
    names = run(sys.executable, "-c", code, cwd=tmp_path, path=[target]).split()
    assert names == sorted(file.relative_to(configs).as_posix() for file in configs.rglob("*.yaml"))


def test_installed_command_answers_from_anywhere(target, tmp_path):
    assert "analyze" in run(target / "bin" / "lit-compress", "--help", cwd=tmp_path, path=[target])


def test_checkout_is_whole_even_beside_an_installation(target):
    """From the root, the checkout's `lit_compress/` hides the installed one; its callbacks must not come from there."""
    code = (
        "import sys; from importlib.util import find_spec; print(*(find_spec(name).origin for name in sys.argv[1:]), sep='\\n')"
    )
    expected = {
        "lit_compress": ROOT / "lit_compress",
        "lit_compress.callbacks": ROOT / "callbacks",
        "lit_compress.datamodules": ROOT / "datamodules",
        "lit_compress.selection": ROOT / "lit_compress" / "selection",
    }
    found = run(sys.executable, "-c", code, *expected, cwd=ROOT, path=[ROOT, target]).splitlines()
    assert [Path(origin).parent for origin in found] == list(expected.values())


def test_help_from_the_root_does_not_wait_for_torch():
    code = "import runpy, sys; sys.argv = ['lit-compress', '--help']; runpy.run_module('lit_compress', run_name='__main__')"
    watched = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {code}"
    *help_text, torch_imported = run(sys.executable, "-c", watched, cwd=ROOT, path=[ROOT]).splitlines()
    assert "analyze" in "\n".join(help_text)
    assert torch_imported == "False"
    assert run(sys.executable, "-m", "lit_compress", "--help", cwd=ROOT).splitlines() == help_text


def test_import_needs_only_the_standard_library():
    code = """
import sys
before = set(sys.modules)
import lit_compress
assert "Recipe" in dir(lit_compress)
print(*{name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))
"""
    assert run(sys.executable, "-c", code, cwd=ROOT, path=[ROOT]).split() == ["lit_compress"]


def test_lazy_names_agree_with_what_type_checkers_see():
    """The names stand three times in `__init__`: for type checkers, for `__getattr__`, and in `__all__`."""
    tree = ast.parse(Path(lit_compress.__file__).read_text(encoding="utf-8"))
    (typing_only,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {alias.name: statement.module for statement in typing_only.body for alias in statement.names}
    assert seen == lit_compress._HOMES
    assert sorted(seen) == sorted(lit_compress.__all__)
    for name, home in seen.items():
        assert getattr(lit_compress, name) is getattr(sys.modules[home], name)
    with pytest.raises(AttributeError, match="'lit_compress' has no attribute 'Recipes'"):
        _ = lit_compress.Recipes


def ruff_codes(code: str, filename: str) -> list[str]:
    """The rules that a file of that name and content would break."""
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "json", "--stdin-filename", filename, "-"]
    done = subprocess.run(command, cwd=ROOT, input=code, capture_output=True, text=True, check=False)
    return sorted({message["code"] for message in json.loads(done.stdout)})


def test_ruff_refuses_imports_that_would_double_a_class():
    start = '"""Example."""\n\n'
    end = '\n\n__all__ = ["PFAPruning"]\n'
    good = f"{start}import torch\n\nfrom lit_compress.callbacks.pfa import PFAPruning{end}print(torch)\n"
    assert ruff_codes(good, "callbacks/example.py") == []
    assert ruff_codes(f"{start}from callbacks.pfa import PFAPruning{end}", "callbacks/example.py") == ["TID251"]
    assert ruff_codes(f"{start}from datamodules import PFAPruning{end}", "tests/example.py") == ["TID251"]
    assert ruff_codes(f"{start}from .pfa import PFAPruning{end}", "callbacks/example.py") == ["TID251", "TID252"]
    assert ruff_codes(f"{start}from ..recipe import PFAPruning{end}", "lit_compress/models/example.py") == ["TID252"]
    # Our package is sorted after the libraries, in a block of its own.
    assert ruff_codes(good.replace("import torch\n\n", "import torch\n"), "callbacks/example.py") == ["I001"]


@pytest.mark.parametrize("folder", ["callbacks", "datamodules"])
def test_type_checkers_find_the_top_level_folders(folder):
    assert (ROOT / "typings" / "lit_compress" / folder).resolve() == ROOT / folder


def test_mypy_checks_the_top_level_folders_under_their_installed_names(tmp_path):
    """The project's settings on a package of the same layout that needs no torch."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "typings", tmp_path / "typings", symlinks=True)
    for file, code in {
        "lit_compress/__init__.py": "",
        "callbacks/__init__.py": "from lit_compress.callbacks.pfa import PFA\n\n__all__ = ['PFA']\n",
        "callbacks/pfa.py": "class PFA:\n    energy: float = 'high'\n",
        "datamodules/__init__.py": "from lit_compress.callbacks import PFA\n\nenergy: str = PFA().energy\n",
        "lit_compress/models/__init__.py": "from lit_compress.callbacks.pfa import PFA\n\nprune: PFA = 1\n",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(code)
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--cache-dir", os.devnull]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert sorted(line.partition(": error: ")[0] for line in done.stdout.splitlines()) == [
        "lit_compress/models/__init__.py:3",
        "typings/lit_compress/callbacks/pfa.py:2",
        "typings/lit_compress/datamodules/__init__.py:3",
    ], done.stdout + done.stderr


def test_ci_runs_the_commands_of_the_readme():
    """Extracted here a second time, by hand."""
    expected = []
    for name in ("demo", "test"):
        _, found, rest = (ROOT / "README.md").read_text(encoding="utf-8").partition(f"<!-- command: {name} -->\n```bash\n")
        assert found, f"README.md has no bash block right under the line `<!-- command: {name} -->`."
        expected.append(rest.partition("\n```")[0])
        assert "${VENV:-.venv}" in expected[-1]
    assert run(ROOT / ".ci" / "run", "--show", cwd=Path("/")) == "\n".join(expected) + "\n"
    assert (ROOT / ".ci" / "run").stat().st_mode & stat.S_IXUSR


@pytest.mark.long
@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_editable_installation_is_the_checkout(mode, tmp_path):
    """From the root and from elsewhere, with an environment that borrows this one's libraries."""
    copy = copy_of_checkout(tmp_path / "checkout")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    purelib = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    libraries = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (purelib / "borrowed.pth").write_text("\n".join(libraries) + "\n")
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
    run(python, "-m", "pip", "install", *options, "--config-settings", f"editable_mode={mode}", "-e", copy, cwd=tmp_path)

    files = {module_name(file): copy / file for file in shipped_files(copy) if file.suffix == ".py"}
    for cwd in (tmp_path, copy):
        found = places(python, sorted(files), cwd=cwd)
        assert {name: file.resolve() for name, file in found.items()} == files
    assert "analyze" in run(python.with_name("lit-compress"), "--help", cwd=tmp_path)
    assert "analyze" in run(python, "-m", "lit_compress", "--help", cwd=copy)
