"""Does the agent beat random search with the same number of evaluations? On real evaluations, with a control.

    python benchmarks/search.py --run runs/RUN --base runs/bases/FILE.pt [--seeds 3] [--episodes 40]

Takes the options of a run of arq.py, among them its reward, and its base, and runs three searches per seed
with the same evaluator: the agent; uniformly random actions; and a control that learns nothing, a normal
around 1/2 whose spread shrinks as the agent's does. A search that was stopped continues when the command is
given again (one line per episode under results/search/). Prints a table and writes
results/search/summary.json.
"""

import argparse
import copy
import json
import statistics
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import arq
import certify
import models
from ddpg import DDPG, DDPGConfig

ROOT = Path(__file__).resolve().parents[1]


class FixedAgent(DDPG):
    """The agent's exploration around a mean that never moves: mu(s) = sigmoid(0) = 1/2."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        for parameter in self.actor.parameters():
            nn.init.zeros_(parameter)

    def learn(self, states, actions, reward):
        self.episode += 1


class RandomAgent(FixedAgent):
    """Uniformly random actions, nothing learned."""

    def act(self, state):
        return float(torch.rand((), generator=self.generator))


AGENTS = {"agent": DDPG, "random": RandomAgent, "fixed mean": FixedAgent}


def parts_of(config: arq.Config):
    """The environment, the evaluator and the base's cache for the options of a run."""
    images = arq.load_images(config, True)
    train_images, search_images = arq.hold_out(images, config.search_images)
    normalisation = config.mean, config.std
    base = models.load_base_checkpoint(config.checkpoint, config.arch, len(images.classes), *normalisation)
    base = base.to(config.device, memory_format=torch.channels_last).eval()
    table = models.quantize_model(copy.deepcopy(base), config.image_size)
    environment = arq.BitWidthEnvironment(table, config.budget)
    g = certify.Smooth(
        base, len(search_images.classes), config.sigma, config.seed, config.eval_batch, "search"
    )
    x = search_images.batch(range(len(search_images)), config.device)
    sizes = config.n0, config.search_n, config.alpha
    cache = g.certify_and_cache(x, search_images.labels, search_images.ids, *sizes)
    return environment, arq.policy_evaluator(base, train_images, search_images, config), cache


def search(out: Path, key: dict, cache, environment, agent, evaluate) -> list[float]:
    """ACRs of one search, by episode; an interrupted one continues."""

    def work(state, save):
        records = state["records"] if state else []
        if state:
            agent.load_state_dict(state["agent"])
        for record in arq.search(lambda: cache, environment, agent, evaluate):
            records.append(record)
            save({"agent": agent.state_dict(), "records": records})
            print(f"  episode {record['episode']}: ACR {arq.shown(record['acr'])}", flush=True)
        return "".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode()

    log = out / "search.jsonl"
    arq.Stages(out / "state.pt", {"search": key}).do("search", log, work)
    return [json.loads(line)["acr"] for line in log.read_text().splitlines()]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--base", help="unless the run was given a --checkpoint: its file in runs/bases")
    parser.add_argument("--data", default="data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=40)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "search")
    options = parser.parse_args(argv)
    saved = json.loads((options.run / "config.json").read_text())
    saved |= {"data": options.data, "checkpoint": options.base or saved["checkpoint"]}
    config = arq.complete_config(arq.Config(**saved))
    environment, evaluate, cache = parts_of(config)
    base_acr = certify.average_certified_radius(cache.certificates)
    name = options.run.resolve().name
    warmup = min(20, max(1, options.episodes // 3))  # as in arq.search_policies
    settings = DDPGConfig(episodes=options.episodes, warmup_episodes=warmup)
    found = {method: [] for method in AGENTS}
    for seed in range(options.seeds):
        for method, kind in AGENTS.items():
            print(f"{method}, seed {seed}")
            out = options.out / f"{name}-{method.replace(' ', '-')}-seed{seed}"
            key = {"run": name, "reward": config.reward, "episodes": options.episodes}
            agent = kind(environment.state_size, seed, settings)
            acrs = search(out, key, cache, environment, agent, evaluate)
            last, mean = statistics.fmean(acrs[-10:]), statistics.fmean(acrs)
            found[method].append({"best": max(acrs), "last ten": last, "all": mean})
    print(f"\nbase ACR {base_acr:.4f}, {options.episodes} episodes, {options.seeds} seeds: ", end="")
    print("mean (lowest to highest)")
    for method, rows in found.items():
        texts = []
        for key in rows[0]:
            values = [row[key] for row in rows]
            texts.append(f"{key} {statistics.fmean(values):.4f} ({min(values):.4f} to {max(values):.4f})")
        print(f"{method:<12}" + ", ".join(texts))
    summary = {"run": name, "reward": config.reward, "base_acr": base_acr, "episodes": options.episodes}
    arq.write_whole(options.out / "summary.json", {**summary, "methods": found})


if __name__ == "__main__":
    main()
