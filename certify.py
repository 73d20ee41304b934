"""Randomized smoothing: certify any classifier `images -> logits`, from scratch or incrementally.

    g = Smooth(classifier, num_classes=10, sigma=0.25)
    certificates = g.certify(images, labels)              # CERTIFY: a class and an l2 radius per image
    classes = g.predict(images)                           # PREDICT: a class per image, or ABSTAIN
    cache = g.certify_and_cache(images, labels)           # CERTIFY, keeping what f predicted
    Smooth(changed, 10, 0.25).certify_incremental(images, cache, n_p=100)  # IRS

This file stands alone (torch and scipy): copy it. Images are float tensors (B, C, H, W) in [0, 1]; noise has
standard deviation sigma in those units and is added before any normalisation.

    paper     here        meaning
    f, f^P    classifier  base classifier, changed classifier: images (B, C, H, W) -> logits (B, classes)
    g         Smooth      smoothed classifier, g(x) = argmax_c P[f(x + eps) = c], eps ~ N(0, sigma^2 I)
    c_A       selected    class chosen on n0 samples; the bounds use samples this choice did not see
    n_A, n_B  n_a, n_b    votes for c_A, and for the most counted other class, among n samples
    p_A, p_B  p_a, p_b    bounds of P[f(x + eps) = c_A] from below, of every other class from above
    n_p       n_p         samples of f^P per image in the incremental certificate
    zeta      zeta        upper confidence bound of P[f(x + eps) != f^P(x + eps)]
    R         radius      certified l2 radius: g is constant on the ball of this radius around x

Sources: Cohen, Rosenfeld and Kolter, ICML 2019 (CERTIFY, PREDICT); Ugare et al., ICLR 2024 (IRS).
"""

import hashlib
import math
import statistics
import time
from collections import namedtuple
from collections.abc import Sequence
from datetime import timedelta
from typing import TextIO

import torch
from scipy.stats import beta, binomtest, norm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # of any dimension

ABSTAIN = -1
CHUNK = 100  # noise is drawn this many samples at a time, whatever the batch size


def refuse(wrong, message: str) -> None:
    if wrong:
        raise ValueError(message)


# ---- bounds and radii ----
def lower_confidence_bound(k, n, alpha):
    """One-sided Clopper-Pearson lower bound on a probability, from k successes in n independent trials.
    P[bound <= true probability] >= 1 - alpha. Numbers give a float; arrays broadcast and give a float64
    tensor. Raises ValueError unless 0 <= k <= n, n >= 1 and 0 < alpha < 1."""
    k, n, alpha = (torch.as_tensor(value, dtype=torch.float64).cpu().numpy() for value in (k, n, alpha))
    refuse(not ((alpha > 0) & (alpha < 1)).all(), f"alpha must lie between 0 and 1, not at {alpha}")
    refuse(not ((k >= 0) & (k <= n) & (n >= 1)).all(), "counts must satisfy 0 <= k <= n and n >= 1")
    positive = k > 0  # k = 0 has no beta quantile: its bound is 0
    return _number_or_tensor(beta.ppf(alpha, k + ~positive, n - k + 1) * positive)


def upper_confidence_bound(k, n, alpha):
    """One-sided Clopper-Pearson upper bound: P[bound >= true probability] >= 1 - alpha."""
    return 1 - lower_confidence_bound(torch.as_tensor(n) - torch.as_tensor(k), n, alpha)


