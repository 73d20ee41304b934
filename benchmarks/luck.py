"""How much of the winner's reward is luck? The best policies of a search, evaluated again with other draws.

    python benchmarks/luck.py --run results/cifar10-resnet20-sigma0.25 --data DIR --checkpoint FILE

The reward of an episode depends on the noise that certifies and on the batches that fine-tune. The five best
policies by reward and five from the middle are evaluated again, as in an episode, under --seeds other seeds,
each with a cache of its own. Luck is the reward less the mean of the others. Writes results/luck.json.
"""

import argparse
import copy
import json
import math
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import arq  # noqa: E402
import models  # noqa: E402
from benchmarks import search  # noqa: E402


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="the folder of a finished run")
    parser.add_argument("--data", default="data")
    parser.add_argument("--checkpoint", required=True, help="its float base")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "luck.json")
    options = parser.parse_args(argv)
    saved = json.loads((options.run / "config.json").read_text())
    saved |= {"data": options.data, "checkpoint": options.checkpoint, "device": "auto"}
    config = arq.complete_config(arq.Config(**{**vars(arq.Config()), **saved}))
    lines = (options.run / "search.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if not record.get("finalist")]
    ranked = sorted(records, key=lambda record: record["acr"], reverse=True)
    middle = len(ranked) // 2
    groups = {"best": ranked[:5], "middle": ranked[middle - 2 : middle + 3]}
    found = {
        name: [{"reward": record["acr"], "again": []} for record in group] for name, group in groups.items()
    }
    for seed in range(1, options.seeds + 1):
        other = copy.copy(config)
        other.seed = config.seed + seed
        environment, evaluate, cache = search.parts_of(other)
        for name, group in groups.items():
            for record, row in zip(group, found[name]):
                assert models.bitops_ratio(environment.table, record["policy"]) <= config.budget
                row["again"].append(evaluate(record["policy"], cache))
                print(
                    f"seed {other.seed}, {name}: {row['reward']:.4f}, again {row['again'][-1]:.4f}",
                    flush=True,
                )
    for name, rows in found.items():
        luck = [row["reward"] - statistics.fmean(row["again"]) for row in rows]
        spread = math.sqrt(statistics.fmean(statistics.variance(row["again"]) for row in rows))
        text = f"{name}: luck of the first {luck[0]:+.4f}, mean {statistics.fmean(luck):+.4f}"
        print(f"{text}; spread of one evaluation {spread:.4f}")
    arq.write_whole(options.out, {"run": options.run.name, "seeds": options.seeds, **found})


if __name__ == "__main__":
    main()
