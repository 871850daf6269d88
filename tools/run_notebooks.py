"""Run the notebooks in order through papermill and render them: what `make run` does.

`--in_place` executes the committed notebooks with their default parameters in a temporary folder,
and renews them and the committed results when all have succeeded; `--parameters` names a YAML file
with the notebooks to run and what to change in each.
"""

import argparse
import html
import os
import shutil
import tempfile
import time
from pathlib import Path

import nbformat
import papermill
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError
from papermill.iorw import read_yaml_file
from traitlets.config import Config

from helpers import InputError
from helpers.config import FOLDERS
from helpers.console import NOTEBOOK, run_command
from helpers.records import ROOT, written_whole

# In order, with what `make run` changes in them beside the folders.
NOTEBOOKS = {"setup_finetune": {}, "finetune_lora": {}, "benchmark": {}, "map_scene": {}}
# Parameters that name a place, and where `make run` puts it below its output.
PLACES = {
    "output_path": "models",
    "history_path": "training_history",
    "figures_path": "figures",
    "results_path": "benchmark_results",
    "output": "map_example",
    "model_path": "models/head_only_example_example_seed0/model_final.safetensors",
}
# A report runs nothing and loads nothing, whatever the names in it hold: what it shows is in it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# Lines of progress from the kernel's start on, so that the imports are in them.
PROGRESS = "__import__('helpers.console').console.report_cells()"


def run_notebook(name: str, output: Path, parameters: dict, folder: Path = ROOT) -> float:
    """Execute one notebook in a folder; return the seconds it took.

    Raises:
        InputError: a cell failed; the executed notebook with the error stays for reading.
    """
    start = time.perf_counter()
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ[NOTEBOOK] = f"{name}.ipynb"  # its kernel inherits it, and says it in its lines
    try:
        papermill.execute_notebook(
            ROOT / f"{name}.ipynb",
            output,
            parameters=parameters,
            cwd=folder,
            kernel_name="python3",
            progress_bar=False,
            extra_arguments=[
                "--IPKernelApp.log_level=CRITICAL",  # at ERROR it reports its own end
                f"--IPKernelApp.exec_lines={PROGRESS}",
            ],
        )
    except PapermillExecutionError as error:
        failure = f"{error.ename}: {error.evalue}"
        raise InputError(f"{name}.ipynb failed: {failure} (see {output})") from None
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
    policy = f'<head><meta http-equiv="Content-Security-Policy" content="{POLICY}"/>'
    with written_whole(page) as part:
        part.write_text(body.replace("<head>", policy, 1))


def index_page(pages: list[Path]) -> str:
    """A page that links to the reports."""
    links = "\n".join(
        f'<li><a href="{html.escape(page.name)}">{html.escape(page.stem)}</a></li>'
        for page in pages
    )
    return (
        "<!doctype html><meta charset='utf-8'><title>DINOv2 for satellite imagery</title>"
        "<style>body{font:18px/1.6 sans-serif;max-width:40em;margin:3em auto}</style>"
        f"<h1>DINOv2 for satellite imagery</h1><p>Reports of the last run, in reading order:</p>"
        f"<ol>\n{links}\n</ol>\n"
    )


def renew(executed: list[Path], folder: Path) -> None:
    """Put executed notebooks and the results they left in a folder into the project's own."""
    for notebook in executed:
        with written_whole(ROOT / notebook.name) as part:
            shutil.copyfile(notebook, part)
    for results in set(FOLDERS.values()) - {FOLDERS["cache_path"]}:
        if (made := folder / "runs" / results).is_dir():
            shutil.copytree(made, ROOT / results, dirs_exist_ok=True)


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
            raise InputError(f"{arguments.parameters}: no notebook {unknown.pop()}.ipynb here")
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    executed = [output / f"{name}.ipynb" for name in notebooks]
    pages = [notebook.with_suffix(".html") for notebook in executed]
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, changes) in enumerate(notebooks.items(), start=1):
            print(f"[{number}/{len(notebooks)}] {name}.ipynb ...", flush=True)
            notebook, page = executed[number - 1], pages[number - 1]
            if arguments.in_place:
                seconds = run_notebook(name, notebook, {}, Path(folder))
            else:
                parameters = parameters_below(name, arguments.output, changes)
                seconds = run_notebook(name, notebook, parameters)
            render(notebook, page)
            print(f"      {seconds:.0f} s -> {arguments.output / page.name}", flush=True)
        if arguments.in_place:
            renew(executed, Path(folder))
    (output / "index.html").write_text(index_page(pages))
    print(f"open {arguments.output / 'index.html'}")


if __name__ == "__main__":
    run_command(main, with_lines=False)  # the notebooks' kernels print theirs
