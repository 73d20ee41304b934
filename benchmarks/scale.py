"""What does a larger data set, a second process, an ImageNet search cost?

    python benchmarks/scale.py processes [--rounds 5]  # certificates per second: two processes against one
    python benchmarks/scale.py memory --data data      # peak memory at 1x and 10x images (tree of CIFAR-10)
    python benchmarks/scale.py imagenet                # GPU hours by counted passes, where GPUs saturate

Prints, and keeps each part in results/scale.json. No GPU is needed: `imagenet` counts the passes of the
default options, takes a GPU's images per second from a published table, and measures here what GPUs cannot
share out: the agent, the quantization of its policy, the checks of the integer network, the state.
"""

import argparse
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import arq
import certify
import models
from benchmarks.resume import largest_state
from ddpg import DDPG, DDPGConfig

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "results" / "shapes-resnet8-sigma0.25" / "model.arq"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
# ResNet-50 on one V100 (16 GB), float32 inference and mixed-precision training, images per second at the best
# batch, as NVIDIA publishes them (DeepLearningExamples, PyTorch/Classification/ConvNets/resnet50v1.5).
V100 = {"inference": 1261, "training": 1200}
TRAINING_IMAGES = 1_281_167
RIGHT = 0.6  # of the search images: about the smoothed accuracy of published ResNet-50 at sigma 0.25


