"""Classify chips, or map a scene: `python -m helpers.predict --model_path M --input X --output Y`.

A notebook calls `predict` with the same parameters.
"""

from pathlib import Path

from helpers import InputError
from helpers.console import run_command
from helpers.deployment.mapping import map_scene
from helpers.deployment.scoring import (
    PredictConfig,
    Scorer,
    answer_rule,
    find_inputs,
    open_model,
    score_chips,
    without_suffix,
)
from helpers.reporting.maps import draw_map


def predict(config: PredictConfig, scorer: Scorer | None = None) -> list[Path]:
    """Answer what `config.input` names and write it to `config.output`; return the files.

    The scenes of a folder or a glob become one map each in a folder called `config.output`.
    `scorer`, where there is one, is `config.model_path` as `open_model` gave it.

    Raises:
        InputError: as `open_model`, `answer_rule`, `find_inputs`, `score_chips` and `map_scene`.
    """
    scorer = scorer or open_model(config.model_path, config.threads, config.device)
    rule = answer_rule(scorer, config)
    inputs = find_inputs(scorer, config)
    if inputs.kind == "chips":
        if config.engine != "local":
            raise InputError(f"engine: {config.engine} maps scenes; chips are predicted locally")
        return score_chips(scorer, rule, inputs, config)
    output = without_suffix(config.output)
    names = [Path(name).with_suffix("") for name in inputs.names]
    if len(set(names)) < len(names):
        raise InputError(f"input: {config.input} has two scenes of one name; rename one")
    place = output.resolve()
    for path in map(Path.resolve, inputs.paths if inputs.several else []):
        if path.is_relative_to(place) or place.is_relative_to(path.parent):
            raise InputError(f"output: {output} lies among the scenes; give another place")
    files = []
    for path, name in zip(inputs.paths, names, strict=True):
        target = output / name if inputs.several else output
        files += map_scene(scorer, rule, path, target, config, draw_map)[1]
    return files


def main() -> None:
    """Classify chips or map scenes with a trained classifier."""
    files = predict(PredictConfig.from_arguments(main.__doc__))
    print("wrote " + ", ".join(map(str, files)))


if __name__ == "__main__":
    run_command(main)
