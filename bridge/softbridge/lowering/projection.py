"""The pass that sends what an adaption prompt gives through the output projection by itself, or with the rest."""

from __future__ import annotations

from dataclasses import replace

from softbridge.base.model import BaseModel
from softbridge.lowering.steps import Option, Step, Target, with_part
from softbridge.prompt.soft_prompt import SoftPrompt


def project_apart(prompt: SoftPrompt, target: Target) -> list[Option]:
    """W(a + b) + bias and (W a + bias) + (W b + bias) are the same where there is no bias."""
    able, steps = target.capabilities.adaption, []
    for part in prompt.adaptions:
        other = "module" if part.joins == "heads" else "heads"
        if not able or part.joins in able or part.joins == "output" or other not in able:
            continue
        if _unbiased(target.need_base(f"what its output projection does to the prompt's sum in '{target.name}'")):
            prompt = with_part(prompt, part, replace(part, joins=other))
            how = "by itself" if other == "module" else "with the rest"
            note = f"the prompt's sum goes through the output projection {how}, which has no bias: the same sum"
            steps.append(Step("projection", "exact", note))
    return [Option(prompt, tuple(steps))]


def _unbiased(base: BaseModel) -> bool:
    """Whether the layers have no bias at all, which is more than is needed, and needs no name of a projection."""
    bare = base.bare()
    return bare is not None and not any(name.endswith(".bias") for name, _ in bare.named_parameters())
