"""The program in a model card: it loads what lies beside the card with one toolkit, and calls it once."""

from __future__ import annotations

from collections.abc import Sequence

from softbridge.base.build import label_count
from softbridge.geometry import Geometry
from softbridge.prompt.soft_prompt import SoftPrompt

#: Task of a head (`softbridge.base.Task`) -> the class of transformers that has it.
CLASSES = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "masked-lm": "AutoModelForMaskedLM",
}


def model_class(prompt: SoftPrompt, geometry: Geometry | None) -> str:
    """The class of transformers that the base model is loaded with: the task's, or the geometry's usual one."""
    if prompt.head:
        return CLASSES.get(prompt.base.task or "", "AutoModelForSequenceClassification")
    if geometry is not None and geometry.is_encoder_decoder:
        return "AutoModelForSeq2SeqLM"
    return "AutoModel" if geometry is not None and geometry.decoder is None else "AutoModelForCausalLM"


def labels_of(prompt: SoftPrompt, geometry: Geometry | None) -> str:
    """The argument of `from_pretrained` that gives the model a head of this size, or nothing."""
    counted = prompt.base.task in (None, "sequence-classification", "token-classification")
    labels = label_count(prompt.head, 0 if geometry is None else geometry.hidden) if counted else None
    return "" if labels is None else f", num_labels={labels}"


def program(
    imports: Sequence[str], model_class: str, base: str, steps: Sequence[str], arguments: Sequence[str] = ()
) -> str:
    """A Python program.

    Args:
        imports: lines, the toolkit's.
        model_class: of transformers.
        base: name of the base model.
        steps: lines that make `model`; `base` is defined.
        arguments: of the call, besides the text's.
    """
    call = ", ".join(("**row", *arguments))
    return "\n".join(
        (
            *imports,
            f"from transformers import {', '.join(sorted((model_class, 'AutoTokenizer')))}",
            "",
            f"base = {base!r}",
            *steps,
            'row = AutoTokenizer.from_pretrained(base)("a text", return_tensors="pt")',
            f"print(model({call})[0])",
        )
    )


def targets(geometry: Geometry | None) -> Sequence[str]:
    """What a call of an encoder-decoder model needs besides the text."""
    return ('labels=row["input_ids"]',) if geometry is not None and geometry.is_encoder_decoder else ()


def own_program(prompt: SoftPrompt, geometry: Geometry | None, path: str, base: str) -> str:
    """The program that loads files of any format with softbridge, and runs them natively."""
    cls = model_class(prompt, geometry)
    steps = (
        f"model = {cls}.from_pretrained(base{labels_of(prompt, geometry)})",
        f"model = sb.attach(model, sb.load({path!r}, base=base))",
    )
    return program(("import softbridge as sb",), cls, base, steps, targets(geometry))
