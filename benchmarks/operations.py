"""What do interruptions, a second process and a larger data set cost a run?

    python benchmarks/operations.py kills               # five minutes on a core
    python benchmarks/operations.py processes           # five minutes on two idle cores
    python benchmarks/operations.py memory --data data  # ten minutes; tree of CIFAR-10

kills: a small run through every stage, ended by SIGKILL at 20 seeded random moments and
continued by the same command, leaves what an uninterrupted one leaves. processes: images
certified per second by two processes over one, and whether certificates are equal. memory:
peak resident memory with 5,000 and with 50,000 image files. Each writes its part of
results/operations.json.
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
MODEL = ROOT / "results" / "shapes-resnet8-sigma0.25" / "model.arq"
SMALL_RUN = (
    "--image-size 16 --epochs 4 --episodes 12 --episode-batches 4 --finetune-epochs 2.5 "
    "--images 40 --n 400 --search-images 40 --search-n 400 --n-p 100 --device cpu"
)
FOLDER_RUN = (  # images of more than 64 pixels are not kept in memory
    f"{SMALL_RUN} --dataset folder --arch resnet8 --image-size 65 --epochs 1 --episodes 2 "
    "--finetune-epochs 0.1"
)


# ---- killed again and again ----
def contents(folder: Path) -> dict:
    """What a run left, by file, without times."""
    names = "policy.json", "model.arq", "config.json"
    found = {name: Path(folder, name).read_bytes() for name in names}
    weights = arq.read_state(folder / "base.pt")
    found["base.pt"] = {name: value.tolist() for name, value in weights.items()}
    cache = arq.read_cache(folder / "search_cache.pt")
    tables = {"search_cache.pt": cache.certificates}
    for name in ("certificates.tsv", "base_certificates.tsv"):
        tables[name] = certify.read_certificates(folder / name)
    for name, rows in tables.items():
        found[name] = [row._replace(time="") for row in rows]
    found["search_cache.pt"].append(cache.predictions.tolist())
    lines = Path(folder, "search.jsonl").read_text().splitlines()
    found["search.jsonl"] = [json.loads(line) for line in lines]
    found["results.json"] = json.loads(Path(folder, "results.json").read_text())
    for record in [*found["search.jsonl"], found["results.json"]]:
        del record["seconds"]
    return found


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
        while True:
            wait = moments.uniform(0, 0.6) * seconds if len(log) < count else None
            last_line = run_for(broken, words, wait)
            if last_line is not None:
                log.append(f"after {wait:.1f} s: {last_line}")
                print(f"  kill {len(log)} {log[-1]}", flush=True)
                continue
            runs += 1
            found = contents(broken / "run")
            differing |= {name for name in found if found[name] != expected[name]}
            if len(log) == count:
                break
            shutil.rmtree(broken)
    return {"kills": log, "runs": runs, "files": [*expected], "differing": sorted(differing)}


# ---- several processes, many images ----
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


def memory(data: str) -> dict:
    """Peak resident memory of a tiny run through every stage, by its number of image files."""
    peaks = {}
    for count in (5_000, 50_000):
        with tempfile.TemporaryDirectory() as place:
            for folder in sorted(Path(data).glob("t*/*")):  # train/<class>, test/<class>
                target = Path(place, "data", folder.parent.name, folder.name)
                target.mkdir(parents=True)
                for file in sorted(folder.iterdir())[: count // 10]:
                    (target / file.name).symlink_to(file.resolve())
            command = [
                *ARQ,
                *FOLDER_RUN.split(),
                "--data",
                f"{place}/data",
                "--out",
                f"{place}/run",
            ]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            assert status == 0, f"a run on {count} images failed"
        peaks[str(count)] = usage.ru_maxrss / 1024
    grown = peaks["50000"] - peaks["5000"]
    return {"peak_mib": peaks, "bytes_per_image": grown * 2**20 / 45_000}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("kills", "processes", "memory"))
    parser.add_argument("--count", type=int, help="of kills (20) or rounds (5)")
    parser.add_argument("--data", default="data")
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    options = parser.parse_args(argv)
    if options.part == "kills":
        found = kills(options.count or 20, SMALL_RUN)
    elif options.part == "processes":
        found = processes(options.count or 5)
    else:
        found = memory(options.data)
    path = options.out / "operations.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    arq.write_whole(path, {**results, options.part: found})
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
