"""Runs the tutorials, and writes their pages and notebooks with what the cells printed and drew.

    python docs/scripts/tutorials.py              # all of them
    python docs/scripts/tutorials.py first_run    # one

A tutorial is a script in `examples/tutorials/` with cells. Jupytext reads the cells and a Jupyter
kernel runs them. A page takes the outputs as they come; the build of the site runs nothing.
"""

import base64
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "tutorials"
PAGES = ROOT / "docs" / "tutorials"
NAMES = sorted(path.stem for path in SCRIPTS.glob("*.py"))
HEAD = "Run it yourself: [notebook]({0}.ipynb), [script](../../examples/tutorials/{0}.py)."
# Pictures have one size, and no name of the program that drew them.
SETTINGS = {
    "figure.figsize": (7, 3),
    "figure.dpi": 80,
    "savefig.dpi": 80,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}


def cells_of(name: str):
    """The notebook of a tutorial, not yet run. Its cells are numbered, so that it is the same."""
    import jupytext

    notebook = jupytext.read(SCRIPTS / f"{name}.py", fmt="py:percent")
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata.clear()
    notebook.metadata["kernelspec"] = kernel
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    return notebook


def executed(name: str):
    """The notebook of a tutorial with its outputs. Raises nbclient's error if a cell fails."""
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell
    from traitlets.config import Config

    notebook = cells_of(name)
    settings = f"import matplotlib as mpl\n\nmpl.rcParams.update({SETTINGS!r})"
    inline = "%config InlineBackend.print_figure_kwargs = {'metadata': {'Software': None}}"
    hidden = new_code_cell(f"%matplotlib inline\n{inline}\n{settings}", id="settings")
    notebook.cells.insert(0, hidden)
    config = Config({"KernelManager": {"transport": "ipc"}})  # no ports, and no warning about them
    NotebookClient(notebook, timeout=600, record_timing=False, config=config).execute()
    notebook.cells.pop(0)
    notebook.metadata.pop("language_info", None)  # it has the version of Python
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = joined(cell.outputs)
    return notebook


def joined(outputs: list) -> list:
    """Outputs with the parts of a printed text joined. Raises `ValueError` if a cell warns."""
    kept = []
    for output in outputs:
        if output.output_type == "stream" and output.name == "stderr":
            raise ValueError(f"A cell writes to standard error: {output.text}.")
        if output.output_type == "stream" and kept and kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def pictures(notebook) -> Iterator[bytes]:
    """The pictures of a notebook, in their order."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "display_data":
                yield base64.b64decode(output.data["image/png"])


def page(name: str, notebook) -> str:
    """The page of a notebook that was run, in Markdown."""
    (title, first), drawn = notebook.cells[0].source.split("\n", 1), 0
    parts = [title, HEAD.format(name), first.strip()]
    for cell in notebook.cells[1:]:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            if output.output_type == "stream":
                parts.append(f"```text\n{output.text.rstrip()}\n```")
            else:
                drawn += 1
                parts.append(f"![What the cell above draws]({name}_{drawn}.png)")
    return "\n\n".join(parts) + "\n"


def write(name: str) -> None:
    """Runs a tutorial, and writes its page, its pictures and its notebook."""
    import nbformat

    notebook = executed(name)
    for number, picture in enumerate(pictures(notebook), 1):
        (PAGES / f"{name}_{number}.png").write_bytes(picture)
    (PAGES / f"{name}.md").write_text(page(name, notebook), encoding="utf-8")
    nbformat.write(notebook, PAGES / f"{name}.ipynb")


def main() -> None:
    """Writes the tutorials that the command line names, or all."""
    os.environ["PYTHONPATH"] = str(ROOT)  # for the kernel
    for name in sys.argv[1:] or NAMES:
        start = time.monotonic()
        write(name)
        print(f"{name}: {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
