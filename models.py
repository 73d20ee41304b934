"""Networks, the quantizer, and what a bit-width policy costs.

A policy is plain data, {layer name: [w_bits, a_bits]}, as stored in policy.json. `quantize_model` makes any
network of convolutions and linear layers quantizable in place; `set_policy` changes all widths at any time.

    paper        here           meaning                                             shape
    b_w, b_a     w_bits, a_bits widths of a layer's weights and of its input        2..8, or both 32 (float)
    s_w, s_a     w_step, a_step learned step sizes                                  (c_out,) and ()
    q            quantize(v)    integer round(v / s) within [q_min, q_max]          as v
    MACs[l]      Layer.macs     multiply-accumulates of a layer for one image
    BitOPs(P)    bitops         sum over layers of MACs * w_bits * a_bits
    size(P)      size_bytes     sum over layers of weights * w_bits, in bytes

Sources: LSQ (Esser et al., ICLR 2020) for learned steps; He et al. (2016), section 4.2, for CIFAR ResNets.
"""

import copy
import math
from dataclasses import dataclass
from typing import Iterable, Optional

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

MIN_BITS, MAX_BITS, FLOAT_BITS, END_BITS = 2, 8, 32, 8
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_RESNETS = {f"resnet{depth}": depth for depth in (8, 20, 32, 44, 56, 110)}
TORCHVISION_NETS = ("resnet18", "resnet50", "mobilenet_v2")
Policy = dict[str, list[int]]


# ---- networks ----

class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: identity, 1x1 convolution, or (option A) zero-padded channels."""

    def __init__(self, c_in: int, c_out: int, stride: int, option_a: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.pad, self.stride = (c_out - c_in) // 2, stride
        self.downsample = None
        if c_in != c_out and not option_a:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False),
                                            nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.pad:
            x = F.pad(x[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 for small images: three stages of n blocks with 16, 32 and 64 channels."""

    def __init__(self, depth: int, num_classes: int, option_a: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        channels = 16
        for stage, width in enumerate((16, 32, 64), 1):
            blocks = []
            for block in range((depth - 2) // 6):
                blocks.append(BasicBlock(channels, width, 2 if block == 0 and stage > 1 else 1, option_a))
                channels = width
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


class Classifier(nn.Module):
    """Images in [0, 1], noisy or not, to logits: normalisation, then the network `net`."""

    def __init__(self, net: nn.Module, mean=CIFAR10_MEAN, std=CIFAR10_STD):
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.mean) / self.std)


def build_classifier(arch: str, num_classes: int, mean=CIFAR10_MEAN, std=CIFAR10_STD, option_a: bool = False):
    """A float Classifier by name. CIFAR ResNets take the depth from their name; others are torchvision's."""
    if arch in CIFAR_RESNETS:
        net = CifarResNet(CIFAR_RESNETS[arch], num_classes, option_a)
    elif arch in TORCHVISION_NETS:
        net = getattr(torchvision.models, arch)(weights=None, num_classes=num_classes)
    else:
        raise ValueError(f"unknown network {arch!r}; there are {[*CIFAR_RESNETS, *TORCHVISION_NETS]}")
    return Classifier(net, mean, std)