def certified_radius(p_a, sigma: float, p_b=None):
    """Certified l2 radius R = sigma/2 (Phi^-1(p_A) - Phi^-1(p_B)), in [0, 1] pixels (ARQ, Theorem 2.1).
    p_a bounds the predicted class's probability from below, p_b every other class's from above; without p_b,
    1 - p_a takes its place: R = sigma Phi^-1(p_A), the one-sided radius of published tables. Numbers or
    arrays; 0 where nothing is certified. Raises ValueError unless sigma > 0 and 0 <= p_a, p_b <= 1."""
    refuse(not sigma > 0, f"sigma must be positive, not {sigma}")
    p_a = torch.as_tensor(p_a, dtype=torch.float64).cpu()
    p_b = 1 - p_a if p_b is None else torch.as_tensor(p_b, dtype=torch.float64).cpu()
    possible = (p_a >= 0) & (p_a <= 1) & (p_b >= 0) & (p_b <= 1)
    refuse(not possible.all(), "probabilities must lie between 0 and 1")
    certified = p_a > p_b  # elsewhere 1/2 stands for both: infinite quantiles may have no difference
    quantile_a = norm.ppf(torch.where(certified, p_a, 0.5))
    quantile_b = norm.isf(torch.where(certified, p_b, 0.5))  # -Phi^-1(p_B), precise near 0
    return _number_or_tensor(sigma / 2 * (quantile_a + quantile_b))


def _number_or_tensor(array):
    return torch.as_tensor(array) if getattr(array, "ndim", 0) else float(array)


# ---- noise ----
def draw_noise(key: str, image_id: int, chunk: int, shape: Sequence[int], device) -> Tensor:
    """Standard normal noise (CHUNK, *shape): samples CHUNK * chunk onwards of one image under one key.
    It depends on the arguments and the device type alone: predictions can be replayed in any batch size."""
    start = hashlib.sha256(f"{key}|{image_id}".encode()).digest()
    # A CPU generator keeps 32 bits of its seed: an image's chunks count up from its start, so none repeats.
    seed = (int.from_bytes(start[:4], "little") + chunk) % 2**32
    generator = torch.Generator(device).manual_seed(seed)
    # Contiguous: drawing in channels_last order is several times slower on a CPU.
    return torch.randn(CHUNK, *shape, generator=generator, device=device)


# ---- certificates ----
# One certified image. predict is ABSTAIN (-1) and radius 0 where the bound does not exceed 1/2. Other tools
# read the first six; the rest is what the radius was computed from, None where it is not known.
COLUMNS = "idx label predict radius correct time selected n_a n_b n n0 sigma alpha".split()
PARSERS = dict.fromkeys(COLUMNS, int) | {"radius": float, "time": str, "sigma": float, "alpha": float}
Certificate = namedtuple("Certificate", COLUMNS, defaults=[None] * 7)

# f's certificates for a set of images; what it predicted for every sample behind them: (B, n) uint8 (int16
# beyond 256 classes), zeros where nothing was sampled; key: the noise of those samples.
ReplayCache = namedtuple("ReplayCache", "certificates predictions key")

# One image certified for f^P: method is replayed, fresh or none; passes, samples of f^P; zeta may be nan.
FIELDS = "idx label predict radius correct method passes zeta"
IncrementalCertificate = namedtuple("IncrementalCertificate", FIELDS)


def _records(kind, columns: dict, **same) -> list:
    """One record per image, from columns of equal length by the names of its fields."""
    rows = zip(*(column.tolist() if isinstance(column, Tensor) else column for column in columns.values()))
    return [kind(**dict(zip(columns, row)), **same) for row in rows]


