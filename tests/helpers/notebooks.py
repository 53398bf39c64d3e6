"""Execute a notebook in a real Jupyter kernel. `python tests/helpers/notebooks.py docs/quickstart.ipynb` stores its
outputs in it."""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parent.parent.parent
OF_A_KERNEL = "application/vnd.jupyter.widget-view+json"  # what only a running kernel can show


def executed(path: Path, folder: Path) -> NotebookNode:
    """Return the notebook with the outputs of its cells, executed in `folder` with this copy of the package. Progress
    bars are left out: they are widgets, and a stored one shows nothing.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell raised an error.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=600,
        resources={"metadata": {"path": str(folder)}},
        coalesce_streams=True,
        record_timing=False,
        store_widget_state=False,
    )
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT)})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if OF_A_KERNEL not in output.get("data", ())]
    return notebook


if __name__ == "__main__":
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(executed(Path(name), Path(folder)), name)
