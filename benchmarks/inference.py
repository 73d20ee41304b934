"""How fast each way to run a quantized network is, against the float network; where the time goes.

    python benchmarks/inference.py                      # about 6 minutes on two cores

In one process, in turn, medians of --rounds: images per second through the network alone and through
sampling (noise included). Timed are the float network as published code runs it (BatchNorm unfolded, NCHW),
float at its best (folded, channels_last), fake-quantized as usual (scale, round, clip and back, at every
call), and ours on each backend. 4 bits, first and last layer 8; random weights, since time does not depend
on their values. Writes results/inference.json and results/inference.txt.
"""

import argparse
import contextlib
import copy
import ctypes
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
    for backend in ("int8", "float32"):
        try:
            networks[f"ours, {backend}"] = models.integer_network(quantized, backends=(backend,))
        except RuntimeError:
            print(f"{backend}: not on this machine")
    return networks


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


def measure(arch: str, size: int, batches: list[int], rounds: int) -> list[dict]:
    networks, rows = variants(arch, size), []
    for threads in (1, 2):
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

    def quantized():
        return (x * 10).round_().clamp_(0, 15)

    used = "by way of int8 (used)"
    ways = {
        "to(uint8)": lambda: quantized().to(torch.uint8),
        used: lambda: quantized().to(torch.int8).view(torch.uint8),
        "by way of int16 (8 bits)": lambda: quantized().to(torch.int16).to(torch.uint8),
        "round() into a new tensor": lambda: (
            torch.round(x * 10).clamp_(0, 15).to(torch.int8).view(torch.uint8)
        ),
    }
    seconds = medians(ways, rounds)
    return {name: value / seconds[used] for name, value in seconds.items()}


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
    tried = ", ".join(f"{name} {value:.2f}" for name, value in found["tried"].items())
    lines.append(f"\nQuantizing floats to uint8, time over that of the way used: {tried}")
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
    batches = [25, 100] if options.quick else [10, 25, 50, 100, 250, 1000]
    rows = measure("resnet20", 32, batches, options.rounds)
    if not options.quick:
        rows += measure("resnet50", 224, [10], max(2, options.rounds // 2))
    found = {
        "torch": torch.__version__,
        "processor": processor(),
        "rows": rows,
        **found,
    }
    arq.write_whole(options.out / "inference.json", found)
    (options.out / "inference.txt").write_text(report(found))
    print(report(found))


if __name__ == "__main__":
    main()
