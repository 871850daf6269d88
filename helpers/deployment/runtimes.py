"""What serves a variant: from the files in its folder to predictions.

Nothing here imports a runtime before a variant asks for it, so that a fresh process holds in
memory what a deployment of that variant would hold, and no more: serving an OpenVINO file never
loads torch.

`python -m helpers.deployment.runtimes --variant F.json --chips F.npy …` is that fresh process: it
prints its own memory and cold start as one line of JSON.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil

from helpers import InputError
from helpers.records import peak_memory_bytes, reset_peak_memory

Predict = Callable[[np.ndarray], np.ndarray]
"""Chips (N, bands, S, S), uint8 or float in file units -> logits (N, classes) float32."""


@dataclass(frozen=True)
class Variant:
    """One deployable form of a classifier: files on disk and how to serve them.

    Args:
        name: as in tables and file names.
        made: how it was made, in words.
        runtime: a name in `RUNTIMES`.
        folder: where its files lie.
        files: file names in the folder; the first is the one that the runtime opens.
        options: what the runtime needs besides, JSON-serialisable. Every runtime's hold
            `classifier`, the `ClassifierConfig` (classes, bands, image size) as a dict. Three say
            how a comparison treats the variant: `depends_on_batch` (a chip's logits change with
            its neighbours), `only_timed` (its logits are the reference's by construction) and
            `costs_as` (computes and stores what the variant of that name does).
            `removed_percent`: of the parameters of heads and MLP units that are gone.
            `batches`: one of `LAYOUTS`.
        precision: of most of its multiplications: `fp32`, `bf16`, `fp16` or `int8`.
    """

    name: str
    made: str
    runtime: str
    folder: Path
    files: tuple[str, ...]
    options: dict
    precision: str = "fp32"

    @property
    def bytes_on_disk(self) -> int:
        """What has to be shipped."""
        return sum((self.folder / name).stat().st_size for name in self.files)

    def save(self) -> Path:
        """Write the description beside the files, so that another process can serve them."""
        path = self.folder / f"{self.name}.json"
        path.write_text(json.dumps(asdict(self) | {"folder": None}, indent=2) + "\n")
        return path

    @classmethod
    def read(cls, path: str | Path) -> "Variant":
        """Read what `save` wrote."""
        fields = json.loads(Path(path).read_text())
        return cls(**fields | {"folder": Path(path).parent, "files": tuple(fields["files"])})


def load(variant: Variant, threads: int, device: str = "cpu") -> Predict:
    """Load a variant and return its predict function, which uses so many threads of a CPU.

    PyTorch variants alone know another device than `cpu`.

    Raises:
        InputError: the runtime is not installed.
    """
    require(variant.runtime)
    return RUNTIMES[variant.runtime](variant, threads, device)


def require(runtime: str) -> None:
    """Raise InputError, saying how to install it, if a runtime is missing."""
    package = {"aot_inductor": "torch"}.get(runtime, runtime)
    if find_spec(package) is None:
        raise InputError(
            f"runtime {runtime} is not installed; install it with `pip install {package}` "
            "(requirements.txt has the version)"
        )


def _load_torch(variant: Variant, threads: int, device: str) -> Predict:
    """A state dict for `Classifier`, in any precision, narrowed blocks and an adapter included."""
    import torch

    from helpers.models.backbones import build_backbone, read_state_dict
    from helpers.models.classifier import Classifier, config_from_json

    torch.set_num_threads(threads)
    config = config_from_json(variant.options["classifier"])
    bands = len(config.bands)
    backbone = build_backbone(config.backbone, config.image_size, bands, initialise=False)
    model = Classifier(config, backbone)
    if variant.runtime == "torchao":
        import torchao  # noqa: F401  registers the tensor types that the file holds
    state = read_state_dict(variant.folder / variant.files[0])
    _narrow(backbone, state)
    model.load_state_dict(state, assign=True)
    if "adapter" in variant.options:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, variant.folder / variant.options["adapter"])
    model = model.to(device).eval()
    if variant.options.get("sparse_2_4"):
        for layer in block_layers(backbone).values():
            layer.weight = torch.nn.Parameter(
                torch.sparse.to_sparse_semi_structured(layer.weight), requires_grad=False
            )
    return torch_predict(model, device, variant.options.get("autocast"))


def block_layers(backbone) -> dict:
    """The linear layers of the blocks, by their path in the backbone."""
    from torch import nn

    return {
        f"blocks.{path}": layer
        for path, layer in backbone.blocks.named_modules()
        if isinstance(layer, nn.Linear)
    }


def _narrow(backbone, state: dict) -> None:
    """Give blocks the heads and MLP units that a structurally pruned state dict has left."""
    from torch import nn

    for path, layer in block_layers(backbone).items():
        out_features, in_features = shape = state[f"backbone.{path}.weight"].shape
        if shape == layer.weight.shape:
            continue
        narrow = nn.Linear(in_features, out_features, layer.bias is not None, device="meta")
        backbone.set_submodule(path, narrow)
        if path.endswith("attn.proj"):
            attention = backbone.get_submodule(path.removesuffix(".proj"))
            attention.attn_dim = in_features
            attention.num_heads = in_features // attention.head_dim


def _load_aot_inductor(variant: Variant, threads: int, device: str) -> Predict:
    """A package that torch compiled ahead of time."""
    import torch

    torch.set_num_threads(threads)
    path = str(variant.folder / variant.files[0])
    # The loader that C++ servers link; `torch._inductor.aoti_load_package` wraps it, but loads the
    # compiler too, which takes 15 s.
    loader = torch._C._aoti.AOTIModelPackageLoader(path, "model", False, 1, -1)
    return torch_predict(lambda chips: loader.run([chips])[0], device)


def torch_predict(model, device: str, autocast: str | None = None) -> Predict:
    """Serve a model that lies on `device` and takes chips as `Predict` does."""
    import torch

    def predict(chips: np.ndarray) -> np.ndarray:
        context = torch.autocast(device, getattr(torch, autocast)) if autocast else nullcontext()
        with torch.inference_mode(), context:
            return model(torch.from_numpy(chips).to(device)).float().cpu().numpy()

    return predict


def _load_onnxruntime(variant: Variant, threads: int, device: str) -> Predict:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that spin after a run would slow down whatever is measured next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    path = variant.folder / variant.files[0]
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda chips: session.run(None, {"chips": chips})[0]


@cache
def openvino_core():
    """The one `openvino.Core` of this process.

    On CPUs with AMX or AVX-512 each Core's CPU plugin sets an alternative stack for signals and,
    when the Core ends, restores that of the Core before. Where they do not end in the reverse
    order of their beginning, the process keeps a stack that is freed and dies by the next signal
    that Python handles, such as Ctrl-C.
    """
    import openvino

    return openvino.Core()


def _load_openvino(variant: Variant, threads: int, device: str) -> Predict:
    weights, graph = (variant.folder / name for name in variant.files)
    core = openvino_core()
    model = core.read_model(gzip.decompress(graph.read_bytes()), weights.read_bytes())

    # A graph of its own for single chips, compiled when one comes: 1.4 times as fast (ViT-Ti,
    # int8). Larger batches gain 1.1 times, which is not worth a graph and 50 MB for every size.
    @cache
    def requests(n: int, hint: str) -> list:
        model.reshape([n, *model.input().partial_shape[1:]])
        hints = {
            "PERFORMANCE_HINT": hint,
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": variant.options["precision_hint"],
            # Pinned, the threads of two processes would share the first core.
            "ENABLE_CPU_PINNING": False,
        }
        compiled = core.compile_model(model, "CPU", hints)
        streams = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        return [compiled.create_infer_request() for _ in range(streams)]

    def predict(chips: np.ndarray) -> np.ndarray:
        if len(chips) == 1:
            return requests(1, "LATENCY")[0].infer([chips])[0].copy()
        several = requests(-1, variant.options.get("batches", "LATENCY"))
        parts = np.array_split(chips, min(len(several), len(chips)))
        for request, part in zip(several, parts, strict=False):
            request.start_async([part])
        used = several[: len(parts)]
        for request in used:
            request.wait()
        return np.concatenate([request.get_output_tensor().data for request in used])

    return predict


LAYOUTS = {"openvino": ("LATENCY", "THROUGHPUT")}
"""How a runtime can lay a batch out over the threads: OpenVINO takes it whole (LATENCY), or parts
of it side by side, a stream each (THROUGHPUT). A variant's option `batches` says which."""

RUNTIMES = {
    "torch": _load_torch,
    "torchao": _load_torch,
    "aot_inductor": _load_aot_inductor,
    "onnxruntime": _load_onnxruntime,
    "openvino": _load_openvino,
}


class Remote:
    """A variant in a process of its own; calling it predicts there."""

    def __init__(self, variant: Variant, threads: int, device: str):
        """Start the process; the first prediction waits until it has loaded the variant.

        A new interpreter and not `multiprocessing`, which would import the caller's main module
        there, and all that hangs on it.
        """
        self._connection, other = multiprocessing.Pipe()
        command = [sys.executable, "-m", "helpers.deployment.runtimes",
                   "--variant", str(variant.save()), "--threads", str(threads), "--device", device,
                   "--serve", str(other.fileno())]  # fmt: skip
        self._process = subprocess.Popen(
            command,
            env=worker_environment(),
            pass_fds=[other.fileno()],
            start_new_session=True,  # Ctrl-C at a terminal is for the caller, which ends this one
        )
        other.close()

    def __call__(self, chips: np.ndarray) -> np.ndarray:
        """Chips -> logits, see `Predict`."""
        self._connection.send(chips)
        return self._connection.recv()

    def memory_bytes(self) -> int:
        """See `process_memory`."""
        return process_memory(psutil.Process(self._process.pid))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._connection.close()


def process_memory(process: psutil.Process) -> int:
    """Proportional set size in bytes; resident size where the system has none."""
    memory = process.memory_full_info()
    return getattr(memory, "pss", memory.rss)


@contextmanager
def remote(variant: Variant, threads: int, device: str = "cpu") -> Iterator[Remote]:
    """Serve a variant from another process."""
    model = Remote(variant, threads, device)
    try:
        yield model
    finally:
        model.close()


def worker_environment() -> dict[str, str]:
    """Environment in which another interpreter finds this package, wherever it is started."""
    return os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}


