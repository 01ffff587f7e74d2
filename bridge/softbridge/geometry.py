"""What must be known of a base model before a single weight is read: the shapes of its attention.

The geometry is read from the model's configuration, under the names that transformers' own attribute maps give every
family. It is what a prompt's shapes are checked against, and what a base model of the same structure is built from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from softbridge.errors import BaseModelError

Stack = Literal["encoder", "decoder"]
Site = Literal["encoder", "self", "cross"]


#: Under which names transformers' configurations say, layer by layer, what each is.
_MIXERS = ("layers_block_type", "layer_types")
#: Of their words, those for layers that have no keys and values: they keep a state, or look at one token only. An
#: engine looks at the model itself, so that a layer of which it is not known here is refused there.
_NO_KEYS = frozenset({"linear_attention", "mamba", "recurrent", "conv", "moe", "mlp"})
#: And those for layers that have both, keys and values and a state.
_BOTH = frozenset({"hybrid", "hybrid_sliding"})


def stack_of(site: Site) -> Stack:
    """The stack whose queries attend at this site."""
    return "encoder" if site == "encoder" else "decoder"


@dataclass(frozen=True)
class StackGeometry:
    """Attention of one stack.

    Attributes:
        layers: L.
        heads: query heads.
        kv_heads: K, key/value heads (fewer than `heads` under grouped-query attention).
        head_dim: D, which need not be H / heads.
        window: length of the shortest sliding window, in tokens, or None.
        shapes: (K, D) of every layer where they differ (Gemma 4), else None; `kv_heads` and `head_dim` are then those
            of the first layer.
        sources: of every layer, the one whose keys and values it attends to, where some attend to an earlier layer's
            (Gemma 3n, Gemma 4), else None. A base model knows it, a prompt's file does not record it.
        kinds: what each layer is, in the configuration's words (``full_attention``, ``mamba``, ``conv``, ``moe`` ...),
            or None if it does not say. A base model knows it, as above.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    shapes: tuple[tuple[int, int], ...] | None = None
    sources: tuple[int, ...] | None = field(default=None, compare=False)
    kinds: tuple[str, ...] | None = field(default=None, compare=False)

    @property
    def attending(self) -> tuple[int, ...]:
        """The numbers of the layers that have keys and values, in their order: those that a prefix can join.

        The others of a hybrid model keep a state of a text, or look at one token only. No prefix touches such a state.
        """
        return tuple(n for n in range(self.layers) if self.kinds is None or self.kinds[n] not in _NO_KEYS)

    @property
    def stateful(self) -> bool:
        """Whether some layers keep something else of a text than keys and values, beside them or instead."""
        return any(kind in _NO_KEYS or kind in _BOTH for kind in self.kinds or ())

    def named(self, layer: int) -> str:
        """A layer that has no keys and values, in words: its number, and what it is."""
        return f"layer {layer} ({self.kinds[layer] if self.kinds else 'of no known kind'})"

    def shape(self, layer: int) -> tuple[int, int]:
        """(K, D) of a layer."""
        return (self.kv_heads, self.head_dim) if self.shapes is None else self.shapes[layer]


@dataclass(frozen=True)
class Geometry:
    """The shapes of a base model.

    Attributes:
        model_type: transformers' name of the family.
        hidden: H, the width of the hidden states.
        vocabulary: rows of the word embedding.
        encoder: the encoder's attention, or None in a decoder-only model.
        decoder: the decoder's attention, or None in an encoder-only model.
        embedding: the width of a vector in the input sequence where that is not H (ALBERT, ELECTRA), else None.
    """

    model_type: str
    hidden: int
    vocabulary: int
    encoder: StackGeometry | None = None
    decoder: StackGeometry | None = None
    embedding: int | None = None

    @property
    def input_width(self) -> int:
        """The width of a vector in the input sequence."""
        return self.embedding or self.hidden

    def stack(self, stack: Stack) -> StackGeometry | None:
        return self.encoder if stack == "encoder" else self.decoder

    def site(self, site: Site) -> StackGeometry | None:
        """The attention that a prefix at this site joins, or None if the model does not have this site."""
        if site == "cross" and self.encoder is None:
            return None
        return self.stack(stack_of(site))

    def attending(self, site: Site) -> tuple[int, ...]:
        """The numbers of the layers that a prefix at this site can join.

        Raises:
            BaseModelError: no layer keeps keys and values at this site.
        """
        shape = self.site(site)
        layers = () if shape is None else shape.attending
        if not layers:
            why = (
                "no attention there" if shape is None else f"layers without keys and values only ({shape.named(0)} ...)"
            )
            raise BaseModelError(
                f"a prefix at the site '{site}' of {self.model_type}, which has {why}",
                "layers that attend",
                "use an input prompt",
            )
        return layers

    @property
    def is_encoder_decoder(self) -> bool:
        return self.encoder is not None and self.decoder is not None


#: More layers, or more heads, are not believed of a model: configurations come from files, and each is looked at.
MOST = 2**16


def read_geometry(config: Any) -> Geometry:
    """The geometry of a transformers configuration (a composite one is read through its text part).

    Raises:
        BaseModelError: a number that the geometry needs is missing or is not a positive integer.
    """
    text = text_part(config)
    hidden = _count(text, "hidden_size", "d_model")
    vocabulary = _count(text, "vocab_size")
    if getattr(text, "is_encoder_decoder", False):
        encoder = _stack(text, hidden, prefix="encoder_")
        decoder = _stack(text, hidden, prefix="decoder_")
    elif not _generates(config, text) and _is_encoder(text):
        encoder, decoder = _stack(text, hidden), None
    else:
        encoder, decoder = None, _stack(text, hidden)
    width = _optional_count(text, "embedding_size", "word_embed_proj_dim", "input_embedding_size")
    return Geometry(text.model_type, hidden, vocabulary, encoder, decoder, None if width == hidden else width)


