"""The notebooks run from top to bottom, on the images that scikit-learn ships, and are kept as they are read."""

import ast
import re
from pathlib import Path

import jupytext
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.py"))
COLOURS = re.compile(r"\x1b\[[0-9;]*m")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Proactor event loop"),
    pytest.mark.filterwarnings("ignore:Kernel is running over TCP"),
]


def executed(path: Path):
    """The notebook with its outputs; fails with the error of the cell that failed."""
    notebook = jupytext.read(path)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}})
    try:
        client.execute()
    except CellExecutionError as error:
        pytest.fail(COLOURS.sub("", str(error))[-3000:])
    return notebook


def outputs(notebook) -> list:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_there_are_notebooks():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_figures(path):
    found = outputs(executed(path))
    assert [output for output in found if "image/png" in output.get("data", {})]
    assert not [output["text"] for output in found if output.get("name") == "stderr"]


def test_a_cell_that_fails_would_be_noticed(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("# %%\n1 / 0\n")
    with pytest.raises(pytest.fail.Exception, match="ZeroDivisionError"):
        executed(path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_says_what_its_reader_will_know_and_defines_nothing(path):
    notebook = jupytext.read(path)
    assert "At the end you will know" in notebook.cells[0].source
    defined = [
        node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    ]
    # The networks and labels of other tasks are the reader's own; everything else is the package's.
    assert bool(defined) == (path.stem == "06_other_tasks")


def test_no_notebook_is_kept_with_outputs():
    assert not list(FOLDER.rglob("*.ipynb"))