def _serve(handle: int, predict: Predict) -> None:
    """Answer chips with logits over an inherited pipe until its other end closes."""
    with Connection(handle) as connection, suppress(EOFError):
        while True:
            connection.send(predict(connection.recv()))


def footprint(
    variant: Variant,
    chips: np.ndarray,
    batch_sizes: list[int],
    threads: int,
    device: str,
    started: float,
) -> dict:
    """Memory and cold start of this process, which must be a fresh one.

    Chips (N, bands, S, S) are repeated where a batch is larger; batch sizes ascend. The process was
    asked for at `started`, in seconds since the epoch.

    Returns:
        `start_s` (from then to here), `load_s` (imports and files), `first_prediction_s`
        (one chip), `loaded_bytes` and `peak_bytes_<batch size>` (resident memory of the process),
        and `gpu_peak_bytes_<batch size>` (allocated by torch) on a GPU.
    """
    start_s = time.time() - started
    start = time.perf_counter()
    predict = load(variant, threads, device)
    loaded = time.perf_counter()
    rss = psutil.Process().memory_info().rss
    predict(chips[:1])
    first = time.perf_counter()
    result = {
        "start_s": start_s,
        "load_s": loaded - start,
        "first_prediction_s": first - loaded,
        "loaded_bytes": rss,
    }
    for size in batch_sizes:
        batch = np.resize(chips, (size, *chips.shape[1:]))
        reset_peak_memory()
        predict(batch)
        result[f"peak_bytes_{size}"] = peak_memory_bytes("cpu")
        if device == "cuda":
            result[f"gpu_peak_bytes_{size}"] = peak_memory_bytes(device)
    return result


def main() -> None:
    """Measure one variant in this process and print one line of JSON, or serve it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--variant", required=True, help="description written by Variant.save")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--chips", help=".npy file of (N, bands, S, S), to measure with")
    parser.add_argument("--batch_sizes", type=int, nargs="+", help="to measure")
    parser.add_argument("--started", type=float, help="when this process was asked for, Unix time")
    parser.add_argument("--serve", type=int, metavar="HANDLE", help="of the pipe to serve over")
    args = parser.parse_args()
    variant = Variant.read(args.variant)
    if args.serve is not None:
        _serve(args.serve, load(variant, args.threads, args.device))
        return
    chips = np.load(args.chips, allow_pickle=False)
    measured = footprint(variant, chips, args.batch_sizes, args.threads, args.device, args.started)
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