def load_base_checkpoint(path, arch: str, num_classes: int, mean=None, std=None) -> Classifier:
    """A float Classifier from a file in one of the layouts in public use.

    Taken: a bare state dict; {"state_dict": ...} with prefixes `module.` and `1.` (the network behind a
    normalise layer) in any order; our own bases; CIFAR ResNets with shortcuts named `shortcut`, or none
    (option A), whose last layer is `linear`, which were trained with ImageNet's normalisation. mean and std
    override what the layout implies. Raises ValueError, naming the first difference, for other weights.
    """
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for files that are no checkpoints
        raise ValueError(f"{path}: not a PyTorch checkpoint of tensors and plain values "
                         f"({str(error).splitlines()[0][:60]}); save its state_dict alone") from None
    state = raw.get("state_dict", raw) if isinstance(raw, dict) else {}
    state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    own = [state.pop(name).flatten().tolist() if name in state else None for name in ("mean", "std")]
    mean, std = mean or own[0], std or own[1]  # a base that this program trained
    for prefix in ("module.", "1.", "module.", "net."):  # `0.` are the numbers of a normalise layer in front
        if state and all(key.startswith((prefix, "0.")) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items() if key[:2] != "0."}
    linear = "linear.weight" in state
    state = {key.replace("linear.", "fc.").replace(".shortcut.", ".downsample."): value
             for key, value in state.items()}
    option_a = arch in CIFAR_RESNETS and not any("downsample" in key for key in state)
    cifar = arch in CIFAR_RESNETS and not (linear and option_a)
    mean = mean or (CIFAR10_MEAN if cifar else IMAGENET_MEAN)
    std = std or (CIFAR10_STD if cifar else IMAGENET_STD)
    classifier = build_classifier(arch, num_classes, mean, std, option_a)
    wanted = classifier.net.state_dict()
    counters = [key for key in wanted if key.endswith("num_batches_tracked")]  # not in old files, and unused
    state.update({key: wanted[key] for key in counters if key not in state})
    wrong = [key for key in {**wanted, **state}
             if key not in state or key not in wanted or state[key].shape != wanted[key].shape]
    if wrong:
        raise ValueError(f"{path} does not hold a {arch} with {num_classes} classes: {len(wrong)} "
                         f"weights differ, the first is {wrong[0]}; give the --arch it was trained with")
    classifier.net.load_state_dict(state)
    return classifier


# ---- quantizer ----

def integer_range(bits: int, signed: bool, symmetric: bool = False) -> tuple[int, int]:
    """[q_min, q_max]: 0..2^b - 1 unsigned, -2^(b-1)..2^(b-1) - 1 signed, without the lowest if symmetric."""
    if not signed:
        return 0, 2 ** bits - 1
    q_max = 2 ** (bits - 1) - 1
    return (-q_max if symmetric else -q_max - 1), q_max


def quantize(v: Tensor, step: Tensor, q_min: int, q_max: int) -> Tensor:
    """Integers (as floats) round(v / step), clipped."""
    return torch.round(v / step).clamp_(q_min, q_max)


class FakeQuantize(torch.autograd.Function):
    """step * round(clip(v / step)) with LSQ's gradients (Esser et al., section 2.1).

    Straight through for v inside the clip range and zero outside; the step's gradient is q - v/step inside
    and q outside, times 1 / sqrt(N Q) with N elements per step (of one sample for activations) and Q = q_max.
    """

    @staticmethod
    def forward(ctx, v, step, q_min, q_max, elements):
        scaled = v / step
        ctx.save_for_backward(scaled, step)
        ctx.q_min, ctx.q_max, ctx.gradient_scale = q_min, q_max, 1 / math.sqrt(elements * max(q_max, 1))
        return torch.round(scaled).clamp_(q_min, q_max).mul_(step)

    @staticmethod
    def backward(ctx, grad):
        scaled, step = ctx.saved_tensors
        q = torch.round(scaled).clamp_(ctx.q_min, ctx.q_max)
        inside = (scaled >= ctx.q_min) & (scaled <= ctx.q_max)
        grad_v = grad * inside
        grad_step = torch.addcmul(grad * q, grad_v, scaled, value=-1).sum_to_size(step.shape)
        return grad_v, grad_step * ctx.gradient_scale, None, None, None


@torch.no_grad()
def best_step(v: Tensor, q_min: int, q_max: int, candidates: int = 32) -> Tensor:
    """Step with the least squared quantization error for each row of v (rows, elements): (rows,)."""
    largest = v.abs().amax(1).clamp_min(1e-8)
    best, best_error = largest / q_max, torch.full_like(largest, math.inf)
    for fraction in torch.linspace(0.15, 1.0, candidates).tolist():
        step = fraction * largest / q_max
        error = (quantize(v, step[:, None], q_min, q_max) * step[:, None] - v).square_().sum(1)
        better = error < best_error
        best, best_error = torch.where(better, step, best), torch.where(better, error, best_error)
    return best


