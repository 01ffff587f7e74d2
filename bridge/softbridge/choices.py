"""The names that a caller may choose from, apart from all that they name: the command line lists them in its help.

Whoever asks for one of these loads nothing else.
"""

from __future__ import annotations

from typing import Literal, get_args

from softbridge.geometry import Site, Stack

#: Dtypes that numbers can be stored in on request.
DTYPES: tuple[str, ...] = ("float64", "float32", "float16", "bfloat16")
#: The working precisions, which are reported beside float64.
WORKING: tuple[str, ...] = tuple(name for name in DTYPES if name != "float64")

#: How alike two sides are, the strictest first. bitwise: not one bit differed here, in float64 and in the working
#: precision; on another processor, which sums products of other shapes in another order, the same may be exact.
#: exact: within the stated bound in float64. rounding: another function in float64, but in the working precision no
#: probe's outputs are further apart than the noise floor, and without the prompt they are; the generated tokens are the
#: same.
Level = Literal["bitwise", "exact", "rounding"]
LEVELS: tuple[Level, ...] = ("bitwise", "exact", "rounding")

#: Condition that a caller can accept -> its cost: 2 if every later call of the model must honour it, else 1.
CONDITIONS = {
    "positions": 2,
    "template": 2,
    "window": 1,
    "length": 1,
    "head": 1,
    "dtype": 1,
    "underflow": 1,
    "task": 1,
    "partial": 1,
    "scale": 1,
}

#: What can be left out on reading -> what that means.
DROPPED = {
    "training": "what trained the prompt; it runs, and its training cannot be resumed",
    "manifest": "softbridge.json; real tokens stand where the toolkit itself has them",
}

#: What a part can be called (see `softbridge.parts.name_of`).
PARTS: tuple[str, ...] = (
    *get_args(Site),
    *(f"{stack}-input" for stack in get_args(Stack)),
    "self-adaption",
    "encoder-adaption",
)

#: How the vectors of two prompts are compared.
Measure = Literal["average", "pairwise"]