def text_part(config: Any) -> Any:
    """The part of a configuration that is a text model's: itself, if it is not composite.

    Raises:
        BaseModelError: the configuration has several text models.
    """
    get_text_config = getattr(config, "get_text_config", None)
    if getattr(config, "is_encoder_decoder", False) or get_text_config is None:
        return config
    try:
        text = get_text_config()
    except ValueError as error:
        raise BaseModelError(
            f"a {config.model_type} model, which consists of several text models: {str(error).splitlines()[0]:.120}",
            "a model with one text model",
            "pass the text model that the prompt is for",
        ) from error
    if not hasattr(text, "model_type"):
        raise BaseModelError(
            f"a {config.model_type} configuration whose text part is a {type(text).__name__}",
            "a configuration of transformers",
            "check the base model's config.json",
        )
    return text


def _stack(config: Any, hidden: int, prefix: str = "") -> StackGeometry:
    layers_names = (f"{prefix}layers", f"num_{prefix}layers", "num_hidden_layers", "num_layers")
    heads_names = (f"{prefix}attention_heads", "num_attention_heads", "num_heads")
    layers = _count(config, *layers_names)
    heads = _count(config, *heads_names)
    if max(layers, heads) > MOST:
        raise BaseModelError(
            f"{config.model_type}: {layers} layers with {heads} heads",
            f"at most {MOST} of each",
            "check the base model's config.json",
        )
    # Where layers differ, newer configurations refuse to name one number for all of them.
    single = [] if prefix else list(getattr(config, "per_layer_config", None) or ())
    first = single[0] if single else config
    kv_heads = _optional_count(first, "num_key_value_heads", "num_kv_heads") or heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        kv_heads = 1
    head_dim = _optional_count(first, "head_dim", "d_kv", "attention_head_dim")
    hidden = _optional_count(config, "true_hidden_size") or hidden  # MobileBERT attends in a bottleneck
    if head_dim is None:
        if hidden % heads:
            raise BaseModelError(
                f"{config.model_type}: hidden size {hidden} is no multiple of {heads} heads, and no head size is given",
                "a configuration with 'head_dim', or a hidden size that the heads divide",
                "check the base model's config.json",
            )
        head_dim = hidden // heads
    # Whatever bounds how far attention looks back: where a prefix is concerned, the shortest text that shows it.
    bounds = ("sliding_window", "attention_chunk_size", "local_attention", "window_size")
    found = [bound for one in single or [config] if (bound := _optional_count(one, *bounds)) is not None]
    window = min(found, default=None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    shapes = tuple(
        (_optional_count(one, "num_key_value_heads") or kv_heads, _optional_count(one, "head_dim") or head_dim)
        for one in single
    )
    sources = None if prefix else _sources(config, layers)
    kinds = None if prefix else _kinds(config, layers)
    if len(set(shapes)) > 1:
        return StackGeometry(layers, heads, *shapes[0], window, shapes, sources, kinds)
    return StackGeometry(layers, heads, kv_heads, head_dim, window, None, sources, kinds)


def _kinds(config: Any, layers: int) -> tuple[str, ...] | None:
    """What each layer is, as far as the configuration says it."""
    told = (getattr(config, name, None) for name in _MIXERS)
    lists = (tuple(map(str, kinds)) for kinds in told if isinstance(kinds, (list, tuple)))
    return next((kinds for kinds in lists if len(kinds) == layers), None)


def _sources(config: Any, layers: int) -> tuple[int, ...] | None:
    """The last layers may attend to the keys of the last one before them that is of their kind."""
    own = layers - (_optional_count(config, "num_kv_shared_layers") or 0)
    kinds = list(getattr(config, "layer_types", None) or ())
    if own == layers or len(kinds) != layers or not set(kinds[own:]) <= set(kinds[:own]):
        return None
    last = {kind: layer for layer, kind in enumerate(kinds[:own])}
    return (*range(own), *(last[kind] for kind in kinds[own:]))


def _is_encoder(config: Any) -> bool:
    """Whether attention looks both ways. A causal model's class is known to transformers' causal table only.

    Families that stand in both tables (BERT) run as decoders only when their configuration says so.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        MODEL_MAPPING_NAMES,
    )

    if getattr(config, "is_decoder", False):
        return False
    kind = config.model_type
    if str(MODEL_MAPPING_NAMES.get(kind)).endswith("Encoder"):  # a causal class exists, for is_decoder
        return True
    return kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def may_be_causal(model_type: str) -> bool:
    """Whether transformers has a causal language model of this family."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _generates(config: Any, text: Any) -> bool:
    """Whether a configuration of several parts is of a model that goes on with a text, having seen images, say.

    Its text part may be of a kind that no table of transformers knows by itself.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return text is not config and config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def _optional_count(config: Any, *names: str) -> int | None:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _count(config: Any, *names: str) -> int:
    value = _optional_count(config, *names)
    if value is None:
        family = getattr(config, "model_type", type(config).__name__)
        raise BaseModelError(
            f"the configuration of {family} has none of {', '.join(names)}",
            "a positive whole number under one of these names",
            "give --base a transformers configuration (config.json) of a text model",
        )
    return value