def processes(rounds: int) -> dict:
    """Images certified per second by one single-threaded process and by two, in turn; the certificates."""
    found, tables = {1: [], 2: []}, {}
    command = ["--evaluate", str(MODEL), "--images", "60", "--n", "1000", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with tempfile.TemporaryDirectory() as place:
        for turn in range(rounds):
            for count in (1, 2):
                start = [sys.executable] if count == 1 else [*TORCHRUN, "--nproc-per-node=2", "--"]
                out = f"{place}/{count}-{turn}"
                whole = [*start, str(ROOT / "arq.py"), *command, "--out", out]
                subprocess.run(whole, check=True, cwd=place, env=environment, **quiet)
                stage = json.loads(Path(out, "results.json").read_text())["stages"]["certify"]
                found[count].append(60 / stage["seconds"])
                rows = certify.read_certificates(f"{out}/certificates.tsv")
                tables[count] = [(row.idx, row.n_a, row.radius) for row in rows]
            print(f"  round {turn + 1}: two over one {found[2][-1] / found[1][-1]:.3f}", flush=True)
    ratios = [two / one for one, two in zip(found[1], found[2])]
    return {
        "images_per_second": {str(count): values for count, values in found.items()},
        "ratios": ratios,
        "median": statistics.median(ratios),
        "same_certificates": tables[1] == tables[2],
    }


def memory(data: str) -> dict:
    """Peak resident memory of a run through every stage on 5,000 and on 50,000 image files."""
    peaks = {}
    options = (
        "--dataset folder --arch resnet8 --epochs 1 --episodes 2 --finetune-steps 2 --finetune-epochs 0.1 "
        "--images 10 --n 100 --search-images 20 --search-n 100 --n-p 50 --device cpu"
    ).split()
    for count in (5_000, 50_000):
        with tempfile.TemporaryDirectory() as place:
            for folder in sorted(Path(data).glob("t*/*")):  # train/<class>, test/<class>
                target = Path(place, "data", folder.parent.name, folder.name)
                target.mkdir(parents=True)
                for file in sorted(folder.iterdir())[: count // 10]:
                    (target / file.name).symlink_to(file.resolve())
            command = [sys.executable, str(ROOT / "arq.py"), *options, "--out", "run"]
            child = subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(child.pid, 0)
            assert status == 0
            peaks[count] = usage.ru_maxrss / 1024
            print(f"  {count} images: {peaks[count]:.0f} MiB", flush=True)
    grown = peaks[50_000] - peaks[5_000]
    return {
        "peak_mib": peaks,
        "ratio": peaks[50_000] / peaks[5_000],
        "bytes_per_image": grown * 2**20 / 45_000,
    }


def serial_seconds(config: arq.Config) -> dict:
    """ResNet-50 at 224 pixels: an episode's seconds that every process spends alike, on this CPU."""
    classifier = models.build_classifier("resnet50", 1000).eval()
    table = models.quantize_model(classifier, 224)
    models.calibrate(classifier, [torch.rand(2, 3, 224, 224)])
    environment = arq.BitWidthEnvironment(table, config.budget)
    evaluate = arq.PolicyEvaluator(classifier, finetune=None, certificate=None)
    agent = DDPG(environment.state_size, 0, DDPGConfig(episodes=600, warmup_episodes=0))
    state = largest_state(environment, 600)
    parts: dict[str, list] = {}

    def timed(name, work, *arguments):
        start = time.monotonic()
        value = work(*arguments)
        parts.setdefault(name, []).append(time.monotonic() - start)
        return value

    with tempfile.TemporaryDirectory() as place:
        for episode in range(5):
            states, actions, policy = timed("agent acts", environment.rollout, agent.act)
            quantized = timed("weights restored, policy set", evaluate.quantize, policy)
            timed("integer network: built and checked", models.integer_network, quantized)
            timed("agent learns", agent.learn, states, actions, 0.1 * episode)
            timed("state saved", arq.write_whole, Path(place, "state.pt"), state)
    return {name: statistics.median(values) for name, values in parts.items()}


def imagenet() -> dict:
    """Passes of the default options for ImageNet, as arq.py counts them, and the hours they take."""
    config = arq.parse_config("--dataset imagenet --device cpu --data .".split())
    right = round(RIGHT * config.search_images)
    finetuned = config.episodes * config.finetune_steps * config.batch_size
    passes = {  # (forward passes of evaluation, images of training)
        "train the base": (0, config.epochs * TRAINING_IMAGES),
        "certify the base, search images": (config.search_images * config.n0 + right * config.search_n, 0),
        "search": (config.episodes * right * config.n_p, finetuned),
        "fine-tune": (0, config.finetune_epochs * TRAINING_IMAGES),
        "certify both, test images": (2 * config.images * (config.n0 + config.n), 0),
    }
    hours = {
        name: (evaluated / V100["inference"] + trained / V100["training"]) / 3600
        for name, (evaluated, trained) in passes.items()
    }
    serial = serial_seconds(config)
    alike = sum(serial.values())
    episodes = {}
    for count in (1, 8, 64, 512):
        # Whole images: the process with most of them is waited for. arq.py wants one search image and two
        # training images per process at least: 512 need --search-images 512 and --batch-size 1024.
        most = math.ceil(RIGHT * max(config.search_images, count) / count)
        batch = math.ceil(max(config.batch_size, 2 * count) / count)
        evaluation = most * config.n_p / V100["inference"]
        finetuning = config.finetune_steps * batch / V100["training"]
        seconds = evaluation + finetuning + alike
        episodes[count] = {
            "evaluation": evaluation,
            "fine-tuning": finetuning,
            "alike on all": alike,
            "seconds": seconds,
            "speedup": episodes[1]["seconds"] / seconds if episodes else 1.0,
            "search_hours": seconds * config.episodes / 3600,
        }
    return {
        "right_images": right,
        "passes": passes,
        "gpu_hours": hours,
        "images_per_second": V100,
        "serial_seconds": serial,
        "episode_by_gpus": episodes,
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("processes", "memory", "imagenet"))
    parser.add_argument("--data", default="data")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    options = parser.parse_args(argv)
    parts = {
        "processes": lambda: processes(options.rounds),
        "memory": lambda: memory(options.data),
        "imagenet": imagenet,
    }
    found = parts[options.part]()
    path = options.out / "scale.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    arq.write_whole(path, {**kept, options.part: found})
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
