"""Randomized smoothing: certify any classifier `images -> logits`, from scratch or incrementally.

This file stands alone (torch and scipy): copy it into your own project. Images are float tensors in [0, 1]
of shape (channels, height, width); noise has standard deviation sigma in those units and is added there,
before any normalisation.

    paper     here          meaning
    f         classifier    base classifier: (batch, channels, height, width) -> logits (batch, classes)
    g         -             smoothed classifier, g(x) = argmax_c P[f(x + eps) = c] with eps ~ N(0, sigma^2 I)
    f^P       classifier    the changed (quantized) classifier, in functions that also take a ReplayCache of f
    c_A       selected      the class chosen on n0 samples; the bounds use samples this choice did not see
    n_A, n_B  n_a, n_b      votes for c_A, and for the most counted other class, among n samples
    p_A       p_lower       lower confidence bound of P[f(x + eps) = c_A]
    n_p       n_p           samples of f^P per image in the incremental certificate
    zeta      zeta          upper confidence bound of P[f(x + eps) != f^P(x + eps)]
    p_B       p_upper       upper confidence bound of the probability of every other class; 1 - p_A one-sided
    R         radius        certified l2 radius: g is constant on the ball of this radius around x

Sources: Cohen, Rosenfeld and Kolter, ICML 2019 (CERTIFY, PREDICT); Ugare et al., ICLR 2024 (IRS).
"""

import hashlib
import math
import statistics
import time
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from functools import partial
from typing import Callable, Iterator, NamedTuple, Optional, Sequence, TextIO

import torch
from scipy.stats import beta, binomtest, norm
from torch import Tensor
from torch.nn import functional as F

ABSTAIN = -1
CHUNK = 100  # noise is drawn this many samples at a time: a sample's noise must not depend on the batch size
Classifier = Callable[[Tensor], Tensor]


# ---- bounds and radii ----

def lower_confidence_bound(k, n, alpha):
    """One-sided Clopper-Pearson lower bound on a probability, from k successes in n independent trials.

    P[bound <= truth] >= 1 - alpha. Numbers give a float, arrays (or broadcast) a float64 tensor. Raises
    ValueError unless 0 <= k <= n, n >= 1 and 0 < alpha < 1.
    """
    k, n, alpha = _as_array(k), _as_array(n), _as_array(alpha)
    if not ((alpha > 0) & (alpha < 1)).all():
        raise ValueError(f"alpha must lie strictly between 0 and 1, not {alpha}")
    if not ((k >= 0) & (k <= n) & (n >= 1)).all():
        raise ValueError("counts must satisfy 0 <= k <= n and n >= 1")
    positive = k > 0  # k = 0 has no beta quantile: its bound is 0
    return _as_tensor(beta.ppf(alpha, k + ~positive, n - k + 1) * positive)


def upper_confidence_bound(k, n, alpha):
    """One-sided Clopper-Pearson upper bound: P[bound >= true probability] >= 1 - alpha. Same arguments."""
    return 1 - lower_confidence_bound(_as_array(n) - _as_array(k), n, alpha)


