"""Run the notebooks in order through papermill and render them: what `make run` does.

`--in_place` executes the committed notebooks themselves, with their default parameters;
`--parameters` names a YAML file with the notebooks to run and what to change in each.
"""

import argparse
import html
import os
import sys
import time
from pathlib import Path

import nbformat
import papermill
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError
from papermill.iorw import read_yaml_file
from traitlets.config import Config

from helpers.console import NOTEBOOK

# In order, with what `make run` changes in them beside the folders.
NOTEBOOKS = {"setup_finetune": {}, "finetune_lora": {"seeds": [0, 1, 2]}, "benchmark": {}}
# Parameters that name a place, and where `make run` puts it below its output.
PLACES = {
    "output_path": "models",
    "history_path": "training_history",
    "figures_path": "figures",
    "results_path": "benchmark_results",
    "model_path": "models/head_only_example_example_seed0/model_final.safetensors",
}
ROOT = Path(__file__).resolve().parent.parent


def run_notebook(name: str, output: Path, parameters: dict) -> float:
    """Execute one notebook in the project's folder; return the seconds it took.

    Raises:
        SystemExit: a cell failed; the executed notebook with the error stays for reading.
    """
    start = time.perf_counter()
    os.environ[NOTEBOOK] = f"{name}.ipynb"  # its kernel inherits it, and says it in its lines
    try:
        papermill.execute_notebook(
            ROOT / f"{name}.ipynb",
            output,
            parameters=parameters,
            cwd=ROOT,
            kernel_name="python3",
            progress_bar=False,
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
        )
    except PapermillExecutionError as error:
        sys.exit(f"error: {name}.ipynb failed: {error.ename}: {error.evalue} (see {output})")
    forget_papermill(output)
    return time.perf_counter() - start


def forget_papermill(notebook: Path) -> None:
    """Remove papermill's notes on the run, which hold paths of this machine and times."""
    content = nbformat.read(notebook, as_version=4)
    for part in [content, *content.cells]:
        part.metadata.pop("papermill", None)
    nbformat.write(content, notebook)


def parameters_below(name: str, output: Path, changes: dict) -> dict:
    """What a notebook is given: its places below `output`, and the changes of this run."""
    offered = papermill.inspect_notebook(ROOT / f"{name}.ipynb")
    places = {key: str(output / place) for key, place in PLACES.items() if key in offered}
    return places | changes


def render(notebook: Path, page: Path) -> None:
    """Write an executed notebook as one HTML file, without the cells that only build prose."""
    config = Config()
    config.TagRemovePreprocessor.enabled = True
    config.TagRemovePreprocessor.remove_input_tags = {"remove-input"}
    exporter = HTMLExporter(config=config)
    body, _ = exporter.from_filename(str(notebook))
    page.write_text(body)


def index_page(pages: list[Path]) -> str:
    """A page that links to the reports."""
    links = "\n".join(
        f'<li><a href="{page.name}">{html.escape(page.stem)}</a></li>' for page in pages
    )
    return (
        "<!doctype html><meta charset='utf-8'><title>DINOv2 for satellite imagery</title>"
        "<style>body{font:18px/1.6 sans-serif;max-width:40em;margin:3em auto}</style>"
        f"<h1>DINOv2 for satellite imagery</h1><p>Reports of the last run, in reading order:</p>"
        f"<ol>\n{links}\n</ol>\n"
    )


def main() -> None:
    """Run, render and index every notebook."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("reports"), help="folder for reports")
    parser.add_argument("--in_place", action="store_true", help="renew the committed notebooks")
    parser.add_argument("--parameters", type=Path, help="YAML: notebook -> parameters")
    arguments = parser.parse_args()
    notebooks = NOTEBOOKS
    if arguments.parameters:
        notebooks = read_yaml_file(str(arguments.parameters))
        if unknown := set(notebooks) - set(NOTEBOOKS):
            parser.error(f"{arguments.parameters}: no notebook {unknown.pop()}.ipynb here")
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    pages = []
    for number, (name, changes) in enumerate(notebooks.items(), start=1):
        print(f"[{number}/{len(notebooks)}] {name}.ipynb ...", flush=True)
        executed = ROOT / f"{name}.ipynb" if arguments.in_place else output / f"{name}.ipynb"
        parameters = {} if arguments.in_place else parameters_below(name, arguments.output, changes)
        seconds = run_notebook(name, executed, parameters)
        pages.append(output / f"{name}.html")
        render(executed, pages[-1])
        print(f"      {seconds:.0f} s -> {arguments.output / pages[-1].name}", flush=True)
    (output / "index.html").write_text(index_page(pages))
    print(f"open {arguments.output / 'index.html'}")


if __name__ == "__main__":
    main()
