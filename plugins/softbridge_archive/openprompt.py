"""thunlp/OpenPrompt (Ding et al. 2022, arXiv 2111.01998): its four templates that are trained.

A runner's checkpoint (`trainer.py`) is the state of the whole model: template, base model, verbaliser; others save the
template's. `SoftTemplate` puts vectors in front of the embedded input. `PrefixTuningTemplate` gives GPT-2 a past, and
T5's self-attention one in each layer, with tokens and biases counted from P on. `MixedTemplate` and `PtuningTemplate`
put vectors in the place of a text's soft tokens. No file has that text, so that whoever reads one says where they
stand: by ``template.json`` beside it, or by the placement. A `SoftVerbalizer` on a decoder is what a classifier's
``score`` is, but for `SoftTemplate`, with which it looks at a token P before the answer.
"""

from __future__ import annotations

from functools import partial
from typing import get_args

from softbridge import untrusted
from softbridge.errors import CheckpointError, few
from softbridge.geometry import Geometry, Site, Stack, stack_of
from softbridge.prompt import BaseId, InputPrompt, Origin, Part, Placement, Positions, SoftPrompt
from softbridge_archive import building, contents, frame
from softbridge_archive import openprompt_answers as answers
from softbridge_archive import openprompt_templates as templates

WHAT = "a template of OpenPrompt"
CONFIG = "config.yaml"
OPEN = f"the base model's weights, of which no {CONFIG} beside them says that they were frozen"


def sniff(files: untrusted.Files) -> bool:
    """See `Format.sniff`."""
    return templates.stems_of(contents.names(files)) is not None


def read(files: untrusted.Files, geometry: Geometry | None, placement: Placement = "template") -> SoftPrompt:
    """See `Format.read`."""
    geometry = building.geometry_of(files, geometry, WHAT)
    run = next((files.yaml(name) for name in files.names if name.rpartition("/")[2] == CONFIG), {})
    found = contents.weights(files)
    stems = templates.stems_of(found)
    if stems is None:
        raise CheckpointError(f"{files.path} holds {few(found)}", WHAT, "save the template's state dictionary")
    own, scores = stems.below(found, *stems[1:]), stems.below(found, "verbalizer.")
    classes = answers.classes_of(scores)
    training = templates.training_of(own, answers.told(run, "prefix_tuning_template", "prefix_dropout"))
    stack: Stack = "decoder" if geometry.encoder is None else "encoder"
    if training is not None and training.kind == "mlp":
        sites = [site for site in get_args(Site) if any(name.startswith(f"{site}.") for name in training.tensors)]
        prefixes = [building.made_prefix(training, site, geometry) for site in sites]
        parts: list[Part] = [*prefixes]
        positions = Positions({stack_of(part.site): part.length for part in prefixes})
    elif templates.SOFT in own:
        parts = [InputPrompt(contents.matrix(own[templates.SOFT]), stack)]
        positions = Positions({stack: parts[0].length})
    else:
        vectors = building.made_vectors(training) if training else contents.matrix(own[templates.MIXED], first=1)
        if placement == "template":
            told = building.template_beside(files, f"{WHAT}, whose text is in no file")
            part, positions = building.infilled(vectors, stack, answers.explained(told, classes))
        else:
            part, positions = InputPrompt(vectors, stack, placement=placement), Positions({stack: len(vectors)})
        parts = [part]
    head, left = answers.head_of(scores, stack == "decoder" and templates.SOFT not in own)
    taken = {"".join(stems) + name for name in own if templates.is_of_prompt(name)}
    taken |= {f"{stems.whole}verbalizer.{name}" for name in scores if head or classes}
    others = [name for name in found if name not in taken]
    frozen = answers.told(run, "plm", "optimize", "freeze_para") is True
    opened = OPEN if stems.below(found, stems.model, "plm.") and not frozen else ""
    name = answers.told(run, "plm", "model_path")
    base = BaseId(name if isinstance(name, str) else None, geometry)
    words = {"label_words": [list(words) for _, words in classes.classes]} if classes else {}
    origin = Origin("openprompt", words, notes=contents.unread(others), partial="; ".join(filter(None, (opened, left))))
    return SoftPrompt(tuple(parts), positions, base, head, training, origin)


def _format(placement: Placement) -> frame.ArchiveFormat:
    stated = placement != "template"
    where = f"; those whose soft tokens all stand {placement.replace('-', ' ')}" if stated else ""
    return frame.ArchiveFormat(
        name=f"openprompt:{placement}" if stated else "openprompt",
        summary=f"thunlp/OpenPrompt: what its templates trained{where}",
        files=("*.ckpt", "*.pt", "*.bin", CONFIG, building.TEMPLATE),
        recognise=(lambda files: False) if stated else sniff,
        reader=partial(read, placement=placement),
        reads="`MixedTemplate` and `PtuningTemplate`, if that is where their soft tokens stand" if stated else READS,
        proven="vectors among word embeddings by hand, on GPT-2 and BERT" if stated else PROVEN,
    )


READS = (
    "`SoftTemplate`, `PrefixTuningTemplate`, `MixedTemplate`, `PtuningTemplate`, of a runner, a model or a template; "
    "label words, a decoder's `SoftVerbalizer`"
)
PROVEN = "logits and scores of OpenPrompt 1.0.1 itself, on GPT-2, BERT and T5"
#: Nothing in a file says which of the three it is.
FORMAT, BEFORE, AFTER = _format("template"), _format("before-sequence"), _format("after-first-token")
