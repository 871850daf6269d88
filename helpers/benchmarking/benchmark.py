"""The whole benchmark of one classifier: what the notebook shows and the command runs."""

import json
from dataclasses import asdict
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pandas as pd

from helpers.benchmarking import decision, load
from helpers.benchmarking.bench import Bench, BenchmarkConfig, open_bench, with_control
from helpers.benchmarking.http import measure_http
from helpers.benchmarking.latency import latency_table, measure_latency, request_parts
from helpers.benchmarking.limits import cpu_flags, energy_meter, flops_per_image, machine_limits
from helpers.benchmarking.memory import measure_memory
from helpers.benchmarking.quality import measure_quality
from helpers.benchmarking.roofline import roofline
from helpers.deployment.runtimes import Predict, Variant
from helpers.deployment.variants.build import build_variants
from helpers.records import environment, write_json, written_whole

_PACKAGES = ("torchao", "onnx", "onnxruntime", "openvino", "nncf", "mlcommons-loadgen")
# The small tables of a record; the summary and the latency samples have files of their own.
TABLES = (
    "quality",
    "latency",
    "request",
    "memory",
    "roofline",
    "scenarios",
    "server_search",
    "load_curve",
    "competition",
    "scaling",
    "http",
    "http_curve",
    "expectations",
)