class QuantLayer(nn.Module):
    """A convolution or linear layer with its BatchNorm, quantizing its own weights and its own input.

    At 32 bits it is the float layer. With gradients, or in training mode, it simulates: fake-quantized input
    and weights, BatchNorm in float. Otherwise it evaluates integers: acc = conv(q_a, q_w), then one float32
    epilogue per channel, acc * scale + shift, with steps, bias and BatchNorm folded into both.
    """

    def __init__(self, layer: nn.Module, norm: nn.Module):
        super().__init__()
        self.weight, self.bias, self.norm = layer.weight, layer.bias, norm
        self.conv = None
        if isinstance(layer, nn.Conv2d):
            self.conv = dict(stride=layer.stride, padding=layer.padding, dilation=layer.dilation,
                             groups=layer.groups)
        self.w_step = nn.Parameter(torch.ones(len(layer.weight)))
        self.a_step = nn.Parameter(torch.ones(()))
        self.register_buffer("calibrated_steps", torch.ones(MAX_BITS + 1))  # activation step, by width
        self.signed = False  # a Python value, so that a GPU need not be asked for it at every layer
        self.w_bits = self.a_bits = FLOAT_BITS

    def get_extra_state(self) -> bool:
        """Carries `signed` in the state dict."""
        return self.signed

    def set_extra_state(self, signed: bool) -> None:
        self.signed = signed

    def set_bits(self, w_bits: int, a_bits: int) -> None:
        """Change the widths and give the steps their initial values for them (see `calibrate`)."""
        self.w_bits, self.a_bits = w_bits, a_bits
        if w_bits != FLOAT_BITS:
            with torch.no_grad():
                self.w_step.copy_(best_step(self.weight.flatten(1), *integer_range(w_bits, True, True)))
                self.a_step.copy_(self.calibrated_steps[a_bits])

    def forward(self, x: Tensor) -> Tensor:
        if self.w_bits == FLOAT_BITS:
            return self.norm(self._multiply(x, self.weight, self.bias))
        w_range = integer_range(self.w_bits, True, True)
        a_range = integer_range(self.a_bits, self.signed)
        step = self.w_step.view(-1, *[1] * (self.weight.ndim - 1))
        if self.training or torch.is_grad_enabled():
            w = FakeQuantize.apply(self.weight, step, *w_range, self.weight[0].numel())
            a = FakeQuantize.apply(x, self.a_step, *a_range, x[0].numel())
            return self.norm(self._multiply(a, w, self.bias))
        acc = self._multiply(quantize(x, self.a_step, *a_range), quantize(self.weight, step, *w_range), None)
        scale, shift = (v.view(-1, *[1] * (acc.ndim - 2)) for v in self._epilogue())
        return acc.mul_(scale).add_(shift)

    def _multiply(self, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        return F.linear(x, weight, bias) if self.conv is None else F.conv2d(x, weight, bias, **self.conv)

    def _epilogue(self) -> tuple[Tensor, Tensor]:
        """scale and shift (c_out,) that take the integer sum to the layer's output."""
        scale = self.w_step * self.a_step
        shift = torch.zeros_like(self.w_step) if self.bias is None else self.bias
        if isinstance(self.norm, nn.Identity):
            return scale, shift
        gain = self.norm.weight * torch.rsqrt(self.norm.running_var + self.norm.eps)
        return scale * gain, (shift - self.norm.running_mean) * gain + self.norm.bias


# ---- the layer table and what a policy costs ----

@dataclass(frozen=True)
class Layer:
    """One row of the layer table, in order of execution. kernel, stride and input map size count one side."""
    name: str
    c_in: int
    c_out: int
    kernel: int
    stride: int
    map_size: int
    weights: int
    macs: int
    depthwise: bool


def quantize_model(classifier: nn.Module, image_size: int) -> list[Layer]:
    """Replace every convolution and linear layer, and the BatchNorm it feeds, by a QuantLayer at 32 bits.

    Layers, shapes and the BatchNorm that belongs to each are read off one forward pass at (3, image_size,
    image_size), so any network will do whose layers run once a pass. Returns the layer table in execution
    order; names are the module paths inside `classifier.net` (or the module itself). Raises ValueError for a
    layer that never runs or runs twice, and unless 32 bits compute exactly what the float network did.
    """
    body = getattr(classifier, "net", classifier)
    names = {module: name for name, module in body.named_modules()}
    layers = [module for module in names if isinstance(module, (nn.Conv2d, nn.Linear))]
    norms = [module for module in names if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))
             and module.affine and module.track_running_stats]
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    norm_of: dict[nn.Module, nn.Module] = {}

    def record(module, inputs, output):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            calls.append((module, inputs[0], output))
        else:
            norm_of.update({layer: module for layer, _, out in calls if out is inputs[0]})

    hooks = [module.register_forward_hook(record) for module in layers + norms]
    was_training, device = classifier.training, next(classifier.parameters()).device
    probe = torch.rand(1, 3, image_size, image_size, device=device)
    classifier.eval()
    with torch.no_grad():
        expected = classifier(probe)
    for hook in hooks:
        hook.remove()
    if sorted(names[module] for module, _, _ in calls) != sorted(names[module] for module in layers):
        raise ValueError("every convolution and linear layer must run exactly once in a forward pass")
    if any(isinstance(module, nn.Linear) and x.ndim != 2 for module, x, _ in calls):
        raise ValueError("linear layers must see inputs (batch, features)")

    table = []
    for module, x, out in calls:
        conv = isinstance(module, nn.Conv2d)
        c_in, c_out = x.shape[1], out.shape[1]
        positions = out[0, 0].numel()  # 1 for a linear layer
        table.append(Layer(names[module], c_in, c_out, module.kernel_size[0] if conv else 1,
                           module.stride[0] if conv else 1, x.shape[-1] if conv else 1, module.weight.numel(),
                           module.weight.numel() * positions, conv and module.groups == c_in > 1))
        norm = norm_of.get(module, nn.Identity())
        _replace(body, names[module], QuantLayer(module, norm).to(device))
        if module in norm_of:
            _replace(body, names[norm], nn.Identity())
    with torch.no_grad():
        same = torch.equal(classifier(probe), expected)
    classifier.train(was_training)
    if not same:
        raise ValueError("BatchNorm cannot be folded: a convolution's output is used before its BatchNorm, "
                         "or changed in place, or a convolution does not pad with zeros")
    return table


