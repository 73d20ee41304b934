"""Does a run that is killed anywhere end as one that nothing interrupted, and what does being able to cost?

    python benchmarks/resume.py [--kills 20] [--seed 0]
    python benchmarks/resume.py --overhead runs/shapes runs/cifar10

A small `shapes` run through every stage, once whole; then again and again, ended by SIGKILL at seeded random
moments and continued by the same command, until it was killed so often. Whatever it then leaves is compared
with the whole run's, times aside. --overhead takes finished runs instead: it writes the largest state that
their search saves, on the same disk, and sets that time against their median episode. Prints, and writes
results/resume.json.
"""

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import arq
import certify
import models
from ddpg import DDPG, DDPGConfig

ROOT = Path(__file__).resolve().parents[1]
RUN = (
    "--image-size 16 --epochs 4 --episodes 12 --finetune-steps 4 --finetune-epochs 2.5 --images 40 --n 400 "
    "--search-images 40 --search-n 400 --n-p 100 --device cpu"
).split()


# ---- killed again and again ----


def plain(value):
    """Without times; tensors as nested lists."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(some) for key, some in value.items() if key not in ("seconds", "time")}
    return [plain(some) for some in value] if isinstance(value, (list, tuple)) else value


def contents(folder: Path) -> dict:
    """What a run left, by file."""
    run = folder / "run"
    (base,) = (folder / "runs" / "bases").iterdir()
    found = {path.name: path.read_bytes() for path in (run / "model.arq", run / "policy.json")}
    for path in run.glob("*.tsv"):
        found[path.name] = plain([vars(row) for row in certify.read_certificates(path)])
    for path in (base, run / "search_cache.pt"):
        found[path.name] = plain(arq.read_state(path))
    for path in (run / "results.json", run / "config.json"):
        found[path.name] = plain(json.loads(path.read_text()))
    found["search.jsonl"] = plain(read_records(run))
    return found


def read_records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "search.jsonl").read_text().splitlines()]


def start(folder: Path) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(ROOT / "arq.py"), *RUN, "--out", "run"]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, wait: float | None = None) -> str | None:
    """The stage in which the process was killed after `wait` seconds; None if it ended before."""
    try:
        said = process.communicate(timeout=wait)[0]
        assert process.returncode == 0, said
        return None
    except subprocess.TimeoutExpired:
        process.kill()
        said = process.communicate()[0]
        stages = [line for line in said.splitlines() if line.endswith("...")]
        return stages[-1] if stages else "before any stage"


def killed_again_and_again(kills: int, seed: int) -> dict:
    """Kills fall evenly on the time that the whole run takes, from its first imports on."""
    moments, log, differing, runs = random.Random(seed), [], set(), 0
    with tempfile.TemporaryDirectory() as place:
        whole, broken = Path(place, "whole"), Path(place, "broken")
        began = time.monotonic()
        finish(start(whole))
        seconds = time.monotonic() - began
        expected = contents(whole)
        while len(log) < kills:
            # A run that ended before it was killed often enough is compared, and begun anew.
            shutil.rmtree(broken, ignore_errors=True)
            stage = "not begun"
            while stage is not None:
                wait = moments.uniform(0, 0.6) * seconds if len(log) < kills else None
                stage = finish(start(broken), wait)
                if stage is not None:
                    log.append({"after_seconds": round(wait, 2), "in": stage})
                    print(f"  kill {len(log)}: {log[-1]}", flush=True)
            runs += 1
            found = contents(broken)
            differing |= {name for name in expected if expected[name] != found.get(name)}
            outcome = f"differs in {', '.join(sorted(differing))}" if differing else "the same files"
            print(f"run {runs}: {outcome}", flush=True)
    return {
        "kills": log,
        "runs": runs,
        "files_compared": len(expected),
        "differing": sorted(differing),
        "seconds_of_the_whole_run": round(seconds, 1),
        "threads": torch.get_num_threads(),
    }


# ---- what a saved state costs ----


def largest_state(environment: arq.BitWidthEnvironment, episodes: int) -> dict:
    """What a search of so many episodes saves last: the agent with its replay memory, and all records."""
    agent = DDPG(environment.state_size, 0, DDPGConfig(episodes=episodes))
    for episode in range(min(episodes, agent.config.replay_episodes)):
        states, actions, policy = environment.rollout(agent.act)
        agent.learn(states, actions, float(episode))
    agent.update()  # from now on the optimizers have a state, too
    record = {"acr": 1 / 3, "reward": 1 / 3, "noise": 1 / 3, "policy": policy}
    record |= {"random": False, "bitops_ratio": 1 / 3, "size_bytes": 1_000_000, "seconds": 1 / 3}
    records = [{"episode": episode, **record} for episode in range(episodes)]
    return {"agent": agent.state_dict(), "records": records}


def overhead(run: Path) -> dict:
    """What saving the largest state of a finished run's search takes, beside its median episode."""
    options, records = json.loads((run / "config.json").read_text()), read_records(run)
    classifier = models.build_classifier(options["arch"], 10)
    table = models.quantize_model(classifier, options["image_size"])
    environment = arq.BitWidthEnvironment(table, options["budget"])
    state = largest_state(environment, len(records))
    times = []
    with tempfile.TemporaryDirectory(dir=run) as place:
        path = Path(place, "state.pt")
        for _ in range(20):
            began = time.monotonic()
            arq.write_whole(path, {"search": {"state": state}})
            times.append(time.monotonic() - began)
        size = path.stat().st_size
    seconds, episode = statistics.median(times), statistics.median(row["seconds"] for row in records)
    return {
        "episodes": len(records),
        "episode_seconds": episode,
        "state_seconds": round(seconds, 4),
        "state_bytes": size,
        "share_of_an_episode": round(seconds / episode, 5),
    }


def main(argv=None) -> bool:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--overhead", type=Path, nargs="+", metavar="RUN", help="only the cost of saved states"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    options = parser.parse_args(argv)
    path = options.out / "resume.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    if options.overhead:
        results["overhead"] = {run.resolve().name: overhead(run) for run in options.overhead}
        print(json.dumps(results["overhead"], indent=1))
    else:
        results["killed"] = killed_again_and_again(options.kills, options.seed)
    arq.write_whole(path, results)
    return bool(results.get("killed", {}).get("differing"))


if __name__ == "__main__":
    sys.exit(main())
