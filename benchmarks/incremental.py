"""Incremental certificates with fewer passes than IRS: spent where they buy radius, and paired.

    pilot = g.certify_and_cache(images, labels, n=400)  # samples that only the plan sees
    cache = g.certify_and_cache(images, labels, n=3600)
    rows = certify_incremental(Smooth(changed, 10, 0.25), images, cache, pilot, n_p=200)

Beyond the paper, whose IRS is `certify.Smooth.certify_incremental`; certificates.py has both.
"""

import math
from typing import NamedTuple

import torch
from scipy.special import betaincinv
from torch import Tensor
from torch.nn import functional as F

import certify
from certify import ReplayCache, Smooth, certified_radius, lower_confidence_bound

NONE, FRESH, PAIRED = range(3)  # what is done with an image
METHODS = "none", "fresh", "paired"


# ---- the paired bound ----
def paired_lower_bound(both, lost, gained, m, k, n, alpha: float, bet) -> Tensor:
    """Lower confidence bound (B,) of P[G], from m samples of F and G together, n others of F.

    F: f = c_A, G: f^P = c_A. both, lost, gained: counts (B,) of samples with F and G, F alone,
    G alone; k of the n others have F. P[bound <= P[G]] >= 1 - alpha. With w = n / (n + m):

        P[G] = t + w P[F] with t = E[G - wF], for any w.
        The m samples bet on t: under E[G - wF] <= t, the wealth
        e(t) = prod_i 1 + bet (G_i - w F_i - t) has expectation at most 1, for a bet fixed in
        advance that leaves no factor negative.
        The n others give a p-value for P[F] <= p: the binomial tail q(p) of k or more among n.
        They share no sample: P[q <= alpha e] <= E[min(1, alpha e)] <= alpha at the true t, p.
        Otherwise p >= LCB(k, n, alpha e(t)), and P[G] = t + w p is at least the minimum of
        t + w LCB(k, n, alpha e(t)) over all t.

    All of alpha is spent on this one comparison. e falls with t, so taking t from one end of a
    cell of a grid and e from the other errs downwards only."""
    columns = [part.double()[:, None] for part in (both, lost, gained, m, k, n, bet)]
    both, lost, gained, m, k, n, bet = columns
    w = n / (n + m)
    mean = (gained + (1 - w) * both - w * lost) / m
    square = (gained + (1 - w) ** 2 * both + w**2 * lost) / m
    spread = ((square - mean**2).clamp(min=0) / m).sqrt() + 1 / m
    offsets = torch.linspace(-5.3, 5.3, 161).sinh()  # dense near the mean: the minimum is there
    t = (mean + spread * offsets).clamp(max=1).maximum(-w)
    t = torch.cat([-w, t, torch.ones_like(w)], 1)
    size = torch.minimum(bet, 0.9 / (w + t).clamp(min=1e-12))
    neither = m - both - lost - gained
    outcomes = (both, 1 - w), (lost, -w), (gained, 1), (neither, 0)
    wealth = sum(count * torch.log1p(size * (value - t)) for count, value in outcomes)
    # A hundredth stays out of the bet: wealth lost on a t far off must not stop the others.
    level = alpha * (0.99 * wealth.clamp(max=700).exp() + 0.01)[:, 1:]
    p = lower_confidence_bound(k, n, level.clamp(max=0.999999))
    bound = torch.where(level >= 1, math.inf, t[:, :-1] + w * p)
    return bound.amin(1).clamp(0, 1)


# ---- the plan of the passes ----
class Outlook(NamedTuple):
    """What the pilot says of each image (B,)."""

    variance: Tensor  # p (1 - p), with p = P[f = c_A]
    change: Tensor  # how often a vote for c_A changes, per unit of variance
    p_after: Tensor  # P[f^P = c_A]
    weight: Tensor  # p_after is known as from so many samples


def count(votes: Tensor, sizes: Tensor) -> Tensor:
    """How many of the first `sizes` (B,) votes of each image (B, n) are set: (B,)."""
    return (votes & (torch.arange(votes.shape[1]) < sizes[:, None])).sum(1)


