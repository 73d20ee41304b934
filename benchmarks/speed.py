"""How fast are certification and quantized training?

    python benchmarks/speed.py          # nine minutes; --quick: two, ResNet-20 on one thread

Medians of rounds in turn, in one process; weights are random, which changes no time.
certification: noisy images per second, of float as published code runs it (BatchNorm unfolded,
NCHW), float at its best (folded, channels_last), fake-quantized as usual (scale, round, clip
and back, at every call), and integer networks; 4 bits, first and last layer 8. training:
quantized and float ResNet-20 in float32 and bfloat16, over float in float32. Prints, and
writes results/speed.json, by instruction set: ONEDNN_MAX_CPU_ISA=AVX2 in front makes a
processor one without VNNI; "bfloat16" marks processors that have it.
"""

import argparse
import copy
import json
import os
import statistics
import sys
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

RESULTS = Path(__file__).resolve().parents[1] / "results" / "speed.json"
ROUNDS = 3


def medians(work: dict) -> dict:
    """Median seconds of each callable, in turn, after a call of each that does not count."""
    times = {name: [] for name in work}
    for call in work.values():
        call()
    for _ in range(ROUNDS):
        for name, call in work.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


# ---- certification ----
class UsualFakeQuantize(nn.Module):
    """A layer as quantization is usually simulated."""

    def __init__(self, layer: nn.Module, w_bits: int, a_bits: int):
        super().__init__()
        self.layer = copy.deepcopy(layer)
        self.weight = layer.weight.detach().clone()
        self.w_max, self.a_max = 2 ** (w_bits - 1) - 1, 2**a_bits - 1
        dims = tuple(range(1, self.weight.ndim))
        self.w_step = self.weight.abs().amax(dims, keepdim=True) / self.w_max
        self.a_step = 4 / self.a_max

    def forward(self, x):
        w = (self.weight / self.w_step).round().clamp(-self.w_max, self.w_max)
        self.layer.weight.data = w * self.w_step
        return self.layer((x / self.a_step).round().clamp(0, self.a_max) * self.a_step)


def build_networks(arch: str, size: int) -> dict[str, nn.Module]:
    """The same network, float and at 4 bits, as several programs run it."""
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
        layer = fake.net.get_submodule(name)
        fake.net.set_submodule(name, UsualFakeQuantize(layer, *bits))
    networks = {"float, published": float_network}
    networks["float, best"] = fold(float_network).to(memory_format=torch.channels_last)
    networks["fake-quantized"] = fake
    quantized = quantized.to(memory_format=torch.channels_last)
    for backends in (("int8", "float32"), ("float32",)):
        network = models.integer_network(quantized, backends=backends)
        networks[f"ours, {network.backend}"] = network
    return {name: network.eval() for name, network in networks.items()}


def certification(arch: str, size: int, batch_sizes: list[int]) -> dict:
    """Images per second that each network samples, by batch size; int8's best over others'."""
    networks = build_networks(arch, size)
    per_second = {name: {} for name in networks}
    image = torch.randint(256, (1, 3, size, size)) / 255
    for batch_size in batch_sizes:
        n = max(batch_size, 100 if size == 32 else 10)
        work = {}
        for name, network in networks.items():
            g = certify.Smooth(network, 10, 0.25, batch_size=batch_size)
            work[name] = lambda g=g: g.sample_under_noise(image, [0], n, g.key)
        for name, seconds in medians(work).items():
            per_second[name][str(batch_size)] = round(n / seconds, 1)
    best = {name: max(values.values()) for name, values in per_second.items()}
    fastest = next(name for name in best if name.startswith("ours, int8"))
    ratios = {name: round(best[fastest] / value, 2) for name, value in best.items()}
    parts = shares(networks[fastest], size)
    return {"per_second": per_second, "int8 over others": ratios, "shares of int8": parts}


def shares(network: nn.Module, size: int) -> dict:
    """The five operators that take most of a network's time, and their shares of it."""
    x = torch.rand(50 if size == 32 else 10, 3, size, size)
    with torch.inference_mode(), torch.profiler.profile() as profiler:
        network(x)
    times = {row.key: row.self_cpu_time_total for row in profiler.key_averages()}
    largest = sorted(times, key=times.get, reverse=True)[:5]
    return {name: round(times[name] / sum(times.values()), 3) for name in largest}


# ---- training ----
def training() -> dict:
    """Images trained per second, over those of the float network in float32."""
    torch.manual_seed(0)
    float_network = models.build_classifier("resnet20", 10)
    float_network = float_network.to(memory_format=torch.channels_last)
    quantized = copy.deepcopy(float_network)
    table = models.quantize_model(quantized, 32)
    x, labels = torch.rand(128, 3, 32, 32), torch.arange(128) % 10
    models.calibrate(quantized, [x])
    models.set_policy(quantized, models.uniform_policy(table, 4))

    def train(network: nn.Module, in_bfloat16: bool) -> None:
        network.train()
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9, nesterov=True)
        for _ in range(4):
            noisy = x + 0.25 * torch.randn_like(x)
            with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
                logits = network(noisy)
            optimizer.zero_grad()
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()

    work = {
        "float, float32": lambda: train(float_network, False),
        "quantized, float32": lambda: train(quantized, False),
        "float, bfloat16": lambda: train(float_network, True),
        "quantized, bfloat16": lambda: train(quantized, True),
    }
    seconds = medians(work)
    reference = seconds["float, float32"]
    return {name: round(reference / value, 3) for name, value in seconds.items()}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="ResNet-20 on one thread")
    options = parser.parse_args(argv)
    batch_sizes = [50, 100] if options.quick else [10, 25, 50, 100, 250, 1000]
    measured = {"torch": torch.__version__}
    measured["capability"] = torch.backends.cpu.get_cpu_capability()
    for threads in (1,) if options.quick else (1, 2):
        torch.set_num_threads(threads)
        parts = {"resnet20": certification("resnet20", 32, batch_sizes)}
        if not options.quick:
            parts["resnet50"] = certification("resnet50", 224, [10])
        parts["training"] = training()
        measured[f"{threads} threads"] = parts
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    name = os.environ.get("ONEDNN_MAX_CPU_ISA", "all instructions")
    name += ", bfloat16" if arq.BFLOAT16["cpu"] else ""
    arq.write_whole(RESULTS, {**results, name: measured})
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
