"""Does a run that is killed anywhere end as one that nothing interrupted, and what does being able to cost?

    python benchmarks/resume.py [--kills 20] [--seed 0] [--overhead]

A small `shapes` run through every stage, once whole; then again and again, ended by SIGKILL at seeded random
moments and continued by the same command, until it was killed so often. Whatever it then leaves is compared
with the whole run's, times aside. --overhead takes the time and bytes of every saved state in the search of
the default `shapes` command and, with --data and --checkpoint, in twelve episodes on ResNet-20 and real
images. Prints, and writes results/resume.json.
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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import arq  # noqa: E402
import certify  # noqa: E402

RUN = ("--image-size 16 --epochs 4 --episodes 12 --episode-steps 4 --finetune-epochs 2.5 --images 40 --n 400 "
       "--search-images 40 --search-n 400 --n-p 100 --device cpu").split()


def contents(folder: Path) -> dict:
    """What a run left, without times; tensors as nested lists."""
    def plain(value):
        if isinstance(value, torch.Tensor):
            return value.tolist()
        if isinstance(value, dict):
            return {key: plain(some) for key, some in value.items() if key not in ("seconds", "time")}
        return [plain(some) for some in value] if isinstance(value, (list, tuple)) else value

    run = folder / "run"
    rows = {path.name: [plain(vars(row)) for row in certify.read_certificates(path)]
            for path in run.glob("*.tsv")}
    whole = {path.name: path.read_bytes() for path in (run / "model.arq", run / "policy.json")}
    records = [json.loads(line) for line in (run / "search.jsonl").read_text().splitlines()]
    base, = (folder / "runs" / "bases").iterdir()
    return {**rows, **whole, "search.jsonl": plain(records), "base": plain(arq.read_state(base)),
            "search_cache.pt": plain(arq.read_state(run / "search_cache.pt")),
            "results.json": plain(json.loads((run / "results.json").read_text())),
            "config.json": json.loads((run / "config.json").read_text())}


def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "arq.py"), *RUN, "--out", "run"]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def killed_again_and_again(kills: int, seed: int) -> dict:
    """Kills fall evenly on the time that the whole run takes, from its first imports on."""
    with tempfile.TemporaryDirectory() as place:
        whole, broken = Path(place, "whole"), Path(place, "broken")
        whole.mkdir()
        began = time.monotonic()
        process = start(whole)
        said = process.communicate()[0]
        assert process.returncode == 0, said
        seconds = time.monotonic() - began
        moments, log, done, rounds = random.Random(seed), [], 0, 0
        differing = []
        while done < kills:  # a run that ends before it was killed often enough is compared, and begun anew
            shutil.rmtree(broken, ignore_errors=True)
            broken.mkdir()
            ended = False
            while not ended:
                process = start(broken)
                try:
                    wait = moments.uniform(0, 0.6) * seconds if done < kills else None
                    said, ended = process.communicate(timeout=wait)[0], True
                    assert process.returncode == 0, said
                except subprocess.TimeoutExpired:
                    process.kill()
                    said = process.communicate()[0]
                    stage = [line for line in said.splitlines() if line.endswith("...")]
                    reached = stage[-1] if stage else "before any stage"
                    log.append({"after_seconds": round(wait, 2), "in": reached})
                    done += 1
                    print(f"  kill {done}: {log[-1]}", flush=True)
            rounds += 1
            first, second = contents(whole), contents(broken)
            differing += [name for name in first if first[name] != second.get(name)]
            print(f"run {rounds}: {'differs in ' + ', '.join(differing) if differing else 'the same files'}",
                  flush=True)
    return {"kills": log, "runs": rounds, "files_compared": len(first), "differing": sorted(set(differing)),
            "seconds_of_the_whole_run": round(seconds, 1), "threads": torch.get_num_threads()}


def overhead(options: list[str]) -> dict:
    """Median seconds and bytes of a saved state, by stage, and its share of an episode."""
    saves: dict[str, list] = {}
    save = arq.Stages.save

    def timed(self, state, finished=False):
        before = time.monotonic()
        save(self, state, finished)
        if not finished:
            name = next(name for name, record in self.records.items() if record is self.record)
            saves.setdefault(name, []).append((time.monotonic() - before, self.path.stat().st_size))

    arq.Stages.save = timed
    try:
        with tempfile.TemporaryDirectory() as place:
            config = arq.parse_config([*options, "--out", f"{place}/run"])
            arq.run(config)
            lines = Path(place, "run", "search.jsonl").read_text().splitlines()
    finally:
        arq.Stages.save = save
    episode = statistics.median(json.loads(line)["seconds"] for line in lines)
    stages = {name: {"seconds": round(statistics.median(some for some, _ in values), 4),
                     "bytes": int(statistics.median(size for _, size in values)), "saves": len(values)}
              for name, values in saves.items()}
    return {"options": " ".join(options), "episode_seconds": episode, "saves": stages,
            "share_of_an_episode": round(stages["search"]["seconds"] / episode, 5)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overhead", action="store_true", help="only the time and bytes of saved states")
    parser.add_argument("--data", help="image tree of CIFAR-10, for --overhead")
    parser.add_argument("--checkpoint", help="float ResNet-20, for --overhead")
    options = parser.parse_args()
    path = ROOT / "results" / "resume.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    if options.overhead:
        short = "--epochs 1 --finetune-epochs 0.2 --images 10"  # the search as in the default command
        results["overhead"] = {"shapes": overhead(short.split())}
        if options.checkpoint:
            real = ("--dataset cifar10 --episodes 12 --episode-steps 12 --finetune-epochs 0.05 --images 4 "
                    "--n 100 --search-images 100 --search-n 1000 --n-p 100").split()
            results["overhead"]["cifar10"] = overhead([*real, "--data", options.data,
                                                       "--checkpoint", options.checkpoint])
        print(json.dumps(results["overhead"], indent=1))
    else:
        results["killed"] = killed_again_and_again(options.kills, options.seed)
    path.write_text(json.dumps(results, indent=1) + "\n")
    return bool(results.get("killed", {}).get("differing"))


if __name__ == "__main__":
    sys.exit(main())
