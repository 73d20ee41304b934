"""Does the agent beat random search with the same number of evaluations? On real evaluations, with a control.

    python benchmarks/search.py --run runs/RUN --data data [--seeds 3] [--episodes 40]

Takes a finished run of arq.py for its base, search images and cache, and runs three searches per seed with
that run's evaluator: the agent; uniformly random actions; and a control that learns nothing, a normal around
1/2 whose spread shrinks as the agent's does. A search that was stopped continues when the command is given
again (one line an episode under results/search/). Prints a table and writes results/search/summary.json.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import arq  # noqa: E402
import certify  # noqa: E402
import models  # noqa: E402
from ddpg import DDPG  # noqa: E402


class RandomAgent(DDPG):
    """Uniformly random actions, nothing learned."""

    def act(self, state, explore=True):
        return float(torch.rand((), generator=self.generator))

    def learn(self, states, actions, reward):
        self.episode += 1


class FixedAgent(RandomAgent):
    """The agent's exploration around a mean that never moves."""

    act = DDPG.act

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.actor = lambda state: torch.full((len(state), 1), 0.5)

    def state_dict(self):
        return {"episode": self.episode, "generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.episode = state["episode"]
        self.generator.set_state(state["generator"])


def evaluator(run: Path, data: str):
    """The environment, the evaluator and the base's ACR of a finished run."""
    options = json.loads((run / "config.json").read_text())
    config = arq.complete_config(arq.Config(**{**options, "data": data}))
    images, test_images = arq.load_images(config)
    stages = arq.Stages(run / "state.pt", arq.stage_keys(config, arq.STAGES, images, test_images))
    search_ids = arq.evenly_spaced(config.search_images, len(images))
    train_ids = sorted(set(range(len(images))) - set(search_ids))
    key = arq.digest(json.dumps(stages.keys["train the base"]).encode())
    path = next(Path("runs/bases").glob(f"*-{key}.pt"), None)
    assert config.checkpoint or path, "the run's base classifier is not under runs/bases"
    classifier = arq.build_base(config, len(images.classes), path)
    table = models.quantize_model(classifier, config.image_size)
    search_images = images.batch(search_ids, config.device)
    arq.calibrate(classifier, search_images, config)
    labels = [images.labels[i] for i in search_ids]
    cache = arq.certify_search_images(classifier, search_images, labels, search_ids, len(images.classes),
                                      config, run / "search_cache.pt", stages)
    evaluate = arq.PolicyEvaluator(classifier, cache, search_images, images, train_ids, config)
    environment = arq.BitWidthEnvironment(table, config.budget, config.size_budget)
    return environment, evaluate, certify.average_certified_radius(cache.certificates)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", default="data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=40)
    options = parser.parse_args()
    environment, evaluate, base_acr = evaluator(options.run, options.data)
    name = options.run.resolve().name
    found = {}
    for seed in range(options.seeds):
        for method, agent in (("agent", DDPG), ("random", RandomAgent), ("fixed mean", FixedAgent)):
            out = ROOT / "results" / "search" / f"{name}-{method.replace(' ', '-')}-seed{seed}"
            out.mkdir(parents=True, exist_ok=True)
            arq.DDPG = agent
            print(f"{method}, seed {seed}")
            stages = arq.Stages(out / "state.pt", {"search": {"seed": seed, "episodes": options.episodes}})
            if stages.begins("search", out / "search.jsonl"):
                log = out / "search.jsonl"
                arq.search(environment, evaluate, base_acr, options.episodes, seed, log, stages)
                stages.save(None, finished=True)
            acrs = [json.loads(line)["acr"] for line in (out / "search.jsonl").read_text().splitlines()]
            found.setdefault(method, []).append({"best": max(acrs), "last ten": statistics.mean(acrs[-10:]),
                                                 "all": statistics.mean(acrs)})
    print(f"\nbase ACR {base_acr:.4f}, {options.episodes} episodes, {options.seeds} seeds: "
          f"mean (lowest to highest)")
    for method, rows in found.items():
        texts = []
        for key in ("best", "last ten", "all"):
            values = [row[key] for row in rows]
            texts.append(f"{key} {statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})")
        print(f"{method:<12}" + ", ".join(texts))
    summary = {"run": name, "base_acr": base_acr, "episodes": options.episodes, "methods": found}
    (ROOT / "results" / "search" / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