def look_ahead(before: Tensor, after: Tensor, sizes: Tensor) -> Outlook:
    """From votes for c_A on the pilot's noise: f's (B, n), and f^P's on the first `sizes` (B,).
    An image's own rates are drawn towards those of all, the more the fewer samples it has."""
    n = before.shape[1]
    p = (before.sum(1).double() + 0.5) / (n + 1)
    variance = p * (1 - p)
    before = before[:, : after.shape[1]]
    lost = count(before & ~after, sizes)
    gained = count(after & ~before, sizes)
    units = sizes * variance
    # Without a pilot, every vote may change.
    change = (lost.sum() + gained.sum() + 1) / (units.sum() + 1)
    shift = (gained.sum() - lost.sum()) / (units.sum() + 1)
    # Images differ by about half of what changes; one's own pilot counts as it tells more.
    spread = variance * change**2 / 4
    own = spread * sizes / (spread * sizes + change)
    own_shift = (gained - lost) / sizes.clamp(min=1)
    shift = own * own_shift + (1 - own) * shift * variance
    change = (lost + gained + 5 * change) / (units + 5)
    p_after = (p + shift).clamp(0.5 / (n + 1), 1 - 0.5 / (n + 1))
    return Outlook(variance, change, p_after, 1 / (1 / (n + 1) + spread * (1 - own)))


