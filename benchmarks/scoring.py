"""What the further scores cost beside the plain score of the same network: `evaluation.residual`, `expect`, tokens.

    python -m benchmarks.scoring                        # the presets `small`
    python -m benchmarks.scoring --only memmc_mae       # one system

Networks have their initial weights, images are noise, and an expectation has the size that 64 normals give it. A run is
the whole score of a batch of images, or of one volume, as `jmae.evaluate` computes it, transfers included. Scores are
timed in turn, each in a process of its own. The table gives the ratio to the plain score in the same round,
and the memory that the compiled pass needs beside its arguments.

Writes benchmarks/results/scoring.json.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import Prepared, interleaved, ratio, table, write

RESULTS = Path(__file__).parent / "results" / "scoring.json"
SMOOTHED = {"evaluation.residual": "smoothed"}
RESIDUALS: dict[str, dict[str, Any]] = {
    name: {"evaluation.residual": name} for name in ("smoothed", "ssim", "mahalanobis", "feature")
}
APPEARANCE = {"smoothed, appearance": SMOOTHED | {"evaluation.expect": "appearance"}}
IMAGES = RESIDUALS | {"smoothed, position": SMOOTHED | {"evaluation.expect": "position"}} | APPEARANCE
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "memmc_mae": {"plain": {}} | IMAGES | {"tokens": {"evaluation.score": "tokens"}},
    "amae": {"plain": {}} | IMAGES | {"tokens": {"evaluation.discrepancy": "tokens"}},
    # mahalanobis needs four sweeps, and the preset `small` has two
    "maemi": {"plain": {"evaluation.residual": "none"}}
    | {name: way for name, way in RESIDUALS.items() if name != "mahalanobis"}
    | APPEARANCE,
}
VOLUME = (96, 96, 40)  # voxels of 1 mm


def score(*, system: str, preset: str, changes: dict[str, Any]) -> Prepared:
    """The score of a batch of images, or of one volume, by a network with its initial weights."""
    import jax

    from jmae import fitting
    from jmae.inference import Scorer
    from jmae.inputs import image_of_array, row_of
    from jmae.passes import BatchPass
    from jmae.recipe import load
    from jmae.system import load_system, stage_keys

    config = load(f"{system}:{preset}")
    config.update_from_flattened_dict({"replicates": 1} | changes)
    whole, results = load_system(config), dict[str, Any]()
    for number, stage in enumerate(whole.stages):
        init = jax.jit(lambda key, results, stage=stage: stage.init(key, results, stage.batch))
        state = init(stage_keys(config, number), results)
        results[stage.name] = {"params": state.params, "stats": state.stats}
    rng = np.random.default_rng(0)
    drawn = lambda x: rng.uniform(0.5, 1, x.shape).astype(x.dtype)
    for name, tree in fitting.shapes(config, whole, results).items():
        results[name] = jax.device_put(jax.tree.map(drawn, tree))
    scorer = Scorer(config, whole, results)
    size, spacing = (VOLUME, (1.0, 1.0, 1.0)) if whole.sweep else (tuple(config.data.size), None)
    stored = lambda: image_of_array(
        rng.uniform(size=(*size, config.data.channels)), config.data, spacing, None, "noise"
    )
    cases = [scorer.prepare(row_of("noise", ("noise",)), stored()) for _ in range(scorer.at_once)]
    scorer.score(cases)
    passes = scorer.passes
    program = passes.compiled if isinstance(passes, BatchPass) else next(iter(passes.programs.values()))[0]
    memory = program.memory_analysis().temp_size_in_bytes / 2**20
    return lambda: scorer.score(cases), {"cases": len(cases), "temp_mib": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    arguments = parser.parse_args()
    rows = []
    for system in arguments.only:
        given = {"system": system, "preset": arguments.preset}
        contestants = {
            name: ("benchmarks.scoring:score", given | {"changes": changes}) for name, changes in WAYS[system].items()
        }
        found = interleaved(contestants, rounds=arguments.rounds)
        for name, one in found.items():
            one["to_plain"] = ratio(one, found["plain"])
            each = one["median_s"] / one["cases"]
            rows.append((system, name, each, one["to_plain"]["median"], one["to_plain"]["cpu"], one["temp_mib"]))
        write(RESULTS, f"{system}:{arguments.preset}", {"rounds": arguments.rounds, "contestants": found})
    print(table(("system", "score", "s a case", "to plain", "CPU to plain", "memory MiB"), rows))


if __name__ == "__main__":
    main()
