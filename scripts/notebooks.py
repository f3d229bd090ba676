"""Runs the notebooks and stores their outputs in them, so that they can be read without running them.

    python -m scripts.notebooks                              # all of notebooks/
    python -m scripts.notebooks notebooks/quickstart.ipynb

Needs the extras ``demo`` and ``notebooks``.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

from unike.system import launching
from unike.types import UserError

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# The only metadata stored: what an editor or a kernel adds is dropped.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
COLOURS = 128


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook, run from the top in ``folder``, with all outputs except progress.

    Raises nbclient's CellExecutionError if a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    known = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(
        notebook, timeout=600, record_timing=False, coalesce_streams=True, resources=resources
    )
    client.execute(env=os.environ | {"PYTHONPATH": known, "TQDM_DISABLE": "1"})
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            # Progress bars and notices of drawing go to the error stream.
            cell.outputs = [shrink_image(out) for out in cell.outputs if out.get("name") != "stderr"]
    return notebook


def is_notebook(path: Path) -> bool:
    """Whether the file exists and holds a notebook."""
    try:
        nbformat.validate(nbformat.read(path, as_version=4))
    except (OSError, ValueError, AttributeError, nbformat.ValidationError):
        return False
    return True


def shrink_image(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The output with its image, if it has one, in few colours: a third of the bytes, without a visible
    difference."""
    if "image/png" in output.get("data", {}):
        image, small = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))), io.BytesIO()
        image.convert("RGB").quantize(COLOURS).save(small, "PNG", optimize=True)
        output.data["image/png"] = base64.b64encode(small.getvalue()).decode()
    return output


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, default=NOTEBOOKS, metavar="FILE")

    def run() -> int:
        paths = parser.parse_args(argv).notebooks
        if wrong := [path for path in paths if not is_notebook(path)]:
            raise UserError(*(f"{path}: cannot be read as a notebook" for path in wrong))
        for path in paths:
            notebook = execute(path, path.parent)
            nbformat.write(notebook, path)
            print(f"{path.name}: {path.stat().st_size / 1000:.0f} KB")
        return 0

    return launching.run_guarded(run)


if __name__ == "__main__":
    sys.exit(main())