def plan_passes(outlook: Outlook, right, n: int, total: int, alpha: float) -> tuple:
    """Method, passes and bet (B,) of each image: at most `total` passes, where they buy radius.
    n: cached samples per image; alpha: of each bound; images of wrong class get nothing."""
    sizes = torch.logspace(1, max(1.0, math.log10(n)), 20).long().unique()
    # As many samples of f^P alone tell as much as `sizes` pairs and the other cached samples.
    share = 1.2 * paired_variance(outlook, sizes, n) / (outlook.variance[:, None] * sizes)
    alone = 1 / ((1 - sizes / n) / n + share)
    fresh = expected_radius(outlook, sizes.expand_as(alone), alpha)
    paired = expected_radius(outlook, alone, alpha) * (sizes <= n / 2)
    gain, method = torch.stack([fresh, paired]).max(0)
    method, passes = share_out(gain * right[:, None], FRESH + method, sizes, total)
    passes = torch.minimum(passes, torch.where(method == PAIRED, n // 2, n))
    m = passes.clamp(min=1)[:, None].double()
    bet = (7 / (m * paired_variance(outlook, m, n))).sqrt().squeeze(1)
    return method, passes, bet


def paired_variance(outlook: Outlook, m: Tensor, n: int) -> Tensor:
    """Variance of G - wF by m pairs (B or 1, S), and a margin for what they cannot rule out."""
    w = 1 - m / n
    return ((1 - w) ** 2 + w * outlook.change[:, None]) * outlook.variance[:, None] + 1 / m


def expected_radius(outlook: Outlook, samples: Tensor, alpha: float) -> Tensor:
    """Mean radius over sigma (B, S) that `samples` (B, S) will certify at alpha: over six
    quantiles of a beta distribution of the share of votes."""
    p, weight = outlook.p_after[:, None, None], outlook.weight[:, None, None]
    samples = samples.double().clamp(min=2)[..., None]
    size = samples * (weight + 1) / (weight + samples) - 1
    quantiles = (torch.arange(6) + 0.5) / 6
    shapes = (p * size).numpy(), ((1 - p) * size).numpy()
    votes = torch.as_tensor(betaincinv(*shapes, quantiles.numpy())) * samples
    return certified_radius(lower_confidence_bound(votes, samples, alpha), 1.0).mean(-1)


def share_out(gain, method, sizes, total: int) -> tuple[Tensor, Tensor]:
    """Methods and sizes (B,) of largest total gain (B, S): one price per pass uses up total."""
    gain, method, sizes = (F.pad(part, (1, 0)) for part in (gain, method, sizes))  # or no pass
    low, high = 0.0, 1.0
    for _ in range(40):
        price = (low + high) / 2
        choice = (gain - price * sizes).argmax(1)
        if sizes[choice].sum() > total:
            low = price
        else:
            high = price
    choice = (gain - high * sizes).argmax(1)
    spent = max(1, int(sizes[choice].sum()))
    return method.gather(1, choice[:, None]).squeeze(1), sizes[choice] * total // spent


# ---- certificates ----
def certify_incremental(
    g: Smooth, images, cache: ReplayCache, pilot: ReplayCache, n_p: int, alpha_zeta=0.001
) -> list[certify.IncrementalCertificate]:
    """Certify a changed f^P, smoothed by g, with n_p passes per image on average; one-sided.

    images: (B, C, H, W), those of both caches; the pilot's noise is not the cache's. For each,
    with probability at least 1 - (alpha + alpha_zeta), g^P predicts `predict` within `radius`,
    for an f^P fixed without this noise. Images of wrong cached class cost nothing and count 0.

    A twentieth of the passes goes to the pilot, the others where they buy radius, to fresh
    samples or pairs. Why it holds: given the pilot, every image has one bound, fixed before its
    samples were seen, that fails with probability at most alpha + alpha_zeta.

    Raises ValueError for impossible alphas, another sigma than f's, too many passes."""
    rows, n = cache.certificates, cache.predictions.shape[1]
    if g.levels is not None:  # at most n samples vote for an image
        numbers = n, images[0].numel(), g.sigma, g.levels
        alpha_zeta = certify.alpha_after_noise(alpha_zeta, *numbers)
    sigma, alpha = rows[0].sigma, rows[0].alpha + alpha_zeta
    certify.require(g.sigma == sigma, f"the cache has sigma {sigma}, not {g.sigma}")
    certify.require(pilot.key != cache.key, "pilot and cache need noise of their own")
    certify.require(0 < alpha_zeta < alpha < 1, f"alpha + alpha_zeta = {alpha} is not below 1")
    certify.require(n_p <= n, f"n_p = {n_p} exceeds the {n} cached samples")
    ids = [row.idx for row in rows]
    selected = torch.tensor([row.selected for row in rows])
    right = selected == torch.tensor([row.label for row in rows])
    c_a = selected[:, None]

    pilot_passes = min(pilot.predictions.shape[1], n_p // 20) * right
    after = g.predictions(images, ids, pilot_passes, pilot.key) == c_a
    outlook = look_ahead(pilot.predictions == c_a, after, pilot_passes)
    total = int(((n_p - pilot_passes) * right).sum())
    method, passes, bet = plan_passes(outlook, right, n, total, alpha)
    is_fresh, is_paired = method == FRESH, method == PAIRED

    bound = torch.zeros(len(rows), dtype=torch.float64)
    fresh = g.predictions(images, ids, passes * is_fresh, cache.key + "/fresh") == c_a
    votes = count(fresh, passes)[is_fresh]
    bound[is_fresh] = lower_confidence_bound(votes, passes[is_fresh], alpha)

    after = g.predictions(images, ids, passes * is_paired, cache.key) == c_a
    before = cache.predictions == c_a
    seen = before[:, : after.shape[1]]
    both = count(seen & after, passes)
    lost = count(seen, passes) - both
    gained = count(after, passes) - both
    others = before.sum(1) - both - lost
    counts = both, lost, gained, passes, others, n - passes
    counts = [part[is_paired] for part in counts]
    bound[is_paired] = paired_lower_bound(*counts, alpha, bet[is_paired])

    radius = certified_radius(bound, g.sigma)
    passes = (passes + pilot_passes).tolist()
    certificates = []
    for i, (row, value) in enumerate(zip(rows, radius.tolist())):
        predict = row.selected if value > 0 else certify.ABSTAIN
        fields = {"idx": row.idx, "label": row.label, "predict": predict, "radius": value}
        fields |= {"correct": int(value > 0), "method": METHODS[method[i]], "passes": passes[i]}
        certificates.append(certify.IncrementalCertificate(**fields, zeta=math.nan))
    return certificates