def _replace(root: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, new)


def quant_layers(classifier: nn.Module) -> dict[str, QuantLayer]:
    """The quantizable layers by name."""
    body = getattr(classifier, "net", classifier)
    return {name: module for name, module in body.named_modules() if isinstance(module, QuantLayer)}


def set_policy(classifier: nn.Module, policy: Policy) -> None:
    """Set every layer's widths. Raises ValueError unless the policy names exactly the network's layers."""
    layers = quant_layers(classifier)
    if layers.keys() != policy.keys():
        raise ValueError("the policy's layers are not the network's: "
                         f"{sorted(layers.keys() ^ policy.keys())[:3]} ...")
    for name, (w_bits, a_bits) in policy.items():
        both_float = w_bits == a_bits == FLOAT_BITS
        if not both_float and not (MIN_BITS <= w_bits <= MAX_BITS and MIN_BITS <= a_bits <= MAX_BITS):
            raise ValueError(f"layer {name}: widths are {MIN_BITS} to {MAX_BITS} bits, or both {FLOAT_BITS}")
        layers[name].set_bits(w_bits, a_bits)


@torch.no_grad()
def keep_steps_positive(classifier: nn.Module) -> None:
    """After an optimizer's update: a step size must stay above 0 to mean anything."""
    for layer in quant_layers(classifier).values():
        layer.w_step.clamp_(min=1e-6)
        layer.a_step.clamp_(min=1e-6)


