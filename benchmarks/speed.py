"""How fast it is: training, an episode by its parts, certification; ratios of things timed in turn.

    python benchmarks/speed.py --quick                  # ResNet-20 on one thread: three minutes
    python benchmarks/speed.py                          # also two threads, all batch sizes and ResNet-50

Medians of --rounds, in one process. Certification: images per second through the network alone and through
sampling (noise included), of float as published code runs it (BatchNorm unfolded, NCHW), float at its best
(folded, channels_last), fake-quantized as usual (scale, round, clip and back, at every call), and ours on
each backend. Training: steps of float and quantized networks, in float32 and, where the processor has
instructions for it, in bfloat16. 4 bits, first and last layer 8; weights are random, which changes no time.
Writes speed.json and speed.txt under --out (results/); the last line is JSON. ONEDNN_MAX_CPU_ISA=AVX2
before it makes the processor one without VNNI, whose bfloat16 is emulated (nine minutes, with --quick).
"""

import argparse
import contextlib
import copy
import ctypes
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.fx.experimental.optimization import fuse as fold
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import arq
import certify
import models
from ddpg import DDPG, DDPGConfig

ROOT = Path(__file__).resolve().parents[1]


class Fake(nn.Module):
    """A layer as quantization is usually simulated."""

    def __init__(self, layer: nn.Module, w_bits: int, a_bits: int):
        super().__init__()
        self.layer, self.w_bits, self.a_bits = copy.deepcopy(layer), w_bits, a_bits
        self.plain = layer.weight.detach().clone()
        largest = self.plain.flatten(1).abs().amax(1).view(-1, *[1] * (self.plain.ndim - 1))
        self.w_step = largest / (2 ** (w_bits - 1) - 1)

    def forward(self, x):
        top, step = 2 ** (self.w_bits - 1) - 1, 4 / 2**self.a_bits
        self.layer.weight.data = (self.plain / self.w_step).round().clamp(-top, top) * self.w_step
        return self.layer((x / step).round().clamp(0, 2**self.a_bits - 1) * step)


def variants(arch: str, size: int) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    float_network = models.build_classifier(arch, 10).eval()
    for module in float_network.modules():  # alive all the way down, or layers see zeros
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias, 0, 0.5)
    quantized = copy.deepcopy(float_network)
    table = models.quantize_model(quantized, size)
    models.calibrate(quantized, [torch.rand(4, 3, size, size)])
    policy = models.uniform_policy(table, 4)
    models.set_policy(quantized, policy)
    fake = copy.deepcopy(float_network)
    for name, bits in policy.items():
        fake.net.set_submodule(name, Fake(fake.net.get_submodule(name), *bits))
    networks = {
        "float, published": float_network,
        "float, best": fold(float_network).to(memory_format=torch.channels_last),
        "fake-quantized": fake,
    }
    quantized = quantized.to(memory_format=torch.channels_last)
    for backend, backends in (("int8", ("int8", "float32")), ("float32", ("float32",))):
        network = models.integer_network(quantized, backends=backends)
        print(f"{arch}, {backends[0]} first: runs on {network.backend}")
        if backend in network.backend:
            networks[f"ours, {backend}"] = network
    return {name: network.eval() for name, network in networks.items()}


def medians(work: dict, rounds: int) -> dict:
    """Median seconds of each callable, called in turn."""
    times = {name: [] for name in work}
    for call in work.values():
        call()
    for _ in range(rounds):
        for name, call in work.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(arch: str, size: int, batches: list[int], rounds: int, counts) -> list[dict]:
    networks, rows = variants(arch, size), []
    for threads in counts:
        torch.set_num_threads(threads)
        for batch in batches:
            x = torch.rand(batch, 3, size, size)
            n = max(batch, 100 if size == 32 else 10)
            work = {}
            for name, network in networks.items():
                g = certify.Smooth(network, 10, 0.25, batch_size=batch)
                work[name, "network"] = lambda network=network: network(x)
                work[name, "sampling"] = lambda g=g: g.sample_under_noise(x[:1], [0], n, g.key)
            with torch.inference_mode():
                seconds = medians(work, rounds)
            for (name, what), value in seconds.items():
                per_second = round((batch if what == "network" else n) / value, 1)
                row = {"arch": arch, "threads": threads, "batch": batch}
                rows.append({**row, "variant": name, "what": what, "per_second": per_second})
                print(*rows[-1].values(), flush=True)
    return rows


