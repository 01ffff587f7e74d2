"""What a base model's configuration says, and the installed transformers does not read.

A configuration class keeps every key of a config.json as an attribute, read or not: a Llama that transformers 5 saved
has its rotary frequencies in ``rope_parameters``, and transformers 4 silently runs it with the default ones.
Whether a class reads a key is asked of the class. What keys that some release does not read say is known here: all by
which the defaults of transformers 4.57's and 5.23's classes of text models differ, and an output depends on. Keys that
no release reads are many in published files, and mean nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

#: A key's value, and the configuration that has it and does not read it.
Agrees = Callable[[Any, Any], bool]


def _rope(said: Any, config: Any) -> bool:
    """Transformers 5 has in one place what 4 has as rope_theta, partial_rotary_factor and rope_scaling."""
    if not isinstance(said, Mapping) or any(isinstance(value, Mapping) for value in said.values()):
        return not said  # several kinds of layers, for which each older class has names of its own
    rest = dict(said)
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in rest and rest.pop(name) != getattr(config, name, None):
            return False
    scaling = dict(getattr(config, "rope_scaling", None) or {})
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    return rest.pop("rope_type", "default") == kind and rest.items() <= scaling.items()


def _is(*values: Any) -> Agrees:
    return lambda said, config: said in values


#: Key -> whether it says what a class that does not read it does by itself.
AGREES: Mapping[str, Agrees] = {
    "rope_parameters": _rope,
    # Transformers 4 scales the states before a T5's head where that is tied; 5 says it apart.
    "scale_decoder_outputs": lambda said, config: said == getattr(config, "tie_word_embeddings", True),
    "use_bidirectional_attention": _is(None, False),
    "swiglu_alpha": _is(1.702),
    "swiglu_limit": _is(7.0),
    "time_step_limit": lambda said, config: said is None or tuple(said) == (0.0, float("inf")),
    # Transformers 5 has no relative positions in BERT and its kin, and prunes nothing.
    "position_embedding_type": _is(None, "absolute"),
    "pruned_heads": lambda said, config: not said,
}


def unread(*parts: Any) -> dict[str, Any]:
    """Key -> value of what a configuration says and the installed transformers would not do. Empty if all is well.

    Args:
        parts: a transformers configuration as it was read, and those in it that are to be looked at.
    """
    return {
        key: vars(part)[key]
        for part in parts
        for key, agrees in AGREES.items()
        if key in vars(part) and key not in _read(part.__class__) and not agrees(vars(part)[key], part)
    }


def writer(config: Any) -> str:
    """The transformers that wrote a configuration, in words."""
    stated = getattr(config, "transformers_version", None)
    return f"transformers {stated}" if isinstance(stated, str) else "not the installed one"


@cache
def _read(kind: Any) -> frozenset[str]:
    """The keys that a configuration class knows: what an instance without any has, and what it translates."""
    own: tuple[str, ...]
    try:
        own = tuple(vars(kind()))
    except Exception:  # one that needs arguments
        own = tuple(inspect.signature(kind).parameters)
    return frozenset((*own, *dir(kind), *getattr(kind, "attribute_map", ())))
