"""Notebooks among the pages: a page each, with the outputs that are stored in it.

They are kept true by tests/test_notebook.py, which runs them; to run one and store what comes out:
python -m nbconvert --to notebook --execute --inplace docs/notebook.ipynb
"""

from __future__ import annotations

from typing import Any

from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter


def on_files(files: Files, *, config: Any) -> Files:
    """Put a page and its pictures in the place of every notebook."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        name = file.src_uri.removesuffix(".ipynb")
        stem = name.rpartition("/")[2]
        body, resources = MarkdownExporter().from_filename(file.abs_src_path, {"output_files_dir": stem})
        files.remove(file)
        files.append(File.generated(config, f"{name}.md", content=body))
        for picture, data in resources["outputs"].items():
            files.append(File.generated(config, f"{name.rpartition(stem)[0]}{picture}", content=data))
    return files
