"""How fast each way to run a quantized network is, against the float network; where the time goes.

    python benchmarks/inference.py                      # about 6 minutes on two cores

In one process, in turn, medians of --rounds: images a second through the network alone and through sampling
(noise included), for the float network as published code runs it (BatchNorm unfolded, NCHW), float at its
best (folded, channels_last), fake-quantized as usual (scale, round, clip and back, at every call), and ours
on each path. 4 bits, ends 8; random weights, since time does not depend on their values. Writes
inference.json and inference.txt beside this file.
"""

import argparse
import copy
import ctypes
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.fx.experimental.optimization import fuse as fold

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import arq  # noqa: E402
import certify  # noqa: E402
import models  # noqa: E402


class Fake(nn.Module):
    """A layer as quantization is usually simulated."""

    def __init__(self, layer: nn.Module, w_bits: int, a_bits: int):
        super().__init__()
        self.layer, self.w_bits, self.a_bits = copy.deepcopy(layer), w_bits, a_bits
        self.plain = layer.weight.detach().clone()
        self.w_step = layer.weight.detach().flatten(1).abs().amax(1).view(-1, *[1] * (layer.weight.ndim - 1))
        self.w_step /= 2 ** (w_bits - 1) - 1

    def forward(self, x):
        top, step = 2 ** (self.w_bits - 1) - 1, 4 / 2 ** self.a_bits
        self.layer.weight.data = (self.plain / self.w_step).round().clamp(-top, top) * self.w_step
        return self.layer((x / step).round().clamp(0, 2 ** self.a_bits - 1) * step)


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
    for name, (w_bits, a_bits) in policy.items():
        parent, _, last = name.rpartition(".")
        setattr(fake.net.get_submodule(parent), last, Fake(fake.net.get_submodule(name), w_bits, a_bits))
    networks = {"float, published": float_network,
                "float, best": fold(float_network).to(memory_format=torch.channels_last),
                "fake-quantized": fake}
    for path in ("int8", "float32"):
        models.PATHS = (path,)
        try:
            quantized = quantized.to(memory_format=torch.channels_last)
            networks[f"ours, {path}"] = models.integer_network(quantized)
        except RuntimeError:
            print(f"{path}: not on this machine")
    return networks


def medians(work: dict, rounds: int) -> dict:
    """Median seconds of each callable, called in turn."""
    times = {name: [] for name in work}
    for name in work:
        work[name]()
    for _ in range(rounds):
        for name in work:
            start = time.perf_counter()
            work[name]()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(arch: str, size: int, batches: list[int], rounds: int) -> list[dict]:
    networks, rows = variants(arch, size), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for batch in batches:
            x, n = torch.rand(batch, 3, size, size), max(batch, 100 if size == 32 else 10)
            image = x[:1]

            def sampling(network):
                certify.class_counts(network, image, [0], n, 10, 0.25, certify.NoiseKey(0, "b"), batch)

            work = {}
            for name, network in networks.items():
                work[name, "network"] = lambda network=network: network(x)
                work[name, "sampling"] = lambda network=network: sampling(network)
            with torch.inference_mode():
                seconds = medians(work, rounds)
            for (name, what), value in seconds.items():
                count = batch if what == "network" else n
                rows.append(dict(arch=arch, threads=threads, batch=batch, variant=name, what=what,
                                 per_second=round(count / value, 1)))
            print(arch, threads, batch, {f"{name}/{what}": round((batch if what == "network" else n) / value)
                                         for (name, what), value in seconds.items()}, flush=True)
    return rows


def layer_times(rounds: int) -> list[dict]:
    """ResNet-20, one thread, batch 50: each layer of ours with what it merges, and its float convolution."""
    torch.set_num_threads(1)
    models.PATHS, networks, rows = ("int8", "float32"), variants("resnet20", 32), []
    network = networks.get("ours, int8", networks["ours, float32"])
    calls, hooks = {}, []
    for name, layer in models.quant_layers(network).items():
        keep = lambda layer, inputs, name=name: calls.update(  # noqa: E731
            {name: tuple(part.clone() for part in inputs if part is not None)})
        hooks.append(layer.register_forward_pre_hook(keep))
    with torch.inference_mode():
        network(torch.rand(50, 3, 32, 32))
        for hook in hooks:
            hook.remove()
        for name, inputs in calls.items():
            layer = models.quant_layers(network)[name]
            if layer.linear:
                continue
            x, weight = inputs[0].float().contiguous(memory_format=torch.channels_last), layer.weight.float()
            weight = weight.contiguous(memory_format=torch.channels_last)
            q = inputs[0] if layer.ready else layer._to_uint8(
                models.quantize(inputs[0], layer.a_step, layer.low, layer.high))
            work = {"ours": lambda: layer(*inputs),
                    "float convolution": lambda: torch.nn.functional.conv2d(x, weight, **layer.conv)}
            if layer.path == "int8":
                work["our convolution alone"] = lambda: layer._int8(q, layer.ones, layer.ones)
            seconds = medians(work, 3 * rounds)
            rows.append(dict(layer=name, **{what: 1e6 * value / 50 for what, value in seconds.items()}))
        x = torch.rand(50, 16, 32, 32).contiguous(memory_format=torch.channels_last)
        tried = medians({
            "to(uint8)": lambda: (x * 10).round_().clamp_(0, 15).to(torch.uint8),
            "by way of int8 (used)": lambda: (x * 10).round_().clamp_(0, 15).to(torch.int8).view(torch.uint8),
            "by way of int16 (8 bits)":
                lambda: (x * 10).round_().clamp_(0, 15).to(torch.int16).to(torch.uint8),
            "round() into a new tensor":
                lambda: torch.round(x * 10).clamp_(0, 15).to(torch.int8).view(torch.uint8),
        }, 5 * rounds)
        whole = medians({"network": lambda: network(torch.rand(50, 3, 32, 32))}, rounds)["network"]
    used = tried["by way of int8 (used)"]
    return rows, {name: value / used for name, value in tried.items()}, 1e6 * whole / 50


