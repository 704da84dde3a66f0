"""What the package declares and the README promises is what the tree holds."""

import ast
import configparser
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

from vlmjax.config import check_overrides

ROOT = Path(__file__).resolve().parents[1]
README = re.sub(r"<!--.*?-->", "", (ROOT / "README.md").read_text())


def imported_packages() -> set[str]:
    """Top-level names that vlmjax imports, inside functions too; not its own or Python's."""
    names = set()
    for path in (ROOT / "vlmjax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"vlmjax"}


def test_dependencies_are_those_imported():
    setup = configparser.RawConfigParser()
    setup.read(ROOT / "setup.cfg")
    declared = _names(setup["options"]["install_requires"])
    extras = {extra: _names(lines) for extra, lines in setup["options.extras_require"].items()}
    known = packages_distributions()
    used = {known.get(name, [name])[0].lower().replace("_", "-") for name in imported_packages()}
    assert used - declared == extras["video"] | extras["beam"] | extras["kornia"]
    assert declared <= used


def _names(lines: str) -> set[str]:
    """Distributions in a block of requirements."""
    found = (re.match(r"[\w-]+", line.strip()) for line in lines.splitlines())
    return {name[0].lower().replace("_", "-") for name in found if name}


def test_readme_names_what_exists():
    for path in re.findall(r"[\w./-]*(?:configs|colabs|benchmarks|docs|launch|tests)/[\w./-]+\.\w+", README):
        assert (ROOT / path).is_file(), path
    for name in re.findall(r"python -m (vlmjax[\w.]*)", README):
        module = ROOT / name.replace(".", "/")
        assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), name
    check_overrides(re.findall(r"--config\.\S+", README))


def test_readme_lists_every_recipe():
    listed = set(re.findall(r"^\| (.+?) \|", README, flags=re.M))
    named = {name for cell in listed for name in re.findall(r"`(\w+)\.py`", cell)}
    assert named == {path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__"}
