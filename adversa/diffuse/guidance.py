"""Guidance wraps a denoiser and returns a denoiser, whose answer also says how far the classes lie
apart.

Rows of a batch request different guidance, so every strength is [B] and on the CPU: which rows a
pass is for is known without waiting for the device. A row at strength 0 is unchanged bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adversa.diffuse.edm import DenoiserFn
from adversa.training.device import to_device

# Rows a pass of a steering model. Always so many (a short pass is filled up), so that no row's
# gradient hangs on its neighbours.
CHUNK = 8


class Answer(NamedTuple):
    """x0 [B, C, h, w]; unit [B]: root mean square of the row's conditional minus its other answer,
    0 where there was none.
    """

    x0: Tensor
    unit: Tensor


GuidedFn = Callable[[Tensor, Tensor, Tensor], Answer]
# (x0 [n, C, h, w], label int64 [n], rows int64 [n]: which of the batch these are) -> gradient like
# x0
GradientFn = Callable[[Tensor, Tensor, Tensor], Tensor]


def classifier_free(
    denoiser: DenoiserFn,
    scale: Tensor,
    second: Tensor,
    null_label: int,
    weak: DenoiserFn | None = None,
) -> GuidedFn:
    """other + w (conditional - other)  (Ho & Salimans 2022); `other` is the null class's answer, or
    that of a weaker denoiser asked the same (autoguidance, Karras et al. 2024, "Guiding a Diffusion
    Model with a Bad Version of Itself", equation 3).

    scale [B]: w. second bool [B], on the CPU: the rows that get a second pass; others, and rows at
    w = 1, are the conditional answer itself. Both passes of the null class are one call of the
    denoiser, of B + sum(second) rows.
    """

    def guided(x: Tensor, sigma: Tensor, label: Tensor) -> Answer:
        unit = torch.zeros(len(x), device=x.device)
        if not bool(second.any()):
            return Answer(denoiser(x, sigma, label), unit)
        rows = to_device(second.nonzero().squeeze(1), x.device)
        if weak is None:
            null = torch.full_like(rows, null_label)
            both = denoiser(
                torch.cat([x, x[rows]]), torch.cat([sigma, sigma[rows]]), torch.cat([label, null])
            )
            conditional, other = both[: len(x)], both[len(x) :]
        else:
            conditional, other = denoiser(x, sigma, label), weak(x[rows], sigma[rows], label[rows])
        apart, w = conditional[rows] - other, to_device(scale, x.device)[rows].view(-1, 1, 1, 1)
        mixed = torch.where(w == 1, conditional[rows], other + w * apart)
        return Answer(conditional.index_copy(0, rows, mixed), unit.index_copy(0, rows, rms(apart)))

    return guided


def gradient_guided(
    guided: GuidedFn,
    gradient: GradientFn,
    strength: Tensor,
    skipped: Tensor,
    length: Callable[[Answer, Tensor], Tensor] | None = None,
) -> GuidedFn:
    """x0 + strength unit g / rms(g), g the gradient with respect to x0 alone: no pass back through
    the denoiser (He et al. 2024, "Manifold Preserving Guided Diffusion", algorithm 1).

    strength [B], on the CPU; 0: no gradient is taken. unit: the row's `Answer.unit`, so that the
    strength is in classifier-free corrections; or length(answer, sigma) [B]. skipped int64 [B]:
    counts up where a gradient is not finite, and x0 stays as it is.
    """

    def run(x: Tensor, sigma: Tensor, label: Tensor) -> Answer:
        answer = guided(x, sigma, label)
        rows = strength.nonzero().squeeze(1)
        if not len(rows):
            return answer
        rows = to_device(rows, x.device)
        found = torch.cat([_chunk(gradient, answer.x0, label, part) for part in rows.split(CHUNK)])
        largest = found.abs().amax((1, 2, 3))
        finite = largest.isfinite()
        direction = found / largest.clamp(min=torch.finfo(found.dtype).tiny).view(
            -1, 1, 1, 1
        )  # its square neither under- nor overflows
        unit = answer.unit if length is None else length(answer, sigma)
        size = unit[rows] * to_device(strength, x.device)[rows]
        factor = size / rms(direction).clamp(min=1e-12)
        moved = answer.x0[rows] + factor.view(-1, 1, 1, 1) * direction
        skipped.index_add_(0, rows, (~finite).to(skipped.dtype))
        taken = (finite & (largest > 0)).view(-1, 1, 1, 1)
        return Answer(
            answer.x0.index_copy(0, rows, torch.where(taken, moved, answer.x0[rows])), answer.unit
        )

    return run


def _chunk(gradient: GradientFn, x0: Tensor, label: Tensor, rows: Tensor) -> Tensor:
    filled = torch.cat([rows, rows[:1].expand(CHUNK - len(rows))])
    with torch.autocast(x0.device.type, enabled=False):
        return gradient(x0[filled].float(), label[filled], filled)[: len(rows)]


def reference_guided(
    guided: GuidedFn, reference: Tensor, strength: Tensor, factor: int
) -> GuidedFn:
    """x0 + strength (low(reference) - low(x0)): towards the low frequencies of the reference (Choi
    et al. 2021, "ILVR", equation 7; as its filter there, `low` is no projection: at 1 some of the
    difference is left).

    reference [B, C, h, w]; strength [B] on the CPU; low: `low_frequencies` over `factor` pixels.
    """

    def run(x: Tensor, sigma: Tensor, label: Tensor) -> Answer:
        answer = guided(x, sigma, label)
        rows = to_device(strength.nonzero().squeeze(1), x.device)
        if not len(rows):
            return answer
        apart = low_frequencies(reference[rows] - answer.x0[rows], factor)
        moved = answer.x0[rows] + to_device(strength, x.device)[rows].view(-1, 1, 1, 1) * apart
        return Answer(answer.x0.index_copy(0, rows, moved), answer.unit)

    return run


def low_frequencies(x: Tensor, factor: int) -> Tensor:
    """Means over factor x factor pixels, and linear in between: [B, C, h, w] to the same."""
    return F.interpolate(
        F.avg_pool2d(x, factor, ceil_mode=True),
        size=x.shape[-2:],
        mode="bilinear",
        align_corners=False,
    )


def masked(guided: GuidedFn, source: Tensor, mask: Tensor) -> GuidedFn:
    """source where the mask is 0, x0 where it is 1, linear between (Lugmayr et al. 2022,
    "RePaint").

    source [B, C, h, w], mask [B, 1, h, w] in [0, 1]. The ODE then carries a kept pixel along
    source + sigma n, to `source` itself.
    """

    def run(x: Tensor, sigma: Tensor, label: Tensor) -> Answer:
        answer = guided(x, sigma, label)
        return Answer(torch.lerp(source, answer.x0, mask.expand_as(source)), answer.unit)

    return run


def rms(x: Tensor) -> Tensor:
    """[B, C, h, w] to [B], in float32. CHUNK rows at a time: how a sum is split among threads hangs
    on its shape.
    """
    chunks = []
    for part in x.float().split(CHUNK):
        filled = F.pad(part, (0, 0, 0, 0, 0, 0, 0, CHUNK - len(part)))
        chunks.append(filled.square().mean((1, 2, 3)).sqrt()[: len(part)])
    return torch.cat(chunks)


def objective(logits: Tensor, label: Tensor, kind: str) -> Tensor:
    """How hard an image is, [B], higher is harder: `loss` -ln p[label], `entropy` of p, `margin`
    the best other logit minus the label's. In float32.
    """
    logits = logits.float()
    logp = logits.log_softmax(1)
    if kind == "loss":
        return -logp.gather(1, label[:, None])[:, 0]
    if kind == "entropy":
        return -(logp.exp() * logp).sum(1)
    assert kind == "margin", kind
    others = logits.scatter(1, label[:, None], float("-inf")).amax(1)
    return others - logits.gather(1, label[:, None])[:, 0]


def classifier_gradient(
    classifier: Callable[[Tensor], Tensor], pixels: Callable[[Tensor], Tensor], kind: str
) -> GradientFn:
    """The gradient towards what a classifier finds hard, by `objective`.

    classifier: pixels [B, 3, R, R] in [0, 1] to logits [B, K]; pixels: the diffused space [B, C, h,
    w] to such pixels. Gradients go through both.
    """

    def gradient(x0: Tensor, label: Tensor, rows: Tensor) -> Tensor:
        return _gradient(lambda z: objective(classifier(pixels(z)), label, kind), x0)

    return gradient


def reference_gradient(
    features: Callable[[Tensor], Tensor], pixels: Callable[[Tensor], Tensor], references: Tensor
) -> GradientFn:
    """The gradient towards the features of each row's reference: of minus the squared distance.

    references [B, D] of the whole batch.
    """

    def gradient(x0: Tensor, label: Tensor, rows: Tensor) -> Tensor:
        return _gradient(lambda z: -(features(pixels(z)) - references[rows]).square().sum(1), x0)

    return gradient


def _gradient(of: Callable[[Tensor], Tensor], x0: Tensor) -> Tensor:
    with torch.enable_grad():
        z = x0.detach().requires_grad_(True)
        (found,) = torch.autograd.grad(of(z).sum(), z)
    return found


def padded(denoiser: DenoiserFn, rows: int) -> DenoiserFn:
    """The denoiser, always called with `rows` rows, the first repeated: a static shape, and answers
    that do not depend on how many rows there are.
    """

    def run(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        missing = rows - len(x)
        assert missing >= 0, (len(x), rows)
        if not missing:
            return denoiser(x, sigma, label)

        def fill(v: Tensor) -> Any:
            return torch.cat([v, v[:1].expand(missing, *v.shape[1:])])

        return denoiser(fill(x), fill(sigma), fill(label))[: len(x)]

    return run
