"""Data flows one way: a module imports only from its own chapter and those above it."""

import ast
from pathlib import Path
from typing import get_args

import pytest

from chanaxes_pl.analysis.scores import SCORES, Family
from chanaxes_pl.compensation.layerwise import RIDGE, Compensation
from chanaxes_pl.lesions.interventions import OPERATIONS, Operation
from chanaxes_pl.lesions.replacements import REPLACEMENTS, Rebuilding
from chanaxes_pl.pruning.allocation import ALLOCATIONS, Allocation
from chanaxes_pl.pruning.baselines import WEIGHT_SCORES, WeightScore
from chanaxes_pl.pruning.feature_maps import MAP_IMAGES, MAP_SCORES, MapScore
from chanaxes_pl.pruning.pruner import COSTS, BudgetOf

PACKAGE = Path(__file__).parents[1] / "chanaxes_pl"
#: From the first to the last; a chapter may import from those before it, and its files from each other.
CHAPTERS = [
    "core",
    "network",
    "units",
    "models",
    "data",
    "run_folder",
    "tables",
    "analysis",
    "axes",
    "plots",
    "tracking",
    "lesions",
    "compensation",
    "pruning",
    "prune_module",
    "simulation",
    "report",
    "cli",
    "__main__",
]
#: What `core` may not import; its statistics work on tables.
FRAMEWORKS = {"lightning", "pytorch_lightning", "torchmetrics", "torchvision", "wandb", "pandas", "matplotlib"}
TABLES = {"statistics.py"}
MOST_FILES = 12
FILES = sorted(PACKAGE.rglob("*.py"))


def chapter(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source: str) -> set[str]:
    """Dotted names of what a module imports, at its top or inside a function; not what only type checkers see."""
    found = set()
    tree = ast.parse(source)
    hidden = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["chanaxes_pl" if node.level else "", node.module]))
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def chapters_imported(source: str) -> set[str]:
    own = [name.split(".") for name in imports(source) if name.split(".")[0] == "chanaxes_pl"]
    return {parts[1] for parts in own if len(parts) > 1}


def violations(home: str, source: str) -> set[str]:
    """Chapters that a module of chapter ``home`` imports from but may not."""
    return chapters_imported(source) - set(CHAPTERS[: CHAPTERS.index(home) + 1])


def cycles(folder: Path) -> set[str]:
    """Files of one folder that import each other in a circle, at their top."""
    below = {path.stem: set() for path in folder.glob("*.py") if path.stem != "__init__"}
    prefix = ".".join(folder.relative_to(PACKAGE.parent).parts)
    for name in below:
        tree = ast.parse((folder / f"{name}.py").read_text())
        modules = [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
        below[name] = {m.removeprefix(f"{prefix}.") for m in modules if m.startswith(f"{prefix}.")} & below.keys()
    while free := [name for name, needed in below.items() if not needed & below.keys()]:
        for name in free:
            del below[name]
    return set(below)


def test_every_file_has_a_chapter():
    assert {chapter(path) for path in FILES} - {"__init__"} <= set(CHAPTERS)


def test_a_chapter_has_at_most_a_dozen_files():
    sizes = {folder.name: len(list(folder.glob("*.py"))) - 1 for folder in PACKAGE.iterdir() if folder.is_dir()}
    assert {name: size for name, size in sizes.items() if size > MOST_FILES} == {}


def test_a_module_imports_only_from_chapters_above_its_own():
    found = {
        str(path.relative_to(PACKAGE)): violations(chapter(path), path.read_text())
        for path in FILES
        if chapter(path) != "__init__"
    }
    assert {path: wrong for path, wrong in found.items() if wrong} == {}


def test_no_files_of_a_chapter_import_each_other_in_a_circle():
    found = {folder.name: cycles(folder) for folder in PACKAGE.iterdir() if folder.is_dir()}
    assert {name: files for name, files in found.items() if files} == {}


def test_the_names_of_the_package_load_on_first_use():
    assert chapters_imported((PACKAGE / "__init__.py").read_text()) == set()


def test_models_and_data_know_nothing_of_the_axes():
    found = {path.name: chapters_imported(path.read_text()) for path in FILES if chapter(path) in ("models", "data")}
    assert {name: used for name, used in found.items() if not used <= {"core", "network", "models", "data"}} == {}


def test_the_mathematics_stands_without_a_framework():
    found = {
        path.name: {name.split(".")[0] for name in imports(path.read_text())} & FRAMEWORKS
        for path in FILES
        if chapter(path) == "core"
    }
    assert {name: used for name, used in found.items() if used - ({"pandas"} if name in TABLES else set())} == {}


def test_the_tests_have_the_chapters_of_the_package():
    folders = {path.name for path in Path(__file__).parent.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= {*CHAPTERS, "helpers", "benchmarks"}


def test_the_half_logarithm_has_one_home():
    """−½ ln(1 − ρ²) is written in ``gaussian`` alone; ``input_capture`` has ½ ln(1 + J/σ²)."""
    with_logarithm = {str(path.relative_to(PACKAGE)) for path in FILES if "log1p" in path.read_text()}
    assert with_logarithm == {"core/gaussian.py", "core/metrics.py"}


@pytest.mark.parametrize(
    ("literal", "registry"),
    [
        (Allocation, ALLOCATIONS),
        (BudgetOf, COSTS),
        (Compensation, RIDGE),
        (Family, SCORES.values()),
        (MapScore, MAP_IMAGES),
        (MapScore, MAP_SCORES),
        (Operation, OPERATIONS),
        (Rebuilding, REPLACEMENTS),
        (WeightScore, WEIGHT_SCORES),
    ],
)
def test_a_literal_holds_the_keys_of_its_registry(literal, registry):
    assert set(get_args(literal)) == set(registry)


@pytest.mark.parametrize(
    ("home", "source", "found"),
    [
        ("core", "from chanaxes_pl.network.probe import Probe", {"network"}),
        ("network", "import chanaxes_pl.tracking.tracker", {"tracking"}),
        ("axes", "def f():\n    from chanaxes_pl import plots", {"plots"}),
        ("tables", "from .analysis import correlations", {"analysis"}),
        ("tables", "from chanaxes_pl.core.moments import Moments\nimport torch", set()),
    ],
)
def test_an_import_against_the_flow_would_be_noticed(home, source, found):
    assert violations(home, source) == found


def test_a_framework_would_be_noticed():
    assert "lightning" in {name.split(".")[0] for name in imports("from lightning.pytorch import Trainer")}


def test_a_circle_would_be_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_architecture.PACKAGE", tmp_path)
    folder = tmp_path / "core"
    folder.mkdir()
    package = f"{tmp_path.name}.core"
    (folder / "a.py").write_text(f"from {package}.b import x")
    (folder / "b.py").write_text(f"from {package}.a import y")
    (folder / "c.py").write_text(f"from {package}.a import y")
    (folder / "d.py").write_text("")
    assert cycles(folder) == {"a", "b", "c"}