@torch.inference_mode()
def layer_times(network: nn.Module, rounds: int) -> dict:
    """One thread, batch 50: each layer of ours with what is fused in, and its bare float convolution."""
    torch.set_num_threads(1)
    calls, rows = {}, []

    def keep(name):
        def hook(layer, inputs):
            calls[name] = [part.clone() for part in inputs if part is not None]

        return hook

    layers = models.quant_layers(network)
    hooks = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    network(torch.rand(50, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    for name, inputs in calls.items():
        layer = layers[name]
        if inputs[0].ndim == 2:  # a linear layer
            continue
        x = inputs[0].float().contiguous(memory_format=torch.channels_last)
        weight = layer.weight.float().contiguous(memory_format=torch.channels_last)
        work = {
            "ours": lambda: layer(*inputs),
            "float convolution": lambda: F.conv2d(x, weight, **layer.conv),
        }
        if layer.backend == "int8":
            alone, q = models.Int8Layer(layer.freeze()), inputs[0].to(torch.uint8)
            work["our convolution alone"] = lambda: alone(q)
        seconds = medians(work, 3 * rounds)
        rows.append({"layer": name, **{what: 1e6 * value / 50 for what, value in seconds.items()}})
    whole = medians({"network": lambda: network(torch.rand(50, 3, 32, 32))}, rounds)["network"]
    return {"layers": rows, "tried": conversions(5 * rounds), "whole": 1e6 * whole / 50}


def conversions(rounds: int) -> dict:
    """Ways from floats to uint8 integers: time over that of the way used."""
    x = torch.rand(50, 16, 32, 32).contiguous(memory_format=torch.channels_last)
    layer = models.QuantLayer(nn.Conv2d(16, 16, 3), nn.Identity(), (16, 32, 32))
    ones = torch.ones(16)
    weight = torch.ones(16, 16, 3, 3, dtype=torch.int8)
    integers = models.Integers(weight, ones[0], ones, ones, 4, 4, False, layer.conv, layer.in_shape)
    ways = {"quantize_per_tensor, its bytes (used)": None}
    with contextlib.suppress(RuntimeError):
        used = models.Int8Layer(integers)
        ways["quantize_per_tensor, its bytes (used)"] = lambda: used._to_uint8(x, 0.1)
        ways["quantize_per_tensor, int_repr"] = lambda: (
            torch.quantize_per_tensor(x, 0.1, 0, torch.quint8).int_repr().clamp_(max=15)
        )
        ways["divide, round, clip, by way of int8"] = lambda: (
            (x / 0.1).round_().clamp_(0, 15).to(torch.int8).view(torch.uint8)
        )
        ways["divide, round, clip, to(uint8)"] = lambda: (x / 0.1).round_().clamp_(0, 15).to(torch.uint8)
        seconds = medians(ways, rounds)
        return {name: value / next(iter(seconds.values())) for name, value in seconds.items()}
    return {}


def training(rounds: int, threads: int, steps: int = 4) -> dict:
    """Images trained per second over those of the float network in float32, ResNet-20, batches of 128."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    float_network = models.build_classifier("resnet20", 10).to(memory_format=torch.channels_last)
    quantized = copy.deepcopy(float_network)
    table = models.quantize_model(quantized, 32)
    x, labels = torch.rand(128, 3, 32, 32), torch.arange(128) % 10
    models.calibrate(quantized, [x])
    models.set_policy(quantized, models.uniform_policy(table, 4))

    def train(network, bfloat16):
        network.train()
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9, nesterov=True)
        for _ in range(steps):
            noisy = x + 0.25 * torch.randn_like(x)
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                logits = network(noisy)
            optimizer.zero_grad()
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()

    networks = {"float": float_network, "quantized": quantized}
    kinds = {"float32": False, "bfloat16": True} if "cpu" in arq.AUTOCAST_DEVICES else {"float32": False}
    work = {
        f"{name}, {kind}": lambda network=network, bfloat16=bfloat16: train(network, bfloat16)
        for kind, bfloat16 in kinds.items()
        for name, network in networks.items()
    }
    seconds = medians(work, rounds)
    return {name: seconds["float, float32"] / value for name, value in seconds.items()}


EPISODES = {  # as in the README's CIFAR-10 run; and a small one of ResNet-50, whose parts are scaled up
    "resnet20": {"size": 32, "images": 100, "n": 500, "n_p": 250, "steps": 12, "batch": 128},
    "resnet50": {"size": 224, "images": 4, "n": 20, "n_p": 20, "steps": 1, "batch": 8},
}
DEFAULT = {"resnet50": {"train": 20 * 128 / 8, "sample": 500 * 1000 / 80}}  # times as many images


def episode(arch: str, rounds: int, threads: int) -> dict:
    """Seconds of an episode's parts, and the share that is neither training nor sampling."""
    torch.set_num_threads(threads)
    of = EPISODES[arch]
    pixels = torch.randint(0, 256, (300, 3, of["size"], of["size"]), dtype=torch.uint8)
    labels = [i % 10 for i in range(300)]
    images = arq.ImageSet(labels, list("abcdefghij"), of["size"], pixels)
    train_images, search_images = arq.hold_out(images, of["images"])
    options = f"--dataset imagenet --device cpu --arch {arch} --image-size {of['size']} --n-p {of['n_p']}"
    options += f" --search-images {of['images']} --search-n {of['n']} --finetune-steps {of['steps']}"
    options += f" --batch-size {of['batch']}"
    config = arq.parse_config(options.split())
    base = arq.build_base(config, 10)
    x = search_images.batch(range(of["images"]))
    g = certify.Smooth(base, 10, config.sigma, config.seed, config.eval_batch)
    selected = g.sample_under_noise(x, search_images.ids, config.n0, g.key + "/select").argmax(1)
    cache = g.certify_and_cache(x, selected, search_images.ids, config.n0, config.search_n)  # all are right
    evaluate = arq.policy_evaluator(base, train_images, search_images, config)
    table = models.quantize_model(copy.deepcopy(base), of["size"])
    environment = arq.BitWidthEnvironment(table, config.budget)
    agent = DDPG(environment.state_size, 0, DDPGConfig(episodes=50, warmup_episodes=1))
    times = {}

    def timed(name, work, *arguments):
        start = time.perf_counter()
        result = work(*arguments)
        times.setdefault(name, []).append(time.perf_counter() - start)
        return result

    with tempfile.TemporaryDirectory() as folder:
        for i in range(rounds + 1):
            states, actions, policy = timed("agent's walk", environment.rollout, agent.act)
            quantized = timed("step sizes of the new bit-widths", evaluate.quantize, policy)
            timed("train", evaluate.finetune, quantized)
            network = timed("integer network, checked", arq.integers, quantized, config)
            g = certify.Smooth(network, 10, config.sigma, batch_size=config.eval_batch)
            timed("sample", g.certify_incremental, x, cache, config.n_p)
            timed("agent's learning", agent.learn, states, actions, float(i))
            timed("saved state", arq.write_whole, Path(folder, "state.pt"), agent.state_dict())
    seconds = {name: statistics.median(values[1:]) for name, values in times.items()}
    scaled = {name: value * DEFAULT.get(arch, {}).get(name, 1) for name, value in seconds.items()}
    other = sum(scaled.values()) - scaled["train"] - scaled["sample"]
    return {"arch": arch, "threads": threads, "seconds": seconds, "other": other / sum(scaled.values())}


def report(found: dict) -> str:
    rows = found["rows"]
    lines = [
        f"torch {found['torch']}, {found['processor']}",
        "",
    ]
    names = list(dict.fromkeys(row["variant"] for row in rows))
    parts = dict.fromkeys((row["arch"], row["threads"], row["what"]) for row in rows)
    for arch, threads, what in sorted(parts, key=lambda part: part[:2]):
        some = [row for row in rows if (row["arch"], row["threads"], row["what"]) == (arch, threads, what)]
        reference = max(row["per_second"] for row in some if row["variant"] == "float, best")
        lines.append(
            f"{arch}, {threads} thread(s), {what}: images per second over those of float at its best batch "
            f"({reference:.0f}/s here)"
        )
        batches = dict.fromkeys(row["batch"] for row in some)
        lines.append(f"  {'batch':<18}" + "".join(f"{batch:>8}" for batch in batches) + "    best")
        for name in names:
            values = [row["per_second"] / reference for row in some if row["variant"] == name]
            cells = "".join(f"{value:8.2f}" for value in [*values, max(values)])
            lines.append(f"  {name:<18}{cells}")
        lines.append("")
    lines.append(
        "ResNet-20 by layer, one thread, batch 50, microseconds per image: ours with quantization, residual "
        "sum and ReLU;\nits convolution alone; the bare float convolution; float over ours"
    )
    columns = "ours", "our convolution alone", "float convolution"
    total = {"layer": "sum", **{key: sum(row.get(key, 0) for row in found["layers"]) for key in columns}}
    for row in [*found["layers"], total]:
        cells = "".join(f"{row.get(key, float('nan')):8.1f}" for key in columns)
        lines.append(f"  {row['layer']:<24}{cells}{row['float convolution'] / row['ours']:8.2f}")
    lines.append(f"  the whole network takes {found['whole']:.1f}")
    lines.append("\nQuantizing floats to uint8, time over that of the way used")
    lines += [f"  {name:<40}{value:8.2f}" for name, value in found["tried"].items()]
    lines.append("\nTraining ResNet-20: images per second over the float network's in float32")
    for threads, ratios in found["training"].items():
        cells = ", ".join(f"{name} {value:.2f}" for name, value in ratios.items())
        lines.append(f"  {threads} thread(s): {cells}")
    for parts in found["episodes"]:
        lines.append(f"\nAn episode of {parts['arch']}, {parts['threads']} thread(s), seconds")
        lines += [f"  {name:<40}{value:8.3f}" for name, value in parts["seconds"].items()]
        note = ", at the default's number of images" if parts["arch"] in DEFAULT else ""
        lines.append(f"  {'neither training nor sampling' + note:<60}{100 * parts['other']:6.2f} %")
    return "\n".join(lines) + "\n"


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="ResNet-20 only, two batch sizes")
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    options = parser.parse_args(argv)
    with contextlib.suppress(OSError, AttributeError, TypeError):  # glibc keeps freed memory, as in arq.main
        ctypes.CDLL(None).mallopt(-3, 2**30)
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)
    networks = variants("resnet20", 32)
    found = layer_times(networks.get("ours, int8") or networks["ours, float32"], options.rounds)
    batches = [50, 100] if options.quick else [10, 25, 50, 100, 250, 1000]
    threads = (1,) if options.quick else (1, 2)
    rows = measure("resnet20", 32, batches, options.rounds, threads)
    found["training"] = {count: training(options.rounds, count) for count in threads}
    found["episodes"] = [episode("resnet20", options.rounds, count) for count in threads]
    if not options.quick:
        rows += measure("resnet50", 224, [10], max(2, options.rounds // 2), threads)
        found["episodes"].append(episode("resnet50", 2, 2))
    found = {"torch": torch.__version__, "processor": processor(), "rows": rows, **found}
    arq.write_whole(options.out / "speed.json", found)
    (options.out / "speed.txt").write_text(report(found))
    print(report(found))

    def best(variant):
        of = {"arch": "resnet20", "threads": 1, "what": "sampling", "variant": variant}
        return max((row["per_second"] for row in rows if of.items() <= row.items()), default=0)

    ratios = found["training"][1]
    last = {
        "training_float32": ratios["quantized, float32"],
        "training_bf16": ratios.get("quantized, bfloat16"),
    }
    last |= {"episode_other": found["episodes"][0]["other"]}
    last |= {"certify_int8": best("ours, int8") / best("float, best")}
    print(json.dumps({name: value and round(value, 3) for name, value in last.items()}))


if __name__ == "__main__":
    main()