class Smooth:
    """The smoothed classifier g(x) = argmax_c P[f(x + eps) = c], eps ~ N(0, sigma^2 I).

    classifier: f, any callable from images (B, C, H, W) to logits (B, num_classes); num_classes may be None
    sigma: standard deviation of the noise, in [0, 1] pixels
    seed, purpose: name the noise; equal names draw equal noise
    batch_size: samples per forward pass; what integer networks predict does not depend on it
    Noisy images are made in float32 and given to f in the type of its parameters. Guarantees hold in real,
    not in floating-point arithmetic, as in all common code (Voracek, Hein 2023). Every method refuses, by
    ValueError, pixels outside [0, 1], ids given twice, an f in training mode, logits that name no class."""

    def __init__(self, classifier, num_classes, sigma, seed=0, batch_size=100, purpose="certificate"):
        refuse(not (sigma > 0 and batch_size >= 1), f"sigma {sigma} or batch_size {batch_size} is too small")
        self.classifier, self.num_classes = classifier, num_classes
        self.sigma, self.batch_size = sigma, batch_size
        self.key = f"{seed}|{purpose}"  # names the noise; equal keys replay it, others are fresh

    def certify(self, images, labels, ids=None, n0=100, n=1000, alpha=0.001) -> list[Certificate]:
        """CERTIFY (Cohen et al., section 3.2.2) for a block of images (B, C, H, W) in [0, 1].

        For each image, with probability at least 1 - alpha over the noise: unless the certificate abstains, g
        predicts `predict` everywhere closer than `radius` in l2. alpha is spent per image: about alpha * B
        certificates may be wrong. ids name the images' noise (default: their positions)."""
        return self.certify_and_cache(images, labels, ids, n0, n, alpha, skip_wrong=False).certificates

    def certify_and_cache(self, images, labels, ids=None, n0=100, n=1000, alpha=0.001, skip_wrong=True):
        """CERTIFY for the base classifier f, as a ReplayCache with each sample's prediction.
        skip_wrong: an image of wrong selected class adds 0 to every ACR, gets no samples, and abstains."""
        start = time.monotonic()
        ids = range(len(images)) if ids is None else ids
        # counts0 <- SampleUnderNoise(f, x, n0, sigma)
        counts0 = self.sample_under_noise(images, ids, n0, self.key + "/select")
        labels = torch.as_tensor(labels).cpu()
        fit = labels.shape == (len(images),) and ((labels >= 0) & (labels < self.num_classes)).all()
        refuse(not fit, f"{len(images)} images need as many labels from 0 to {self.num_classes - 1}")
        # c_A <- top index in counts0
        selected = counts0.argmax(1)
        # counts <- SampleUnderNoise(f, x, n, sigma). n is part of the key: another n draws all samples anew.
        sizes = torch.where(selected == labels, n, 0 if skip_wrong else n)
        key = f"{self.key}/estimate{n}"
        predictions = self.predictions(images, ids, sizes, key)
        predictions = F.pad(predictions, (0, n - predictions.shape[1]))
        counts = torch.where(sizes[:, None] > 0, self._count(predictions), 0)
        n_a = counts.gather(1, selected[:, None]).squeeze(1)
        n_b = counts.scatter(1, selected[:, None], 0).amax(1)
        # p_A <- LowerConfBound(counts[c_A], n, 1 - alpha)
        p_a = lower_confidence_bound(n_a, sizes.clamp(min=1), alpha)
        # if p_A > 1/2 return prediction c_A and radius sigma Phi^-1(p_A), else return ABSTAIN
        predicted = torch.where(p_a > 0.5, selected, ABSTAIN)
        radius = certified_radius(p_a, self.sigma)
        seconds = str(timedelta(seconds=(time.monotonic() - start) / len(labels)))
        columns = {"idx": ids, "label": labels, "predict": predicted, "radius": radius}
        columns |= {"correct": (predicted == labels).long(), "selected": selected}
        columns |= {"n_a": n_a, "n_b": n_b, "n": sizes}
        rows = _records(Certificate, columns, time=seconds, n0=n0, sigma=self.sigma, alpha=alpha)
        return ReplayCache(rows, predictions, key)

    def predict(self, images: Tensor, ids=None, n: int = 1000, alpha: float = 0.001) -> list[int]:
        """PREDICT (Cohen et al., section 3.2.1): g's class for each image (B, C, H, W) in [0, 1], wrong with
        probability at most alpha each; ABSTAIN where a binomial test cannot tell the top two apart."""
        ids = range(len(images)) if ids is None else ids
        # counts <- SampleUnderNoise(f, x, n, sigma)
        counts = self.sample_under_noise(images, ids, n, self.key + "/predict")
        # c_A, c_B <- top two indices in counts; n_A, n_B <- their counts
        votes, classes = counts.topk(2, dim=1)
        # if BinomPValue(n_A, n_A + n_B, 0.5) <= alpha return c_A, else return ABSTAIN
        sure = [binomtest(n_a, n_a + n_b, 0.5).pvalue <= alpha for n_a, n_b in votes.tolist()]
        return torch.where(torch.tensor(sure), classes[:, 0], ABSTAIN).tolist()

    def certify_incremental(self, images, cache, n_p, alpha_zeta=0.001, gamma=0.99) -> list:
        """IRS (Ugare et al., Algorithm 2): certify a changed f^P with n_p samples per image, not n.

        `self` smooths f^P; images (B, C, H, W) and noise are those of f's cache. For each image, with
        probability at least 1 - (alpha + alpha_zeta), g^P predicts `predict` within `radius` (one-sided), for
        an f^P chosen without this noise: a search scores with it, its winner needs a certificate of its own.
        Why alpha + alpha_zeta, with the fresh branch bounded at alpha? Let p be the true P[f = c_A]. If p is
        at least gamma, a replay's p_A is below p: it fails by zeta alone, and a fresh bound fails with alpha.
        If p is below, a fresh branch means that f's bound failed, as it may with alpha; a replay fails by it
        or zeta.

        A wrong cached class costs nothing and counts 0. ValueError: for impossible alphas, n_p or sigma."""
        selected, right, ids = self._cached(cache)
        n, alpha = cache.predictions.shape[1], cache.certificates[0].alpha
        refuse(not 0 < alpha_zeta < 1 - alpha, f"alpha_zeta must lie between 0 and 1 - {alpha}")
        refuse(n_p > n, f"n_p = {n_p} exceeds the {n} cached samples")
        # c_A, p_A <- what f was certified with
        n_a = torch.tensor([row.n_a for row in cache.certificates])
        p_a = lower_confidence_bound(n_a, n, alpha)
        # if p_A < gamma: replay the first n_p cached samples
        replay = right & (p_a < gamma)
        new = self.predictions(images, ids, torch.where(replay, n_p, 0), cache.key)
        # n_delta <- how often f^P and f disagree on them
        n_delta = (new != cache.predictions[:, : new.shape[1]]).sum(1)
        # zeta <- UpperConfBound(n_delta, n_p, alpha_zeta); p <- p_A - zeta
        zeta = upper_confidence_bound(torch.where(replay, n_delta, 0), n_p, alpha_zeta)
        p_replayed = (p_a - zeta).clamp(min=0)
        # else: counts <- SampleUnderNoise(f^P, x, n_p, sigma); p <- LowerConfBound(counts[c_A], n_p, alpha)
        fresh = right & ~replay
        new = self.predictions(images, ids, torch.where(fresh, n_p, 0), cache.key + "/fresh")
        p_fresh = lower_confidence_bound((new == selected[:, None]).sum(1), n_p, alpha)
        # if p > 1/2 return prediction c_A and radius sigma Phi^-1(p), else return ABSTAIN
        radius = certified_radius(torch.where(replay, p_replayed, p_fresh), self.sigma)
        radius = torch.where(right, radius, 0.0)
        predicted = torch.where(radius > 0, selected, ABSTAIN)
        found = {"predict": predicted, "radius": radius, "correct": (radius > 0).long()}
        methods = ["replayed" if replay[i] else "fresh" if fresh[i] else "none" for i in range(len(ids))]
        zeta = torch.where(replay, zeta, math.nan)
        how = {"method": methods, "passes": torch.where(right, n_p, 0), "zeta": zeta}
        labels = [row.label for row in cache.certificates]
        return _records(IncrementalCertificate, {"idx": ids, "label": labels, **found, **how})

    def estimate_radii(self, images: Tensor, cache: ReplayCache, n_p: int) -> Tensor:
        """For ranking, no certificates: radii (B,) if g^P's votes among all n are those among the first n_p.
        Candidates see the same noise, which largely cancels; few samples bias the radius upwards."""
        selected, right, ids = self._cached(cache)
        n = cache.predictions.shape[1]
        new = self.predictions(images, ids, torch.where(right, n_p, 0), cache.key)
        votes = (new == selected[:, None]).sum(1) * (n / n_p)
        p_a = lower_confidence_bound(votes.clamp(max=n), n, cache.certificates[0].alpha)
        return torch.where(right, certified_radius(p_a, self.sigma), 0.0)

    def _cached(self, cache: ReplayCache) -> tuple[Tensor, Tensor, list[int]]:
        """Selected classes (B,), whether they are the labels (B,), and the images' ids."""
        rows = cache.certificates
        refuse(rows[0].sigma != self.sigma, f"the cache has sigma {rows[0].sigma}, g has {self.sigma}")
        selected = torch.tensor([row.selected for row in rows])
        return selected, selected == torch.tensor([row.label for row in rows]), [row.idx for row in rows]

    def sample_under_noise(self, images: Tensor, ids: Sequence[int], n: int, key: str) -> Tensor:
        """How often each class is predicted in n noisy copies per image: (B, classes), int64."""
        return self._count(self.predictions(images, ids, torch.full((len(images),), n), key))

    def _count(self, predictions: Tensor) -> Tensor:
        return torch.stack([row.long().bincount(minlength=self.num_classes) for row in predictions])

    @torch.inference_mode()
    def predictions(self, images, ids, sizes: Tensor, key: str, first: int = 0) -> Tensor:
        """Classes of noisy copies first .. first + sizes[i] - 1 of images[i]: (B, largest size), then zeros.
        uint8 (wider beyond 256 classes). All images' samples are classified in order, in full batches."""
        pixels = images.is_floating_point() and ((images >= 0) & (images <= 1)).all()
        refuse(not pixels, "images must be floats in [0, 1], not normalised; divide 8-bit ones by 255")
        ids = torch.as_tensor(ids).tolist()
        named = len(images) == len(ids) == len(set(ids))
        refuse(not named, f"{len(images)} images need as many different ids: an id names an image's noise")
        found, batch = [], []
        left, room = int(sizes.sum()), self.batch_size
        for image, image_id, size in zip(images, ids, sizes.tolist()):
            last = first + size
            for chunk in range(first // CHUNK, math.ceil(last / CHUNK)):
                noise = draw_noise(key, image_id, chunk, image.shape, image.device)
                start = chunk * CHUNK
                noisy = noise[max(0, first - start) : max(0, last - start)].mul_(self.sigma).add_(image)
                while len(noisy):
                    part, noisy = noisy.tensor_split([room])
                    batch.append(part)
                    room, left = room - len(part), left - len(part)
                    if room == 0 or left == 0:
                        found.append(self._classify(torch.cat(batch)).cpu())
                        batch, room = [], self.batch_size
        classes = self.num_classes or 0
        dtype = torch.uint8 if classes <= 2**8 else torch.int16 if classes <= 2**15 else torch.int32
        table = torch.zeros(len(sizes), int(sizes.max()), dtype=dtype)
        if found:
            table[torch.arange(table.shape[1]) < sizes[:, None]] = torch.cat(found).to(dtype)
        return table

    def _classify(self, noisy: Tensor) -> Tensor:
        """f's classes (B,) of a batch; whatever is no answer is refused."""
        if isinstance(self.classifier, nn.Module):
            for module in self.classifier.modules():
                refuse(module.training, "the classifier is in training mode; call its eval() first")
                by_batch = isinstance(module, BatchNorm) and module.running_mean is None
                refuse(by_batch, "a BatchNorm without running statistics answers by batch, not by image")
            dtypes = (p.dtype for p in self.classifier.parameters() if p.is_floating_point())
            noisy = noisy.to(next(dtypes, noisy.dtype))
        logits = self.classifier(noisy)
        kind = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        are_logits = isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == len(noisy)
        refuse(not are_logits, f"the classifier must return logits ({len(noisy)}, classes), not {kind}")
        self.num_classes = self.num_classes or logits.shape[1]
        fit = 1 < logits.shape[1] == self.num_classes
        refuse(not fit, f"{self.num_classes} classes, but the classifier gives {logits.shape[1]} logits")
        largest, classes = logits.max(1)  # nan where there is one
        if not largest.isfinite().all():
            alone = (logits == largest[:, None]).sum(1) == 1  # +inf is an answer where no other is
            wrong = f"{(~logits.isfinite()).sum()} of {logits.numel()} logits are not finite"
            refuse(not (largest.isfinite() | alone).all(), f"{wrong}: the network is broken")
        return classes


# ---- aggregates and files ----
def two_sided(rows: Sequence[Certificate]) -> list[Certificate]:
    """The same certificates by Theorem 2.1 in full: p_A and p_B bounded at alpha / 2 each. The most counted
    other class needs no correction over classes: its bound is at least the true runner-up's. Either radius is
    wrong with probability at most alpha; the larger, taken afterwards, with up to 1.5 alpha."""
    bare = any(None in (row.n_a, row.n_b) for row in rows)
    refuse(bare, "these certificates hold no counts; a two-sided radius needs n_a and n_b")
    found = []
    for row in rows:
        p_a = lower_confidence_bound(row.n_a, max(row.n, 1), row.alpha / 2)
        p_b = upper_confidence_bound(row.n_b, max(row.n, 1), row.alpha / 2)
        predicted, radius = row.selected if p_a > p_b else ABSTAIN, certified_radius(p_a, row.sigma, p_b)
        found.append(row._replace(predict=predicted, radius=radius, correct=int(predicted == row.label)))
    return found


def average_certified_radius(rows) -> float:
    """ACR: mean over images of radius * 1[correct] (ARQ, section 2). Raises ValueError without rows."""
    return statistics.fmean(row.radius * row.correct for row in rows)


def acr_difference(rows, base_rows=None) -> tuple[float, float | None]:
    """Mean and standard error (of one image: None) of radius * 1[correct], less base_rows' on the same."""
    values = torch.tensor([row.radius * row.correct for row in rows], dtype=torch.float64)
    if base_rows is not None:
        values -= torch.tensor([row.radius * row.correct for row in base_rows], dtype=torch.float64)
    return float(values.mean()), float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None


def certified_accuracy(rows, radius: float) -> float:
    """Share of images that are right, not abstained, and certified at least this l2 radius."""
    return statistics.fmean(bool(row.correct) and row.radius >= radius for row in rows)


def write_certificates(file: TextIO, rows: Sequence[Certificate]) -> None:
    """Append rows to an open TSV, after the header if it is empty. Radii keep full precision."""
    if file.tell() == 0:
        file.write("\t".join(COLUMNS) + "\n")
    for row in rows:
        file.write("\t".join("" if value is None else str(value) for value in row) + "\n")
    file.flush()


def read_certificates(path) -> list[Certificate]:
    """Read a TSV of certificates, ours or with only the usual columns idx label predict radius correct time.
    Raises ValueError, naming the file and the line, for anything else: a last line without its end, too."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:  # spreadsheets write a mark in front
        *lines, rest = file.read().split("\n")
    names = lines[0].split("\t") if lines else []
    usual = names[:5] == COLUMNS[:5] and set(names) <= set(COLUMNS)
    refuse(not usual, f"{path}: line 1 is no header of certificates in UTF-8 ({' '.join(COLUMNS[:6])} ...)")
    refuse(rest, f"{path}: line {len(lines) + 1} was cut: it has no end; remove it")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        try:
            cells = zip(names, line.split("\t"), strict=True)
            values = {name: PARSERS[name](cell) for name, cell in cells if cell or name == "time"}
            rows.append(Certificate(**values))
            refuse(not 0 <= rows[-1].radius < math.inf, "a radius is a number from 0")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is not a certificate ({error})") from None
    return rows