def certified_radius(p_a, sigma: float, p_b=None):
    """Certified l2 radius sigma/2 (Phi^-1(p_A) - Phi^-1(p_B)) (ARQ, Theorem 2.1), in pixels of [0, 1] images.

    p_a bounds the predicted class's probability from below, p_b every other's from above; without p_b,
    1 - p_a takes its place (the one-sided radius, sigma Phi^-1(p_A), of published tables). Numbers or arrays;
    0 where nothing is certified. Raises ValueError unless sigma > 0 and 0 <= p_a, p_b <= 1.
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, not {sigma}")
    p_a = _as_array(p_a)
    p_b = 1 - p_a if p_b is None else _as_array(p_b)
    if not ((p_a >= 0) & (p_a <= 1) & (p_b >= 0) & (p_b <= 1)).all():
        raise ValueError("probabilities must lie between 0 and 1")
    certified = p_a > p_b  # elsewhere infinite quantiles may have no difference: 1/2 stands for both
    difference = norm.ppf(p_a + ~certified * (0.5 - p_a)) + norm.isf(p_b + ~certified * (0.5 - p_b))
    return _as_tensor(sigma / 2 * difference)


def can_certify(n: int, alpha: float) -> bool:
    """Whether n samples that all agree give a radius above 0 at this alpha (10 needed at alpha = 0.001)."""
    return lower_confidence_bound(n, n, alpha) > 0.5


def _as_array(value):
    return torch.as_tensor(value, dtype=torch.float64).cpu().numpy()


def _as_tensor(array):
    return torch.from_numpy(array) if array.ndim else float(array)


# ---- noise and sampling ----

class NoiseKey(NamedTuple):
    """Names one source of noise. Equal keys replay it; another seed or purpose gives fresh noise."""
    seed: int
    purpose: str

    def derive(self, part: str) -> "NoiseKey":
        return NoiseKey(self.seed, f"{self.purpose}/{part}")


def draw_noise(key: NoiseKey, image_id: int, chunk: int, shape: Sequence[int], device) -> Tensor:
    """Standard normal noise (CHUNK, *shape): samples CHUNK * chunk onwards of one image under one key, by the
    arguments and the device type alone, so that predictions can be replayed in any batch size."""
    digest = hashlib.sha256(f"{key.seed}|{key.purpose}|{image_id}".encode()).digest()
    # A CPU generator keeps 32 bits of its seed. Counting chunks up from the image's own start keeps them
    # apart, where 1,000 independent seeds would repeat one, and with it the noise, in 1 of 8,600 images.
    seed = (int.from_bytes(digest[:4], "little") + chunk) % 2 ** 32
    # Contiguous: drawing in channels_last order is several times slower on a CPU.
    return torch.randn(CHUNK, *shape, generator=torch.Generator(device).manual_seed(seed), device=device)


@torch.inference_mode()
def noisy_predictions(classifier: Classifier, images: Tensor, ids: Sequence[int], sizes: Sequence[int],
                      sigma: float, key: NoiseKey, batch_size: int,
                      first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Classify noisy copies first .. first + sizes[i] - 1 of images[i] (B, C, H, W), in order, in full batches
    that span images. Yields (rows, classes) of equal length, on the CPU: row i was given class c once."""
    batch, rows, filled = [], [], 0
    total, done = int(sum(sizes)), 0
    for row, (image, image_id, size) in enumerate(zip(images, ids, sizes)):
        last = first + int(size)
        for chunk in range(first // CHUNK, math.ceil(last / CHUNK)):
            start = chunk * CHUNK
            noise = draw_noise(key, image_id, chunk, image.shape, image.device)
            noisy = noise[max(0, first - start):max(0, last - start)].mul_(sigma).add_(image)
            while len(noisy):
                part = noisy[:batch_size - filled]
                noisy = noisy[len(part):]
                batch.append(part)
                rows += [row] * len(part)
                filled += len(part)
                done += len(part)
                if filled == batch_size or done == total:
                    yield torch.tensor(rows), classifier(torch.cat(batch)).argmax(1).cpu()
                    batch, rows, filled = [], [], 0


def class_counts(classifier: Classifier, images: Tensor, ids: Sequence[int], n: int, num_classes: int,
                 sigma: float, key: NoiseKey, batch_size: int) -> Tensor:
    """How often each class was predicted among n noisy copies of every image: (B, num_classes), int64."""
    counts = torch.zeros(len(images) * num_classes, dtype=torch.int64)
    for rows, classes in noisy_predictions(classifier, images, ids, [n] * len(ids), sigma, key, batch_size):
        counts += torch.bincount(rows * num_classes + classes, minlength=len(counts))
    return counts.view(-1, num_classes)


# ---- certificates ----

@dataclass
class Certificate:
    """One certified image. predict is ABSTAIN (-1) with radius 0 where the bound does not exceed 1/2.

    The first six fields are the columns that existing tools read. The rest is what the radius was computed
    from: votes for the selected class and the most counted other one, sample sizes, sigma and alpha.
    """
    idx: int
    label: int
    predict: int
    radius: float
    correct: int
    time: str
    selected: Optional[int] = None
    n_a: Optional[int] = None
    n_b: Optional[int] = None
    n: Optional[int] = None
    n0: Optional[int] = None
    sigma: Optional[float] = None
    alpha: Optional[float] = None


def certify(classifier: Classifier, images: Tensor, labels: Sequence[int], ids: Sequence[int],
            num_classes: int, sigma: float, n0: int, n: int, alpha: float, key: NoiseKey,
            batch_size: int = 100) -> list[Certificate]:
    """CERTIFY (Cohen et al., section 3.2.2) for a block of images (B, C, H, W) in [0, 1].

    For each image, with probability at least 1 - alpha over the noise: unless the certificate abstains, the
    smoothed classifier predicts `predict` everywhere closer than `radius` in l2. Image by image: about
    alpha * B certificates may be wrong. As in all common code, the guarantee is one of real, not of
    floating-point arithmetic (Voracek and Hein, 2023). `ids` name the images.
    """
    start = time.monotonic()
    counts0 = class_counts(classifier, images, ids, n0, num_classes, sigma, key.derive("select"), batch_size)
    selected = counts0.argmax(1)                                      # c_A, on samples the bound does not use
    counts = class_counts(classifier, images, ids, n, num_classes, sigma, estimate_key(key, n), batch_size)
    return _certificates(ids, labels, selected, counts, n0, sigma, alpha, start)


def estimate_key(key: NoiseKey, n: int) -> NoiseKey:
    """Noise behind the bound. n is part of it: asked for more samples, a run draws all of them anew."""
    return key.derive(f"estimate{n}")


def _certificates(ids, labels, selected, counts, n0, sigma, alpha, start) -> list[Certificate]:
    """Certificates from selected classes (B,) and votes (B, classes); an image without votes abstains."""
    n = counts.sum(1)
    n_a = counts.gather(1, selected[:, None]).squeeze(1)
    n_b = counts.scatter(1, selected[:, None], 0).amax(1)
    p_lower = lower_confidence_bound(n_a, n.clamp(min=1), alpha)
    radius = certified_radius(p_lower, sigma)
    seconds = str(timedelta(seconds=(time.monotonic() - start) / len(labels)))
    rows = []
    for i, label in enumerate(labels):
        top = int(selected[i]) if p_lower[i] > 0.5 else ABSTAIN
        rows.append(Certificate(int(ids[i]), int(label), top, float(radius[i]), int(top == label), seconds,
                                int(selected[i]), int(n_a[i]), int(n_b[i]), int(n[i]), n0, sigma, alpha))
    return rows


def two_sided(rows: Sequence[Certificate]) -> list[Certificate]:
    """The same certificates by Theorem 2.1 in full: p_A and p_B bounded at alpha / 2 each, from n_a and n_b.

    The most counted other class needs no correction over classes: its bound is at least that of the true
    runner-up. Either radius is wrong with probability at most alpha; the larger, taken afterwards, with up to
    1.5 alpha. Raises ValueError for rows without counts.
    """
    if any(row.n_a is None or row.n_b is None for row in rows):
        raise ValueError("these certificates hold no counts; a two-sided radius needs n_a and n_b")
    certificates = []
    for row in rows:
        p_a = lower_confidence_bound(row.n_a, max(row.n, 1), row.alpha / 2)
        p_b = upper_confidence_bound(row.n_b, max(row.n, 1), row.alpha / 2)
        top = row.selected if p_a > p_b else ABSTAIN
        certificates.append(replace(row, predict=top, radius=certified_radius(p_a, row.sigma, p_b),
                                    correct=int(top == row.label)))
    return certificates


def predict(classifier: Classifier, images: Tensor, ids: Sequence[int], num_classes: int, sigma: float,
            n: int, alpha: float, key: NoiseKey, batch_size: int = 100) -> list[int]:
    """PREDICT (Cohen et al., section 3.2.1): g's class for each image (B, C, H, W), wrong with probability at
    most alpha; ABSTAIN where a two-sided binomial test cannot tell the two most voted classes apart."""
    counts = class_counts(classifier, images, ids, n, num_classes, sigma, key.derive("predict"), batch_size)
    votes, classes = counts.topk(2, dim=1)
    return [int(top[0]) if binomtest(int(vote[0]), int(vote.sum()), 0.5).pvalue <= alpha else ABSTAIN
            for vote, top in zip(votes, classes)]


# ---- incremental randomized smoothing (IRS) ----

@dataclass
class ReplayCache:
    """f's certificates for a set of images, and what f predicted for every sample behind them.

    predictions: (B, n) uint8 (int16 beyond 256 classes), zeros where nothing was sampled; key: the noise.
    """
    certificates: list[Certificate]
    predictions: Tensor
    key: NoiseKey


def certify_and_cache(classifier: Classifier, images: Tensor, labels: Sequence[int], ids: Sequence[int],
                      num_classes: int, sigma: float, n0: int, n: int, alpha: float, key: NoiseKey,
                      batch_size: int = 100) -> ReplayCache:
    """CERTIFY for the base classifier f, keeping each sample's prediction; guarantee as in `certify`.

    An image whose selected class is wrong adds 0 to the ACR of f and f^P: it gets no samples and abstains.
    """
    start = time.monotonic()
    counts0 = class_counts(classifier, images, ids, n0, num_classes, sigma, key.derive("select"), batch_size)
    selected = counts0.argmax(1)
    sizes = n * (selected == torch.as_tensor(labels))
    key = estimate_key(key, n)
    dtype = torch.uint8 if num_classes <= 256 else torch.int16
    predictions = torch.zeros(len(images), n, dtype=dtype)
    predictions[:, :int(sizes.max())] = _predictions(classifier, images, ids, sigma, batch_size, dtype, sizes,
                                                     key, 0)
    counts = torch.zeros(len(images), num_classes, dtype=torch.int64)
    for i in sizes.nonzero().flatten():
        counts[i] = predictions[i].long().bincount(minlength=num_classes)
    rows = _certificates(ids, labels, selected, counts, n0, sigma, alpha, start)
    return ReplayCache(rows, predictions, key)


def _predictions(classifier, images, ids, sigma, batch_size, dtype, sizes, key, first) -> Tensor:
    """Predicted classes (B, largest size) of noisy copies first .. first + sizes[i] - 1, then zeros."""
    found, done = torch.empty(int(sizes.sum()), dtype=dtype), 0
    stream = noisy_predictions(classifier, images, ids, sizes.tolist(), sigma, key, batch_size, first)
    for _, classes in stream:
        found[done:done + len(classes)] = classes
        done += len(classes)
    predictions = torch.zeros(len(images), int(sizes.max()), dtype=dtype)
    predictions[torch.arange(predictions.shape[1]) < sizes[:, None]] = found
    return predictions


MODES = ("off", "paper", "paired", "auto")
METHODS = ("none", "fresh", "paper", "paired")
NONE, FRESH, PAPER, PAIRED = range(4)


class IncrementalCertificate(NamedTuple):
    """One image certified for f^P: how (of METHODS), and by how many samples of f^P, a pilot's included; zeta
    and the replayed difference P[f^P = c_A] - P[f = c_A], nan where not used."""
    idx: int
    label: int
    predict: int
    radius: float
    correct: int
    method: str
    passes: int
    zeta: float
    difference: float


def paired_lower_bound(both: Tensor, lost: Tensor, gained: Tensor, m: Tensor, k: Tensor, n: Tensor,
                       alpha: float, bet: Tensor) -> Tensor:
    """Lower confidence bound (B,) of P[G], from m samples of F and G together and n others of F alone.

    F and G are the events f = c and f^P = c; `both`, `lost` and `gained` count samples where both, only F and
    only G hold; k of the n others have F. P[bound <= P[G]] >= 1 - alpha. With w = n / (n + m):

        P[G] = t + w P[F] with t = E[G - wF], for any w.
        The m samples bet on t: under E[G - wF] <= t, the wealth e(t) = prod_i 1 + bet (G_i - w F_i - t) has
        expectation at most 1, for a bet fixed in advance that leaves no factor negative.
        The n others give a p-value for P[F] <= p: the binomial tail q(p) of k or more among n.
        They share no sample, so P[q <= alpha e] <= E[min(1, alpha e)] <= alpha at the true t and p.
        Otherwise p is at least LCB(k, n, alpha e(t)), and P[G] = t + w p at least the minimum of
        t + w LCB(k, n, alpha e(t)) over all t.

    All of alpha is spent on this one comparison. e falls with t, so taking t from one end of a cell of a grid
    and e from the other errs downwards only.
    """
    both, lost, gained, m, k, n, bet = (part.double()[:, None] for part in (both, lost, gained, m, k, n, bet))
    w = n / (n + m)
    mean = (gained + (1 - w) * both - w * lost) / m
    square = (gained + (1 - w) ** 2 * both + w ** 2 * lost) / m
    spread = ((square - mean ** 2).clamp(min=0) / m).sqrt() + 1 / m
    offsets = torch.linspace(-5.3, 5.3, 161).sinh()  # dense near the mean, where the minimum lies
    t = (mean + spread * offsets).clamp(max=1).maximum(-w)
    t = torch.cat([-w, t, torch.ones_like(w)], 1)
    size = torch.minimum(bet, 0.9 / (w + t).clamp(min=1e-12))
    neither = m - both - lost - gained
    wealth = sum(count * torch.log1p(size * (value - t))
                 for count, value in ((both, 1 - w), (lost, -w), (gained, 1), (neither, 0)))
    # A hundredth stays out of the bet: wealth lost on a t far off must not stop the others from excluding it.
    level = alpha * (0.99 * wealth.clamp(max=700).exp() + 0.01)[:, 1:]
    p = lower_confidence_bound(k, n, level.clamp(max=0.999999))
    return torch.where(level >= 1, math.inf, t[:, :-1] + w * p).amin(1).clamp(0, 1)


def expected_radius(p: Tensor, weight: Tensor, samples: Tensor, alpha: float, loss=0.0) -> Tensor:
    """Mean radius over sigma (B, S) that `samples` (B, S) will certify at alpha, less `loss` off the bound, if p
    (B,) is known as from `weight` (B,) samples: over six quantiles of a beta distribution for the votes."""
    p, weight, samples = p[:, None, None], weight[:, None, None], samples.clamp(min=2)[..., None]
    size = samples * (weight + 1) / (weight + samples) - 1
    votes = _as_tensor(beta.ppf((torch.arange(6) + 0.5) / 6, p * size, (1 - p) * size)) * samples
    bound = lower_confidence_bound(votes, samples, alpha) - torch.as_tensor(loss)[..., None]
    return certified_radius(bound.clamp(min=0), 1.0).mean(-1)


def _share_out(gain: Tensor, method: Tensor, sizes: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The methods and sizes (B,) of largest total gain (B, S), by a price per pass that uses up `total`."""
    gain, method, sizes = (F.pad(part, (1, 0)) for part in (gain, method, sizes))  # or no pass at all
    low, high = 0.0, 1.0
    for _ in range(40):
        price = (low + high) / 2
        choice = (gain - price * sizes).argmax(1)
        low, high = (price, high) if sizes[choice].sum() > total else (low, price)
    choice = (gain - high * sizes).argmax(1)
    spent = max(1, int(sizes[choice].sum()))
    return method.gather(1, choice[:, None]).squeeze(1), sizes[choice] * total // spent


class Plan(NamedTuple):
    """What each image gets, fixed before any bound is computed, all (B,): index into METHODS, samples of f^P
    for the bound and for the pilot, bet of the paired bound. Bounds use cached samples from `first` on."""
    method: Tensor
    passes: Tensor
    pilot: Tensor
    bet: Tensor
    first: int


def plan_passes(cache: ReplayCache, sample: Callable, selected: Tensor, right: Tensor, n_p: int,
                alpha: float, alpha_zeta: float, share_out: bool) -> Plan:
    """Plan n_p passes an image of right class; share_out: so that the expected sum of radii is largest.

    Reads only the first tenth of the cached samples: f's votes tell how certain each image is, and a pilot, a
    twentieth of the passes replayed there, how often the vote for c_A changes per unit of its variance
    p (1 - p), an image's own rate drawn towards that of all. sample: see `_sampler`.
    """
    n = cache.predictions.shape[1]
    first, rest = n // 10, n - n // 10
    votes = (cache.predictions[:, :first] == selected[:, None]).sum(1)
    p = (votes.double() + 0.5) / (first + 1)
    variance = p * (1 - p)
    pilot = min(first, n_p // 20) * right
    replayed = sample(pilot, cache.key, 0)
    inside = torch.arange(replayed.shape[1]) < pilot[:, None]
    before = inside & (cache.predictions[:, :replayed.shape[1]] == selected[:, None])
    after = inside & (replayed == selected[:, None])
    lost, gained = (before & ~after).sum(1), (after & ~before).sum(1)
    units = pilot * variance
    change = (lost.sum() + gained.sum() + 1) / (units.sum() + 1)  # without a pilot, every vote may change
    shift = (gained.sum() - lost.sum()) / (units.sum() + 1)
    # Images differ by about half of what changes; each one's own pilot counts as it can tell more than that.
    spread = variance * change ** 2 / 4
    own = spread * pilot / (spread * pilot + change)
    shift = own * (gained - lost) / pilot.clamp(min=1) + (1 - own) * shift * variance
    change = (lost + gained + 5 * change) / (units + 5)

    def paired_variance(m: Tensor) -> Tensor:
        """Variance of G - wF (see `paired_lower_bound`), with a margin for what m samples cannot rule out."""
        w = 1 - m / rest
        return ((1 - w) ** 2 + w * change[:, None]) * variance[:, None] + 1 / m

    method, passes = PAIRED * right, (n_p - pilot) * right
    if share_out:
        sizes = torch.logspace(1, max(1.0, math.log10(rest)), 20).long().unique().double()
        p = (p + shift).clamp(0.5 / (first + 1), 1 - 0.5 / (first + 1))
        weight = 1 / (1 / (first + 1) + spread * (1 - own))
        w = 1 - sizes / rest
        effective = 1 / (w / rest + 1.2 * paired_variance(sizes) / (variance[:, None] * sizes))
        zeta = upper_confidence_bound((change * variance).clamp(max=1)[:, None] * sizes, sizes, alpha_zeta)
        total, ones = alpha + alpha_zeta, torch.ones_like(effective)
        gain, method = torch.stack([  # FRESH, PAPER, PAIRED
            expected_radius(p, weight, ones * sizes, total),
            expected_radius(p, weight, ones * rest, alpha, zeta),
            expected_radius(p, weight, effective, total) * (sizes <= rest / 2)]).max(0)
        method, passes = _share_out(gain * right[:, None], FRESH + method, sizes.long(), int(passes.sum()))
        passes = torch.minimum(passes, torch.where(method == PAIRED, rest // 2, rest))
    m = passes.clamp(min=1).double()[:, None]
    return Plan(method, passes, pilot, (7 / (m * paired_variance(m))).sqrt().squeeze(1), first)


def _lower_bounds(plan: Plan, old: Tensor, replayed: Tensor, fresh: Tensor, classes: Tensor, is_class: bool,
                  alpha: float, alpha_zeta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Lower bounds (B,) of P[f^P = class], or of != where `is_class` is false; with zeta and difference."""
    bound = torch.zeros(len(old), dtype=torch.float64)
    zeta, difference = torch.full((2, len(old)), math.nan, dtype=torch.float64)
    for method in plan.method.unique().tolist():
        some = plan.method == method
        m, c = plan.passes[some], classes[some, None]
        new = fresh[some] if method == FRESH else replayed[some]
        inside = torch.arange(new.shape[1]) < m[:, None]
        after, before = inside & ((new == c) == is_class), (old[some] == c) == is_class
        if method == FRESH:
            bound[some] = lower_confidence_bound(after.sum(1), m, alpha + alpha_zeta)
        elif method == PAPER:
            changed = (inside & (new != old[some, :new.shape[1]])).sum(1)
            zeta[some] = upper_confidence_bound(changed, m, alpha_zeta)
            p_a = lower_confidence_bound(before.sum(1), old.shape[1], alpha)
            bound[some] = (p_a - zeta[some]).clamp(min=0)
        elif method == PAIRED:
            votes, before = before.sum(1), before[:, :new.shape[1]]
            both = (before & after).sum(1)
            lost, gained = (before & inside).sum(1) - both, after.sum(1) - both
            difference[some] = (gained - lost) / m.double()
            bound[some] = paired_lower_bound(both, lost, gained, m, votes - both - lost, old.shape[1] - m,
                                             alpha + alpha_zeta, plan.bet[some])
    return bound, zeta, difference


def _sampler(classifier: Classifier, cache: ReplayCache, images: Tensor, batch_size: int) -> Callable:
    """sample(sizes, key, first): what f^P predicts for `sizes` (B,) samples from `first` on, (B, largest)."""
    ids, sigma = [row.idx for row in cache.certificates], cache.certificates[0].sigma
    return partial(_predictions, classifier, images, ids, sigma, batch_size, cache.predictions.dtype)


def certify_incremental(classifier: Classifier, cache: ReplayCache, images: Tensor, n_p: int,
                        alpha_zeta: float, gamma: float = 0.99, mode: str = "auto",
                        both_sides: bool = False, batch_size: int = 100) -> list[IncrementalCertificate]:
    """Certify a changed classifier f^P with n_p samples an image, on average, instead of n.

    images: (B, C, H, W), those of the cache. For each image, with probability at least 1 - (alpha +
    alpha_zeta), g^P predicts `predict` within `radius`, for an f^P, n_p and mode fixed without looking at this
    noise: a search that compares many f^P on one cache scores them, and its winner needs a new certificate.
    Images whose cached class is wrong cost nothing and count 0. both_sides gives Theorem 2.1's two-sided
    radius, each side at half of every share of alpha; otherwise p_B = 1 - p_A.

    off     n_p fresh samples, one bound at alpha + alpha_zeta
    paper   IRS (Ugare et al., Algorithm 2). Where p_A < gamma: p_A - zeta, with zeta the bound of P[f != f^P]
            on n_p replayed samples. p_A fails with probability alpha, zeta with alpha_zeta; by the union
            bound they may share samples. Elsewhere as off
    paired  `paired_lower_bound` on n_p replayed samples, a twentieth of them a pilot
    auto    n_p passes for every image of right class, shared out by `plan_passes`, each by its best method

    Why paired and auto hold: plan and pilot see the first tenth of the cached samples, the bounds the others
    and fresh noise. Given the plan, every image has one bound of one size, fixed before its samples were
    seen, that fails with probability at most alpha + alpha_zeta. paper's branch depends on the p_A bound that
    it then uses: below gamma a fresh branch means that this bound failed, so alpha + alpha_zeta holds;
    elsewhere failure is at most alpha + 2 alpha_zeta (both_sides: 1.5 (alpha + alpha_zeta) in either case).
    Raises ValueError for an unknown mode, impossible alphas, and n_p beyond the cached samples (half of them
    if paired).
    """
    n = cache.predictions.shape[1]
    sigma, alpha = cache.certificates[0].sigma, cache.certificates[0].alpha
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; there are {', '.join(MODES)}")
    if not (alpha_zeta > 0 and alpha + alpha_zeta < 1):
        raise ValueError(f"alpha + alpha_zeta = {alpha} + {alpha_zeta} must be positive and stay below 1")
    if n_p > n or mode == "paired" and 2 * n_p > n:
        raise ValueError(f"n_p = {n_p} exceeds {'half of ' * (mode == 'paired')}the {n} cached samples")
    selected = torch.tensor([row.selected for row in cache.certificates])
    right = selected == torch.tensor([row.label for row in cache.certificates])
    sample = _sampler(classifier, cache, images, batch_size)
    if mode in ("off", "paper"):
        n_a = torch.tensor([row.n_a for row in cache.certificates])
        replay = (lower_confidence_bound(n_a, n, alpha) < gamma) & (mode == "paper")
        nothing = torch.zeros_like(n_a)
        plan = Plan(torch.where(replay, PAPER, FRESH) * right, n_p * right, nothing, nothing.double(), 0)
    else:
        plan = plan_passes(cache, sample, selected, right, n_p, alpha, alpha_zeta, mode == "auto")
    replayed = sample(plan.passes * (plan.method >= PAPER), cache.key, plan.first)
    fresh = sample(plan.passes * (plan.method == FRESH), cache.key.derive("fresh"), 0)
    votes = plan, cache.predictions[:, plan.first:], replayed, fresh

    sides = 2 if both_sides else 1
    p_lower, zeta, difference = _lower_bounds(*votes, selected, True, alpha / sides, alpha_zeta / sides)
    p_upper = 1 - p_lower
    if both_sides:  # the largest bound of any other class; -1 stands for the classes that nobody predicted
        p_upper = torch.zeros_like(p_lower)
        for other in [-1, *torch.cat([part.unique() for part in votes[1:]]).unique().tolist()]:
            bound = 1 - _lower_bounds(*votes, torch.full_like(selected, other), False, alpha / sides,
                                      alpha_zeta / sides)[0]
            p_upper = torch.where(selected == other, p_upper, torch.maximum(p_upper, bound))
    radius = torch.where(right, certified_radius(p_lower, sigma, p_upper), 0.0)
    columns = radius, plan.method, plan.passes + plan.pilot, zeta, difference
    return [IncrementalCertificate(row.idx, row.label, row.selected if radius > 0 else ABSTAIN, radius,
                                   int(radius > 0), METHODS[method], *rest)
            for row, radius, method, *rest in zip(cache.certificates, *(part.tolist() for part in columns))]


def estimate_radii(classifier: Classifier, cache: ReplayCache, images: Tensor, n_p: int,
                   batch_size: int = 100) -> Tensor:
    """For ranking, no certificates: radii (B,) if f^P's votes among all n cached samples were those among the
    first n_p. Candidates see the same noise, which largely cancels; few samples bias the radius upwards."""
    rows, n = cache.certificates, cache.predictions.shape[1]
    selected = torch.tensor([row.selected for row in rows])
    right = selected == torch.tensor([row.label for row in rows])
    replayed = _sampler(classifier, cache, images, batch_size)(n_p * right, cache.key, 0)
    votes = (replayed == selected[:, None]).sum(1) * (n / n_p)
    radii = certified_radius(lower_confidence_bound(votes.clamp(max=n), n, rows[0].alpha), rows[0].sigma)
    return torch.where(right, radii, 0.0)


# ---- aggregates and files ----

def average_certified_radius(rows) -> float:
    """ACR: mean over images of radius * 1[correct] (ARQ, section 2). Raises ValueError without rows."""
    return statistics.fmean(row.radius * row.correct for row in rows)


def acr_difference(rows, base_rows=None) -> tuple[float, float]:
    """ACR of rows, less that of base_rows on the same images if given; and its standard error over images."""
    values = torch.tensor([row.radius * row.correct for row in rows], dtype=torch.float64)
    if base_rows is not None:
        values = values - torch.tensor([row.radius * row.correct for row in base_rows], dtype=torch.float64)
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def certified_accuracy(rows, radius: float) -> float:
    """Share of images that are right, not abstained, and certified at least this l2 radius."""
    return statistics.fmean(bool(row.correct) and row.radius >= radius for row in rows)


COLUMNS = [field.name for field in fields(Certificate)]
PARSERS = {name: int for name in COLUMNS} | {"radius": float, "time": str, "sigma": float, "alpha": float}


def write_certificates(file: TextIO, rows: Sequence[Certificate]) -> None:
    """Append rows to an open TSV, after the header if it is empty. Radii keep full precision."""
    if file.tell() == 0:
        file.write("\t".join(COLUMNS) + "\n")
    for row in rows:
        values = [getattr(row, name) for name in COLUMNS]
        file.write("\t".join("" if value is None else str(value) for value in values) + "\n")
    file.flush()


def read_certificates(path) -> list[Certificate]:
    """Read a TSV of certificates, ours or with only the usual columns idx label predict radius correct time.

    A last line without its end is left out. Raises ValueError, naming the line, for what is no certificate.
    """
    with open(path) as file:
        lines = file.read().split("\n")[:-1]
    names = lines[0].split("\t") if lines else []
    if names[:5] != COLUMNS[:5] or not set(names) <= set(COLUMNS):
        raise ValueError(f"{path}: line 1 is not a header of certificates ({' '.join(COLUMNS[:6])} ...)")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        try:
            cells = dict(zip(names, line.split("\t"), strict=True))
            rows.append(Certificate(**{name: PARSERS[name](cell) for name, cell in cells.items()
                                       if cell or name == "time"}))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is not a certificate ({error})") from None
    return rows
