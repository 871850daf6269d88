"""The image of the service, without a Docker daemon: linted, complete, and no more than it says."""

import json
import re
import subprocess
import sys
from fnmatch import fnmatch
from importlib.metadata import packages_distributions
from pathlib import Path

from helpers.deployment.servers import ServerConfig
from helpers.records import ROOT
from tests.test_house import imported, imports, module_name

TEXT = (ROOT / "Dockerfile").read_text()
LINES = re.sub(r"\s*\\\n\s*", " ", TEXT).splitlines()
SERVE_MODULE = "helpers.serve"
OPTIONAL = {"ray"}  # `--engine ray` says how to install it
OF_OTHERS = {"starlette": "fastapi"}  # what a listed package brings, in the version that it needs


def instructions(name):
    return [line.partition(" ")[2] for line in LINES if line.startswith(f"{name} ")]


def installed():
    """Names that the image has pip install."""
    (command,) = [line for line in instructions("RUN") if "pip install" in line]
    words = [word for word in command.split() if re.fullmatch("[a-z_-]+", word)]
    return {word for word in words if not word.startswith("-")}


def needed():
    """Packages that the modules behind `helpers.serve` import, at once or later."""
    files = {module_name(path): path for path in (ROOT / "helpers").rglob("*.py")}
    waiting, seen, found = [SERVE_MODULE], set(), set()
    while waiting:
        module = waiting.pop()
        if module in files and module not in seen:
            seen.add(module)
            source = files[module].read_text()
            found |= {name.split(".")[0] for name in imported(source)}
            waiting += [*imports(source), module.rpartition(".")[0]]
            waiting += [name.rpartition(".")[0] for name in imports(source)]
    assert len(seen) > 15 and SERVE_MODULE in seen
    return found - {"helpers"} - sys.stdlib_module_names


def test_hadolint_finds_nothing():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_everything_that_the_service_imports_is_installed():
    distributions = packages_distributions()
    names = {OF_OTHERS.get(top, top) for top in needed() - OPTIONAL}
    wanted = {distributions.get(name, [name])[0].lower() for name in names}
    assert {"torch", "fastapi", "rasterio", "openvino"} <= wanted
    assert wanted <= installed()


def test_every_version_is_pinned():
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.M))
    assert installed() - {"install", "pip", "torch"} <= pinned
    assert re.fullmatch(r"python:3\.11-slim-\w+", instructions("FROM")[0])


def test_what_is_copied_is_there_and_little_else_is_sent():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    sent = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {word for line in instructions("COPY") for word in line.split()[:-1]}
    assert copied == sent and all((ROOT / name).exists() for name in copied)
    assert "*" in ignored and ignored.index("*") < min(map(ignored.index, {f"!{n}" for n in sent}))
    assert any(fnmatch("helpers/data/__pycache__", line) for line in ignored if "__" in line)


def test_it_serves_as_nobody_on_the_port_that_is_watched():
    (user,) = instructions("USER")
    assert user.isdigit() and int(user) >= 1000
    entry = json.loads(instructions("ENTRYPOINT")[0])
    assert entry[:3] == ["python", "-m", SERVE_MODULE]
    (port,) = instructions("EXPOSE")
    (health,) = instructions("HEALTHCHECK")
    program = json.loads(health.partition("CMD ")[2])[-1]
    assert f"http://127.0.0.1:{port}/health" in program
    compile(program, "HEALTHCHECK", "exec")
    assert "SERVE_TOKEN=" not in TEXT
    given = ServerConfig.from_arguments("", [*entry[3:], "--model_path", "/model/int8.json"])
    assert (given.host, str(given.port), given.model_path) == ("0.0.0.0", port, "/model/int8.json")
