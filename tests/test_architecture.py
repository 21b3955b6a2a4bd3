"""Data flows one way: a module imports only from rooms above its own."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "chanaxes_pl"
#: From the first to the last; a room may import from those before it, and files of one folder from each other.
ROOMS = [
    "files",
    "moments",
    "gaussian",
    "metrics",
    "gradients",
    "layers",
    "targets",
    "probe",
    "patch_moments",
    "accumulators",
    "tables",
    "correlations",
    "groupings",
    "scalars",
    "wandb_media",
    "axes",
    "schedules",
    "history",
    "tracker",
    "data",
    "models",
    "plots",
    "simulate",
    "pruning",
    "structure",
    "prediction",
    "runs",
    "summary",
    "report",
    "wandb_dashboard",
    "trainer_cli",
    "demo",
    "cli",
    "__main__",
]
#: What is pure mathematics, and may import neither a framework around torch nor a table.
PURE = ("moments", "gaussian", "metrics", "gradients", "layers", "targets")
FRAMEWORKS = {"lightning", "pytorch_lightning", "torchmetrics", "torchvision", "wandb", "pandas", "matplotlib"}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source: str, home: str = "chanaxes_pl") -> set[str]:
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
            base = ".".join(filter(None, [home if node.level else "", node.module]))
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def rooms_imported(source: str) -> set[str]:
    own = [name.split(".") for name in imports(source) if name.split(".")[0] == "chanaxes_pl"]
    return {parts[1] for parts in own if len(parts) > 1}


def violations(home: str, source: str) -> set[str]:
    """Rooms that a module of room ``home`` imports from but may not."""
    allowed = set(ROOMS[: ROOMS.index(home) + 1])
    return rooms_imported(source) - allowed


def test_every_file_has_a_room():
    assert {room(path) for path in FILES} - {"__init__"} <= set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_rooms_above_its_own(path):
    if room(path) == "__init__":
        assert rooms_imported(path.read_text()) == set()  # its names load on first use
    else:
        assert violations(room(path), path.read_text()) == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_core_knows_neither_data_nor_models_nor_the_command_line(path):
    if room(path) in ROOMS[: ROOMS.index("tracker") + 1]:
        assert rooms_imported(path.read_text()).isdisjoint(ROOMS[ROOMS.index("tracker") + 1 :])
    if room(path) in ("data", "models"):
        assert rooms_imported(path.read_text()) <= {"files", "data", "models"}


@pytest.mark.parametrize(
    "path", [path for path in FILES if room(path) in PURE], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_the_mathematics_stands_without_a_framework(path):
    assert {name.split(".")[0] for name in imports(path.read_text())}.isdisjoint(FRAMEWORKS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_longer_than_350_lines(path):
    assert len(path.read_text().splitlines()) <= 350


def test_the_half_logarithm_has_one_home():
    """−½ ln(1 − ρ²) is written in ``gaussian`` alone; ``input_capture`` has ½ ln(1 + J/σ²)."""
    with_logarithm = {str(path.relative_to(PACKAGE)) for path in FILES if "log1p" in path.read_text()}
    assert with_logarithm == {"gaussian.py", "metrics/input_capture.py"}


@pytest.mark.parametrize(
    ("home", "source", "found"),
    [
        ("moments", "from chanaxes_pl.core.gaussian import information", {"gaussian"}),
        ("metrics", "import chanaxes_pl.tracking.tracker", {"tracker"}),
        ("axes", "def f():\n    from chanaxes_pl import tracker", {"tracker"}),
        ("tables", "from .correlations import spearman", {"correlations"}),
        ("tables", "from chanaxes_pl.core.moments import Moments\nimport torch", set()),
    ],
)
def test_an_import_against_the_flow_would_be_noticed(home, source, found):
    assert violations(home, source) == found


def test_a_framework_would_be_noticed():
    assert "lightning" in {name.split(".")[0] for name in imports("from lightning.pytorch import Trainer")}
