"""What does a larger data set, a second process, an ImageNet search cost?

    python benchmarks/scale.py processes [--rounds 5]  # certificates a second: two processes against one
    python benchmarks/scale.py memory --data data      # peak memory at 1x and 10x images (tree of CIFAR-10)
    python benchmarks/scale.py imagenet                # GPU hours by counted passes, where GPUs saturate

Prints, and keeps each part in results/scale.json. No GPU is needed: `imagenet` counts the passes of the
default options, takes a GPU's images a second from a published table, and measures here what GPUs cannot
share out: the agent, the quantization of its policy, the checks of the integer network, the state.
"""

import argparse
import copy
import json
import math
import os
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
import models  # noqa: E402

MODEL = ROOT / "results" / "shapes-resnet8-sigma0.25" / "model.arq"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
# ResNet-50 on one V100 (16 GB), float32 inference and mixed-precision training, images a second at the best
# batch, as NVIDIA publishes them (DeepLearningExamples, PyTorch/Classification/ConvNets/resnet50v1.5).
V100 = {"inference": 1261, "training": 1200}
TRAINING_IMAGES = 1_281_167
RIGHT = 0.6  # of the search images: about the smoothed accuracy of published ResNet-50 at sigma 0.25


def processes(rounds: int) -> dict:
    """Images certified a second by one single-threaded process and by two, in turn, and the certificates."""
    found, tables = {1: [], 2: []}, {}
    with tempfile.TemporaryDirectory() as place:
        for turn in range(rounds):
            for count in (1, 2):
                start = [sys.executable] if count == 1 else [*TORCHRUN, "--nproc-per-node=2", "--"]
                out = f"{place}/{count}-{turn}"
                command = ["--evaluate", str(MODEL), "--images", "60", "--n", "1000", "--device", "cpu"]
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                subprocess.run([*start, str(ROOT / "arq.py"), *command, "--out", out], check=True, cwd=place,
                               env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                stage = json.loads(Path(out, "results.json").read_text())["stages"]["certify"]
                found[count].append(60 / stage["seconds"])
                rows = certify.read_certificates(f"{out}/certificates.tsv")
                tables[count] = [(row.idx, row.n_a, row.radius) for row in rows]
            print(f"  round {turn + 1}: two over one {found[2][-1] / found[1][-1]:.3f}", flush=True)
    ratios = [two / one for one, two in zip(found[1], found[2])]
    return {"images_a_second": {str(count): values for count, values in found.items()}, "ratios": ratios,
            "median": statistics.median(ratios), "same_certificates": tables[1] == tables[2]}


def memory(data: str) -> dict:
    """Peak resident memory of a run through every stage on 5,000 and on 50,000 image files."""
    peaks = {}
    options = ("--dataset folder --arch resnet8 --epochs 1 --episodes 2 --episode-steps 2 "
               "--finetune-epochs 0.1 --images 10 --n 100 --search-images 20 --search-n 100 --n-p 50 "
               "--device cpu").split()
    for count in (5_000, 50_000):
        with tempfile.TemporaryDirectory() as place:
            for split in ("train", "test"):
                for folder in sorted(Path(data, split).iterdir()):
                    target = Path(place, "data", split, folder.name)
                    target.mkdir(parents=True)
                    for file in sorted(folder.iterdir())[:count // 10]:
                        (target / file.name).symlink_to(file.resolve())
            command = [sys.executable, str(ROOT / "arq.py"), *options, "--out", "run"]
            child = subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(child.pid, 0)
            assert status == 0
            peaks[count] = usage.ru_maxrss / 1024
            print(f"  {count} images: {peaks[count]:.0f} MiB", flush=True)
    return {"peak_mib": peaks, "ratio": peaks[50_000] / peaks[5_000],
            "bytes_an_image": (peaks[50_000] - peaks[5_000]) * 2 ** 20 / 45_000}


def serial_seconds() -> dict:
    """ResNet-50 at 224 pixels: an episode's seconds that every process spends alike, on this CPU."""
    config = arq.parse_config("--dataset imagenet --device cpu --data .".split())
    classifier = models.build_classifier("resnet50", 1000).eval()
    table = models.quantize_model(classifier, 224)
    models.calibrate(classifier, [torch.rand(2, 3, 224, 224)])
    environment = arq.BitWidthEnvironment(table, config.budget)
    agent = arq.DDPG(environment.state_size, 0, arq.DDPGConfig(episodes=600))
    agent.episode = 100
    parts: dict[str, list] = {}
    states, actions, policy = environment.rollout(agent.act)
    for episode in range(128):  # the replay full, and the records of 600 episodes: the largest state
        agent.replay.add(states, actions, float(episode))
    records = [{"episode": episode, "acr": 0.1, "policy": policy} for episode in range(600)]

    def timed(name, work, *arguments):
        start = time.monotonic()
        value = work(*arguments)
        parts.setdefault(name, []).append(time.monotonic() - start)
        return value

    base_state = copy.deepcopy(classifier.state_dict())
    with tempfile.TemporaryDirectory() as place:
        stages = arq.Stages(Path(place, "state.pt"), {"search": {}})
        stages.begins("search", Path(place, "none"))
        for episode in range(5):
            states, actions, policy = timed("agent acts", environment.rollout, agent.act)
            timed("weights restored", classifier.load_state_dict, base_state)
            timed("policy set: step sizes", models.set_policy, classifier, policy)
            timed("integer network: built and checked", models.integer_network, classifier)
            timed("agent learns", agent.learn, states, actions, 0.1 * episode)
            timed("state saved", stages.save, {"agent": agent.state_dict(), "records": records})
    return {name: statistics.median(values) for name, values in parts.items()}


def imagenet() -> dict:
    """Passes of the default options for ImageNet, as arq.py counts them, and the hours they take."""
    config = arq.parse_config("--dataset imagenet --device cpu --data .".split())
    right = round(RIGHT * config.search_images)
    certificate = config.n0 + config.n
    passes = {  # (forward passes of evaluation, images of training)
        "train the base": (0, config.epochs * TRAINING_IMAGES),
        "certify the base, search images": (config.search_images * config.n0 + right * config.search_n, 0),
        "search": (config.episodes * right * config.n_p,
                   config.episodes * config.episode_steps * config.batch_size),
        "fine-tune": (0, config.finetune_epochs * TRAINING_IMAGES),
        "certify both, test images": (2 * config.images * certificate, 0)}
    hours = {name: (evaluated / V100["inference"] + trained / V100["training"]) / 3600
             for name, (evaluated, trained) in passes.items()}
    serial = serial_seconds()
    alike = sum(serial.values())
    episodes = {}
    for count in (1, 8, 64, 512):
        # Whole images: the process with most of them is waited for. arq.py wants one search image and two
        # training images a process at least, so 512 need --search-images 512 and --batch-size 1024.
        most = math.ceil(RIGHT * max(config.search_images, count) / count)
        evaluate = most * config.n_p / V100["inference"]
        step = config.episode_steps * math.ceil(max(config.batch_size, 2 * count) / count) / V100["training"]
        episodes[count] = {"evaluation": evaluate, "fine-tuning": step, "alike on all": alike,
                           "seconds": evaluate + step + alike}
    for row in episodes.values():
        row["speedup"] = episodes[1]["seconds"] / row["seconds"]
        row["search_hours"] = row["seconds"] * config.episodes / 3600
    return {"right_images": right, "passes": passes, "gpu_hours": hours, "images_a_second": V100,
            "serial_seconds": serial, "episode_by_gpus": episodes}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("processes", "memory", "imagenet"))
    parser.add_argument("--data", default="data")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    parts = {"processes": lambda: processes(options.rounds), "memory": lambda: memory(options.data),
             "imagenet": imagenet}
    found = parts[options.part]()
    path = ROOT / "results" / "scale.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**kept, options.part: found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