class Benchmark:
    """All measurements of one classifier: each is taken when it is first asked for, then kept.

    Nothing is timed beside anything else. Whoever reads the tables in an order of his own has them
    measured in that order; `save` asks for all of them.
    """

    def __init__(self, config: BenchmarkConfig):
        """Load the classifier and its data; raises as `open_bench`."""
        self.config = config
        self.bench: Bench = open_bench(config)

    @cached_property
    def _built(self) -> tuple[dict[str, Variant], dict[str, Predict], pd.DataFrame]:
        names = self.config.variant_names
        return build_variants(self.bench.source, names, self.bench.threads)

    @property
    def variants(self) -> dict[str, Variant]:
        """What runs on this machine, by name."""
        return self._built[0]

    @property
    def built(self) -> pd.DataFrame:
        """All variants asked for, see `build_variants`."""
        return self._built[2]

    @property
    def costs_as(self) -> dict[str, str]:
        """Variants that compute what another one here does -> that one, which is timed for both."""
        same = {name: v.options.get("costs_as") for name, v in self.variants.items()}
        return {name: other for name, other in same.items() if other in self.variants}

    @property
    def timed(self) -> list[Variant]:
        """Variants with costs of their own."""
        return [v for name, v in self.variants.items() if name not in self.costs_as]

    @cached_property
    def quality(self) -> pd.DataFrame:
        """See `measure_quality`."""
        return measure_quality(self.bench, self.variants, self._built[1])

    @cached_property
    def samples(self) -> pd.DataFrame:
        """Every timed prediction, see `measure_latency`."""
        return measure_latency(self.bench, {v.name: self._built[1][v.name] for v in self.timed})

    @cached_property
    def latency(self) -> pd.DataFrame:
        """See `latency_table`."""
        return latency_table(self.samples, self.config.percentiles)

    @cached_property
    def request(self) -> pd.DataFrame:
        """See `request_parts`, of the variant under load."""
        return request_parts(self.bench, self._built[1], self.loaded)

    @cached_property
    def memory(self) -> pd.DataFrame:
        """See `measure_memory`."""
        return measure_memory(self.bench, self.timed)

    @cached_property
    def limits(self) -> dict[str, float]:
        """See `machine_limits`."""
        return machine_limits(self.bench.device, self.bench.threads)

    @cached_property
    def roofline(self) -> pd.DataFrame:
        """See `roofline.roofline`."""
        return roofline(self.bench, self.timed, self.latency, self.limits)

    @cached_property
    def load_names(self) -> tuple[str, ...]:
        """What is put under load, see `load.load_names`."""
        return load.load_names(self.bench, self.quality, self.latency)

    @property
    def loaded(self) -> str:
        """The variant that is put under every kind of load."""
        return self.load_names[-1]

    @cached_property
    def _scenarios(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        names = with_control(self.load_names)
        return load.measure_scenarios(self.bench, [self.variants[name] for name in names])

    @property
    def scenarios(self) -> pd.DataFrame:
        """See `load.measure_scenarios`."""
        return self._scenarios[0]

    @property
    def server_search(self) -> pd.DataFrame:
        """All rates that were tried for the Server scenario."""
        return self._scenarios[1]

    @property
    def capacity(self) -> float:
        """Images per second of the variant under load, Offline."""
        return load.offline_rate(self.scenarios, self.loaded)

    @cached_property
    def _under_load(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        return load.measure_load(self.bench, self.variants[self.loaded], self.capacity)

    @property
    def load_curve(self) -> pd.DataFrame:
        """The first of `load.measure_load`."""
        return self._under_load[0]

    @property
    def competition(self) -> pd.DataFrame:
        """The second of `load.measure_load`."""
        return self._under_load[1]

    @cached_property
    def scaling(self) -> pd.DataFrame:
        """See `load.measure_scaling`."""
        return load.measure_scaling(self.bench, [self.variants[name] for name in self.load_names])

    @cached_property
    def _over_http(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        return measure_http(self.bench, self.variants[self.loaded], self.scenarios)

    @property
    def http(self) -> pd.DataFrame:
        """The first of `http.measure_http`."""
        return self._over_http[0]

    @property
    def http_curve(self) -> pd.DataFrame:
        """The second of `http.measure_http`."""
        return self._over_http[1]

    @cached_property
    def summary(self) -> pd.DataFrame:
        """One row per variant, see `decision.summarise`."""
        return decision.summarise(self)

    @cached_property
    def decision(self) -> dict[str, str]:
        """See `decision.decide`."""
        return decision.decide(self.summary)

    @cached_property
    def expectations(self) -> pd.DataFrame:
        """See `decision.expectations`."""
        return decision.expectations(self.summary, self.latency, self.decision)

    def save(self, sentence: str) -> list[Path]:
        """Write `<run>.csv` (the summary), `<run>_latency.parquet` (samples) and `<run>.json`.

        Args:
            sentence: for the deployment plan, kept in the record.
        """
        folder = Path(self.config.results_path)
        files = [folder / f"{self.bench.name}{end}" for end in (".csv", "_latency.parquet")]
        record = {
            "limits": self.limits,
            "flops_per_image": flops_per_image(self.bench.source.classifier),
            "energy_counter": (energy_meter(self.bench.device) or (None,))[0],
            "decision": self.decision,
            "sentence": sentence,
            "tables": {name: rows_of(getattr(self, name)) for name in TABLES},
        }
        with written_whole(files[0]) as part:
            self.summary.to_csv(part, index=False, float_format="%.6g")
        with written_whole(files[1]) as part:
            self.samples.to_parquet(part, index=False)
        return [*files, save_record(self.bench, record)]


def save_record(bench: Bench, measured: dict) -> Path:
    """Write `<run>.json`: what was measured, with what, on what and where."""
    where = environment()
    where["packages"] |= {package: _version(package) for package in _PACKAGES}
    where["machine"] |= {"cpu_flags": cpu_flags(), "threads_per_prediction": bench.threads}
    path = Path(bench.config.results_path) / f"{bench.name}.json"
    record = {
        "run": bench.name,
        "backbone_weights_data": bench.label,
        "config": bench.config.model_dump() | {"device": bench.device},
        "classifier": asdict(bench.source.classifier.config),
        "test_chips": len(bench.targets),
        "calibration": list(bench.calibration),
        "data_fingerprint": bench.data.fingerprint,
        "mlperf_submission": False,
        **measured,
        "environment": where,
    }
    write_json(path, record)
    return path


def rows_of(table: pd.DataFrame) -> list[dict]:
    """A table as JSON holds it: rows, numbers with ten digits after the point, null for NaN."""
    return json.loads(table.to_json(orient="records"))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
