"""What do interruptions and a second process cost a run?

    python benchmarks/operations.py kills      # five minutes on a core
    python benchmarks/operations.py processes  # five minutes on two idle cores

kills: a small run through every stage, ended by SIGKILL at 20 seeded random moments and
continued by the same command, leaves what an uninterrupted one leaves. processes: images
certified per second by two processes over one, and whether certificates are equal. Each
writes its part of results/operations.json.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import arq
import certify

ROOT = Path(__file__).resolve().parents[1]
ARQ = [sys.executable, str(ROOT / "arq.py")]
RESULTS = ROOT / "results" / "operations.json"
MODEL = ROOT / "results" / "shapes-resnet8-sigma0.25" / "model.arq"
SMALL_RUN = (
    "--image-size 16 --epochs 4 --episodes 12 --episode-batches 4 --finetune-epochs 2.5 "
    "--images 40 --n 400 --search-images 40 --search-n 400 --n-p 100 --device cpu"
)


# ---- killed again and again ----
def contents(folder: Path) -> dict:
    """What a run left, by file, without times."""
    names = "policy.json", "model.arq", "config.json"
    left = {name: (folder / name).read_bytes() for name in names}
    weights = arq.read_state(folder / "base.pt")
    left["base.pt"] = {name: value.tolist() for name, value in weights.items()}
    for name in ("certificates.tsv", "base_certificates.tsv"):
        rows = certify.read_certificates(folder / name)
        left[name] = [row._replace(time="") for row in rows]
    cache = arq.read_state(folder / "search_cache.pt")
    rows = [row._replace(time="") for row in cache.certificates]
    left["search_cache.pt"] = rows, cache.predictions.tolist()
    lines = (folder / "search.jsonl").read_text().splitlines()
    left["search.jsonl"] = [json.loads(line) for line in lines]
    left["results.json"] = json.loads((folder / "results.json").read_text())
    del left["results.json"]["seconds"]
    return left


def run_for(place: Path, words: str, seconds: float | None) -> str | None:
    """Start or continue place/run and kill it after so many seconds. The last line that it had
    printed; None where the run ended by itself."""
    place.mkdir(exist_ok=True)
    command = [*ARQ, *words.split(), "--out", "run"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=place, **pipes)
    try:
        printed, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        printed, _ = process.communicate()
        return (printed.strip().splitlines() or ["before the first line"])[-1]
    assert process.returncode == 0, printed
    return None


def kills(count: int, words: str) -> dict:
    """Kills at moments spread over the time of a whole run; one that ends first begins anew."""
    moments, log, runs, differing = random.Random(0), [], 0, set()
    with tempfile.TemporaryDirectory() as place:
        whole, broken = Path(place, "whole"), Path(place, "broken")
        began = time.monotonic()
        run_for(whole, words, None)
        seconds = time.monotonic() - began
        expected = contents(whole / "run")
        while len(log) < count or broken.exists():
            wait = moments.uniform(0, 0.6) * seconds if len(log) < count else None
            last_line = run_for(broken, words, wait)
            if last_line is not None:
                log.append(f"after {wait:.1f} s: {last_line}")
                print(f"  kill {len(log)} {log[-1]}", flush=True)
                continue
            runs += 1
            left = contents(broken / "run")
            differing |= {name for name in left if left[name] != expected[name]}
            shutil.rmtree(broken)
    return {"kills": log, "runs": runs, "files": [*expected], "differing": sorted(differing)}


# ---- several processes ----
def processes(rounds: int) -> dict:
    """Two single-threaded processes against one, in turn, `rounds` times."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    starts = {1: ARQ, 2: [*torchrun, "--nproc-per-node=2", "--", ARQ[1]]}
    words = ["--evaluate", str(MODEL), "--images", "60", "--n", "1000", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    per_second, certificates = {1: [], 2: []}, {}
    for _ in range(rounds):
        for number, start in starts.items():
            with tempfile.TemporaryDirectory() as place:
                command = [*start, *words, "--out", f"{place}/run"]
                subprocess.run(command, check=True, env=environment, capture_output=True)
                results = json.loads(Path(place, "run", "results.json").read_text())
                rows = certify.read_certificates(f"{place}/run/certificates.tsv")
            per_second[number].append(60 / sum(results["seconds"].values()))
            certificates[number] = [(row.idx, row.n_a, row.radius) for row in rows]
    ratios = [two / one for one, two in zip(per_second[1], per_second[2])]
    equal = certificates[1] == certificates[2]
    return {"ratios": ratios, "median": statistics.median(ratios), "equal_certificates": equal}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("kills", "processes"))
    options = parser.parse_args(argv)
    measured = kills(20, SMALL_RUN) if options.part == "kills" else processes(5)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    arq.write_whole(RESULTS, {**results, options.part: measured})
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
