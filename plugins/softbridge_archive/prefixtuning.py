"""XiangLi1999/PrefixTuning (Li & Liang 2021, arXiv 2101.00190): prefixes of GPT-2 and of BART, with what trained them.

A folder of `save_pretrained`: the base model's configuration, with the prefix's settings in it, and the prefix. GPT-2
(`gpt2/train_control.py`): ``wte`` [P, H] and an MLP ``control_trans``, with tanh between two linear layers, or three
(`deep_param`). Without an MLP (`init_shallow`) ``control_trans`` is its result, [P·2·L·K·D]; or, where it began as the
keys and values of words, what the cache of the time held: [2·L, 1, K, P, D]. BART (`seq2seq/prefixTuning.py`): an
embedding and an MLP for each of three sites. GPT-2 takes the prefix as its past: real tokens stand at P, P + 1, ...
BART takes it within attention, and its tokens stand where they would without it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from softbridge import untrusted
from softbridge.errors import BaseModelError, CheckpointError
from softbridge.geometry import Geometry, Site, stack_of
from softbridge.methods import KINDS
from softbridge.prompt import Array, BaseId, KeyValuePrefix, Origin, Positions, SoftPrompt, Training
from softbridge_archive import building, contents, frame

#: Site -> the names of its embedding and of its MLP.
NETWORKS: Mapping[Site, tuple[str, str]] = {
    "self": ("wte", "control_trans"),
    "cross": ("wte2", "control_trans2"),
    "encoder": ("wte_enc", "control_trans_enc"),
}
FLAT = "control_trans"
SETTINGS = ("_my_arg_tune_mode", "_my_arg_task_mode", "preseqlen", "mid_dim", "format_mode", "lowdata", "init_shallow")


def sniff(files: untrusted.Files) -> bool:
    """OpenPrompt's template of such a network has ``input_tokens`` besides; others have names in front."""
    found = contents.names(files)
    return (FLAT in found or f"{FLAT}.0.weight" in found) and "input_tokens" not in found


def read(files: untrusted.Files, geometry: Geometry | None) -> SoftPrompt:
    """See `Format.read`."""
    geometry = building.geometry_of(files, geometry, "prefixes of XiangLi1999/PrefixTuning")
    facts = files.json("config.json") if "config.json" in files else {}
    found = contents.weights(files)
    sites = [site for site, (_, mlp) in NETWORKS.items() if any(name.split(".")[0] == mlp for name in found)]
    layers = 3 if f"{FLAT}.4.weight" in found else 2
    last, why = found.get(f"{FLAT}.{2 * layers - 2}.weight"), ""
    if facts.get("use_infix") or ("wte2.weight" in found and "cross" not in sites):
        why = "an infix: keys and values between source and target, where no prefix stands"
    elif last is not None and last.shape[:1] == (geometry.hidden,):
        why = "vectors that the base model itself turns into keys and values (PrefixEmbTuning)"
    if why:
        raise CheckpointError(why, "keys and values in front of the text", "train it anew as a prefix")
    if not sites:
        raise CheckpointError(f"{files.path}: no tensors of a prefix", "those of a prefix", "check that it is complete")
    if set(sites) != {site for site in NETWORKS if geometry.site(site) is not None}:
        raise BaseModelError(f"prefixes at sites {', '.join(sites)}", f"those of {geometry.model_type}", "check --base")
    ours = [name for name in found if name.split(".")[0] in {stem for site in sites for stem in NETWORKS[site]}]
    if FLAT in found:
        training, parts = None, [_shallow(found[FLAT].array(), facts.get("preseqlen"), geometry)]
    else:
        names = dict(pair for site in sites for pair in _names(site, layers))  # others keep theirs, and are unexpected
        settings = {"non_linearity": "tanh", "layers": layers, "dropout": facts.get("prefix_dropout") or 0.0}
        training = Training("mlp", settings, {names.get(name, name): found[name].array() for name in ours})
        parts = [building.made_prefix(training, site, geometry) for site in sites]
    start = {stack_of(p.site): 0 if geometry.is_encoder_decoder else p.length for p in parts if p.site != "cross"}
    mode, notes = facts.get("_my_arg_tune_mode") or "prefixtune", contents.unread(found.keys() - set(ours))
    partial = "" if mode == "prefixtune" else f"the base model was trained, too ({mode!r:.40}): load that one"
    origin = Origin("prefixtuning", contents.plain(facts, SETTINGS), notes=notes, partial=partial)
    return SoftPrompt(tuple(parts), Positions(start), BaseId(None, geometry), training=training, origin=origin)


def _names(site: Site, layers: int) -> Iterator[tuple[str, str]]:
    """Their names of a site's tensors, and ours."""
    embedding, mlp = NETWORKS[site]
    theirs = [f"{mlp}.{2 * layer}.{name}" for layer in range(layers) for name in ("weight", "bias")]
    ours = KINDS["mlp"].tensors({"layers": layers})  # in the same order
    return zip([f"{embedding}.weight", *theirs], (f"{site}.{name}" for name in ours), strict=True)


def _shallow(numbers: Array, length: object, geometry: Geometry) -> KeyValuePrefix:
    shape, layers = geometry.site("self"), geometry.attending("self")
    assert shape is not None  # it attends
    row, found = (2 * len(layers), shape.kv_heads, shape.head_dim), f"{FLAT} {list(numbers.shape)} of {numbers.dtype}"
    if numbers.ndim == 5 and numbers.shape[1] == 1:
        numbers = numbers[:, 0].transpose(2, 0, 1, 3)
    elif numbers.ndim == 1 and numbers.size % math.prod(row) == 0 and length in (None, numbers.size // math.prod(row)):
        numbers = numbers.reshape(-1, *row)
    if numbers.shape[1:] != row or not numbers.size or numbers.dtype.kind in "iub":
        expected = f"keys and values [{length!r:.40} · {' · '.join(map(str, row))}], or those of words"
        raise CheckpointError(found, expected, "check the file, and --base")
    return KeyValuePrefix.from_flat("self", numbers, layers, shape.kv_heads, shape.head_dim)


FORMAT = frame.ArchiveFormat(
    name="prefixtuning",
    summary="XiangLi1999/PrefixTuning: prefixes of GPT-2 and BART, with the MLP that trained them",
    files=("config.json", "pytorch_model.bin"),
    recognise=sniff,
    reader=read,
    reads="GPT-2: MLP of two or three layers, flat, from words; BART: three sites; the MLP is kept for training",
    proven="GPT-2: a cache seeded by hand; BART: keys and values put in front by hand within attention, and AdapterHub",
)