def best(rows: list[dict], arch: str, threads: int, variant: str, what: str) -> dict:
    some = [row for row in rows if (row["arch"], row["threads"], row["variant"], row["what"])
            == (arch, threads, variant, what)]
    return max(some, key=lambda row: row["per_second"])


def report(found: dict) -> str:
    rows, lines = found["rows"], [f"torch {found['torch']}, {found['processor']}; oneDNN int8 saturates in "
                                  f"int16: {found['saturates']}", ""]
    names = list(dict.fromkeys(row["variant"] for row in rows))
    for arch in dict.fromkeys(row["arch"] for row in rows):
        for threads in (1, 2):
            for what in ("network", "sampling"):
                some = [row for row in rows
                        if (row["arch"], row["threads"], row["what"]) == (arch, threads, what)]
                reference = best(rows, arch, threads, "float, best", what)["per_second"]
                lines.append(f"{arch}, {threads} thread(s), {what}: images a second over those of float at "
                             f"its best batch ({reference:.0f}/s here)")
                batches = list(dict.fromkeys(row["batch"] for row in some))
                lines.append(f"  {'batch':<18}" + "".join(f"{batch:>8}" for batch in batches) + "    best")
                for name in names:
                    values = [row["per_second"] / reference for row in some if row["variant"] == name]
                    lines.append(f"  {name:<18}" + "".join(f"{value:8.2f}" for value in values)
                                 + f"{max(values):8.2f}")
                lines.append("")
    lines.append("ResNet-20 by layer, one thread, batch 50, microseconds an image: ours with quantization, "
                 "residual sum and ReLU;\nits convolution alone; the bare float convolution; float over ours")
    for row in found["layers"]:
        alone = row.get("our convolution alone", float("nan"))
        lines.append(f"  {row['layer']:<24}{row['ours']:8.1f}{alone:8.1f}{row['float convolution']:8.1f}"
                     f"{row['float convolution'] / row['ours']:8.2f}")
    totals = [sum(row.get(key, 0) for row in found["layers"])
              for key in ("ours", "our convolution alone", "float convolution")]
    lines.append(f"  {'sum':<24}{totals[0]:8.1f}{totals[1]:8.1f}{totals[2]:8.1f}{totals[2] / totals[0]:8.2f}")
    lines.append(f"  the whole network takes {found['whole']:.1f}")
    lines.append("\nQuantizing floats to uint8, time over that of the way used: "
                 + ", ".join(f"{name} {value:.2f}" for name, value in found["tried"].items()))
    return "\n".join(lines) + "\n"


def main() -> None:
    for parameter, value in ((-3, 2 ** 30), (-1, 2 ** 31 - 1)):  # glibc keeps freed memory, as under arq.main
        ctypes.CDLL(None).mallopt(parameter, value)
    parser = argparse.ArgumentParser(description="Times every way to run a quantized network.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="ResNet-20 only, three batch sizes")
    options = parser.parse_args()
    layers, tried, whole = layer_times(options.rounds)
    batches = [25, 100] if options.quick else [10, 25, 50, 100, 250, 1000]
    rows = measure("resnet20", 32, batches, options.rounds)
    if not options.quick:
        rows += measure("resnet50", 224, [10], max(2, options.rounds // 2))
    flags = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    found = dict(torch=torch.__version__, processor=flags[0].split(":")[1].strip(), rows=rows, layers=layers,
                 tried=tried, whole=whole, saturates=models.int8_saturates())
    (HERE / "inference.json").write_text(json.dumps(found, indent=1) + "\n")
    (HERE / "inference.txt").write_text(report(found))
    print(report(found))


if __name__ == "__main__":
    main()