@torch.no_grad()
def calibrate(classifier: nn.Module, batches: Iterable[Tensor], values: int = 65536) -> None:
    """Find, on the float network, each layer's activation step per width and whether its input is signed.

    batches: images (B, 3, H, W) as the network will see them, noise included. The steps minimise the squared
    error on about `values` inputs a layer; the input is unsigned if none of them is below zero.
    """
    seen: dict[QuantLayer, list[Tensor]] = {layer: [] for layer in quant_layers(classifier).values()}
    batches = list(batches)

    def keep(layer, inputs):
        flat = inputs[0].flatten()
        stride = max(1, len(flat) * len(batches) // values)
        layer.signed |= bool((flat < 0).any())
        seen[layer].append(flat[::stride].clone())

    hooks = [layer.register_forward_pre_hook(keep) for layer in seen]
    classifier.eval()
    for layer in seen:
        layer.w_bits = layer.a_bits = FLOAT_BITS
    for batch in batches:
        classifier(batch)
    for hook in hooks:
        hook.remove()
    for layer, parts in seen.items():
        sample = torch.cat(parts)[None]
        for bits in range(MIN_BITS, MAX_BITS + 1):
            layer.calibrated_steps[bits] = best_step(sample, *integer_range(bits, layer.signed))[0]


def bitops(table: list[Layer], policy: Policy) -> int:
    """BitOPs(P) = sum of MACs * w_bits * a_bits for one image (PAPER section 1)."""
    return sum(layer.macs * policy[layer.name][0] * policy[layer.name][1] for layer in table)


def bitops_ratio(table: list[Layer], policy: Policy) -> float:
    """BitOPs(P) / BitOPs(FP32)."""
    return bitops(table, policy) / bitops(table, uniform_policy(table, FLOAT_BITS, FLOAT_BITS))


def size_bytes(table: list[Layer], policy: Policy) -> int:
    """size(P): the weights' bits, rounded up to bytes."""
    return math.ceil(sum(layer.weights * policy[layer.name][0] for layer in table) / 8)


def size_ratio(table: list[Layer], policy: Policy) -> float:
    """size(P) / size(FP32)."""
    return size_bytes(table, policy) / size_bytes(table, uniform_policy(table, FLOAT_BITS, FLOAT_BITS))


def uniform_policy(table: list[Layer], bits: int, end_bits: int = END_BITS) -> Policy:
    """The same width everywhere but in the first and the last layer."""
    ends = (table[0].name, table[-1].name)
    return {layer.name: [end_bits, end_bits] if layer.name in ends else [bits, bits] for layer in table}


def enforce_budget(table: list[Layer], policy: Policy, budget: float,
                   size_budget: Optional[float] = None) -> Policy:
    """The policy, forced under the budget (HAQ, section 3.3): from the last layer back, one bit at a time.

    budget and size_budget are fractions of the float network's BitOPs and weight bits. Each visit takes one
    bit from the layer's weights, then one from its input, until the policy fits; the ends keep their 8 bits.
    Raises ValueError if the narrowest policy is over the budget.
    """
    policy = {name: list(bits) for name, bits in policy.items()}

    def over(kind: int) -> bool:
        """Whether a bit must go from weights (kind 0) or inputs (1): both cost BitOPs, weights size too."""
        too_large = size_budget is not None and size_ratio(table, policy) > size_budget
        return bitops_ratio(table, policy) > budget or kind == 0 and too_large

    while over(0):
        before = copy.deepcopy(policy)
        for layer in reversed(table[1:-1]):
            for kind in (0, 1):
                if policy[layer.name][kind] > MIN_BITS and over(kind):
                    policy[layer.name][kind] -= 1
        if policy == before:
            needs = [math.ceil(ratio(table, policy) * 1e6) / 1e6 for ratio in (bitops_ratio, size_ratio)]
            raise ValueError(f"{'--budget' if over(1) else '--size-budget'} is below what the narrowest "
                             f"policy ({MIN_BITS} bits, ends {END_BITS}) costs: {needs[0]} of the float "
                             f"network's BitOPs and {needs[1]} of its size")
    return policy


# ---- saved networks ----

def save_model(path, classifier: Classifier, arch: str, image_size: int, policy: Policy, sigma: float,
               dataset: str, classes: list[str]) -> None:
    """Write a network with its policy and what is needed to rebuild it and certify it on the right images."""
    option_a = isinstance(classifier.net, CifarResNet) and classifier.net.layer2[0].downsample is None
    torch.save({"arch": arch, "image_size": image_size, "option_a": option_a, "sigma": sigma,
                "policy": policy, "dataset": dataset, "classes": classes,
                "state_dict": classifier.state_dict()}, path)


def saved_options(path) -> dict:
    """dataset, arch, image_size and sigma of a file that save_model wrote; empty for any other file."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return {name: saved[name] for name in ("dataset", "arch", "image_size", "sigma")}
    except Exception:  # not ours: the caller tries other layouts and reports
        return {}


def load_model(path) -> tuple[Classifier, list[Layer], dict]:
    """What save_model wrote: quantized classifier in evaluation mode, layer table and the file's entries."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        classifier = build_classifier(saved["arch"], len(saved["classes"]), option_a=saved["option_a"])
        table = quantize_model(classifier, saved["image_size"])
        set_policy(classifier, saved["policy"])
        classifier.load_state_dict(saved["state_dict"])
    except FileNotFoundError:
        raise
    except Exception as error:  # torch.load and the dictionary raise many kinds for other files
        raise ValueError(f"{path}: not a network saved by this program "
                         f"({str(error).splitlines()[0][:80]})") from None
    return classifier.eval(), table, saved
