"""What is concluded from two captures: the verdict, and whether deliberate faults were noticed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from softbridge.errors import SoftbridgeError
from softbridge.verification.bench import Capture, how_far
from softbridge.verification.certificate import Fault, Figure, Layer
from softbridge.verification.claim import Claim
from softbridge.verification.layers import differences
from softbridge.verification.probes import GREEDY, REVERSED

#: Relative to the largest logit. Float64 rounding of other summation orders stays below it on any depth we measured.
BOUND = 1e-12

#: Across a float32 region of the model itself, or of numbers that the conversion computed and stored in float32.
FLOAT32_BOUND = 1e-5

#: A fault counts as noticed if it moves the outputs this many times further than the bound allows.
NOTICED = 100.0


@dataclass(frozen=True)
class Findings:
    """What one comparison found; see `softbridge.verification.proof.Certificate`."""

    scale: float
    float32_regions: tuple[str, ...]
    bound: float
    noise_floor: float
    unit: float
    longest: int
    figures: tuple[Figure, ...]
    layers: tuple[Layer, ...]
    faults: tuple[Fault, ...]
    untried: Mapping[str, str]
    naive: float | None


def judge(a: Capture, b: Capture, claim: Claim) -> Findings:
    """How far two sides are apart under a claim; the first is the reference.

    Raises:
        SoftbridgeError: the reference puts out nothing but zeros.
    """
    bound = FLOAT32_BOUND if a.float32_regions or b.float32_regions or claim.rounded else BOUND
    scale = max(float(np.abs(logits).max()) for name, logits in a.exact.items() if name != GREEDY)
    if scale == 0:
        raise SoftbridgeError(
            "a reference whose outputs are all 0", "outputs that something could change", "check the base model's head"
        )
    alone = [name for name in a.exact if name.startswith("alone")]
    figures = []
    for group, names in {"alone": alone, **{name: [name] for name in a.exact if name not in alone}}.items():
        if group == GREEDY:
            same, alike = (np.array_equal(x[group], y[group]) for x, y in ((a.exact, b.exact), (a.rough, b.rough)))
            by_hand = [f"{x.engine}, token by token through its forward: {x.stepwise}" for x in (a, b) if x.stepwise]
            figures.append(Figure(group, float(not same), float(not alike), note="; ".join(dict.fromkeys(by_hand))))
            continue
        apart, rough = (how_far(x, names, y, names) / scale for x, y in ((a.exact, b.exact), (a.rough, b.rough)))
        note, broken = _left_padding(a, b, names, alone, scale, bound) if group == "left-padded" else ("", [])
        apart = float(np.max([apart, *broken]))
        figures.append(Figure(group, apart, rough, judged=not note or bool(broken), note=note))
    padded, backwards = ["right-padded"], [REVERSED]
    noise_floor = how_far(a.rough, padded, a.rough, backwards) / scale
    if how_far(a.exact, alone, a.exact, padded) / scale <= bound:
        noise_floor = max(noise_floor, how_far(a.rough, alone, a.rough, padded) / scale)
    return Findings(
        scale=scale,
        float32_regions=tuple(sorted({*a.float32_regions, *b.float32_regions})),
        bound=bound,
        noise_floor=noise_floor,
        unit=a.unit * 2.0 ** math.floor(math.log2(scale)) / scale if 0 < scale < math.inf else a.unit,
        longest=max(a.longest, b.longest),
        figures=(*figures, *_training(a, b, claim)),
        layers=differences(a.states, b.states),
        # What is not a number is noticed.
        faults=tuple(Fault(name, far / scale, not far / scale <= NOTICED * bound) for name, far in b.faults.items()),
        untried=b.untried,
        naive=None if b.naive is None else how_far(b.naive, alone, a.exact, alone) / scale,
    )


def _left_padding(
    a: Capture, b: Capture, names: Sequence[str], alone: Sequence[str], scale: float, bound: float
) -> tuple[str, list[float]]:
    """Why the two sides' left-padded batches are not compared, and how far sides are from their own unpadded texts.

    A toolkit that padding on the left disturbs cannot be matched there. An engine that says that nothing is disturbed
    is then held to its word, unless it minds pads on the right, too (a gate weighs all positions, pads as well): what
    it breaks it by counts.
    """
    variant, broken = [], []
    for side in (a, b):
        own, right = (how_far(side.exact, group, side.exact, alone) / scale for group in (names, ["right-padded"]))
        if own <= bound:
            continue
        if not side.left_pads:
            variant.append(f"{side.engine} is not invariant to left padding by itself ({own:.1e})")
        elif right <= bound:
            variant.append(f"{side.engine} says that it is invariant to left padding, and is not ({own:.1e})")
            broken.append(own)
    return "; ".join(dict.fromkeys(variant)), broken


def _training(a: Capture, b: Capture, claim: Claim) -> list[Figure]:
    """Whether training goes on identically: the loss, and its gradient in the prompt's numbers, in float64 alone."""
    loss = abs(a.loss - b.loss) / (abs(a.loss) or 1.0)
    figures = [Figure("loss", loss, None)]
    together = a.start == b.start or not a.rotated
    ours, theirs = (side.gradient if together else side.rotated for side in (a, b))
    shapes = ({name: array.shape for name, array in side.items()} for side in (ours, theirs))
    if next(shapes) != next(shapes):  # what was moved to another place, or has another length, is not trained alike
        return figures
    note = ""
    if claim.moved:
        note = "a piece of the model lies between the two, and their gradients are not each other's"
    elif a.repeats or b.repeats:
        note = "layers share their numbers, and what a toolkit does with that in training is not compared"
    size = max(float(np.abs(array).max()) for array in ours.values()) or 1.0
    apart = max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours) / size
    return [*figures, Figure("gradient", apart, None, judged=not note, note=note)]
