"""Files of toolkits that are no longer developed: read, and written where something still reads them. One module each.

`frame` is what they share. `FORMATS` is the table; `plugins/README.md` has it in words, which a test generates.
"""

from __future__ import annotations

from collections.abc import Sequence

from softbridge.plugin.hookspecs import Format, hookimpl
from softbridge_archive import (
    a1111,
    attempt,
    cartridges,
    chatglm,
    google,
    koboldai,
    litgpt,
    mkultra,
    nemo,
    opendelta,
    openprompt,
    prefixtuning,
    prompt_transferability,
    ptuning,
    ptuning_fewshot,
    ptuning_v2,
    sdxl,
    tensor,
    tensorrt_llm,
    textual_inversion,
    tgis,
)
from softbridge_archive.frame import ArchiveFormat

#: Those of each module, in alphabetical order. What only a name can choose stands behind what is recognised.
FORMATS: Sequence[ArchiveFormat] = (
    a1111.FORMAT,
    attempt.FORMAT,
    cartridges.FORMAT,
    chatglm.FORMAT,
    google.FORMAT,
    google.AFTER,
    koboldai.FORMAT,
    litgpt.FORMAT,
    mkultra.FORMAT,
    nemo.FORMAT,
    opendelta.FORMAT,
    openprompt.FORMAT,
    openprompt.BEFORE,
    openprompt.AFTER,
    prefixtuning.FORMAT,
    prompt_transferability.FORMAT,
    prompt_transferability.SECOND,
    ptuning.FORMAT,
    ptuning_fewshot.FORMAT,
    ptuning_v2.FORMAT,
    sdxl.FORMAT,
    tensor.FORMAT,
    tensor.FRONT,
    tensor.AFTER,
    tensorrt_llm.FORMAT,
    textual_inversion.FORMAT,
    tgis.FORMAT,
)


@hookimpl
def softbridge_formats() -> Sequence[Format]:
    """The formats of this plugin."""
    return FORMATS


def catalogue() -> str:
    """The table of these formats, in Markdown."""
    rows = [f"| `{form.name}` | {form.reads} | {form.writes} | {form.proven} |" for form in FORMATS]
    return "\n".join(["| format | read | written | how it was proven |", "|---|---|---|---|", *rows]) + "\n"
