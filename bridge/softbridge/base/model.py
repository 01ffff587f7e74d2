"""A base model as far as a conversion needs it: its configuration, and models built from that.

Nothing here loads weights unless asked to, and remote code is never trusted on the user's behalf.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from softbridge import untrusted
from softbridge.arrays import Array
from softbridge.base.build import (
    HEADED,
    SMALL_FEED_FORWARD,
    SMALL_VOCABULARY,
    Task,
    auto_class,
    build,
    classes_of,
    first_line,
    fresh,
    label_count,
    shrink,
    usual_task,
)
from softbridge.base.embedding_scale import measure_scale
from softbridge.base.positions import PositionScheme, probe
from softbridge.errors import BaseModelError, SoftbridgeError
from softbridge.geometry import Geometry, read_geometry, text_part
from softbridge.progress import stage
from softbridge.prompt.soft_prompt import BaseId
from softbridge_compat import embedding_scales, transformers_configs, versions

#: More labels, or layers, of a configuration are not believed: transformers names each, over and over.
MOST_NAMED = 2**16


class BaseModel:
    """A base model: a configuration, a name where there is one, and perhaps a model with weights.

    Attributes:
        config: a transformers configuration. Not to be changed.
        name: what to call it (a path or a hub id), or None.
    """

    def __init__(
        self,
        config: Any,
        name: str | None = None,
        model: Any = None,
        head: Mapping[str, Array] = {},
        *,
        imagined: bool = False,
        kept: dict[Any, Any] | None = None,
    ) -> None:
        self.config = config
        self.name = name
        self._model = model
        self._head = head
        self._imagined = imagined
        self._kept = kept

    @classmethod
    def resolve(cls, base: Any, *, trust_remote_code: bool = False) -> BaseModel:
        """From a `BaseModel`, a transformers model or configuration, a directory, a config.json or a hub id.

        Raises:
            BaseModelError: `base` is none of these, or the installed transformers reads it not at all or in part.
        """
        if isinstance(base, BaseModel):
            return base
        if isinstance(base, (str, Path)):
            with stage(f"reading the base model {base}"):
                return cls(_read_whole(_load_config(str(base), trust_remote_code)), str(base))
        name = getattr(base, "name_or_path", None) or getattr(base, "_name_or_path", None) or None
        if hasattr(base, "config") and hasattr(base, "forward"):
            return cls(_read_whole(base.config), name, base)
        if hasattr(base, "model_type") and hasattr(base, "to_dict"):
            return cls(_read_whole(base), name)
        raise BaseModelError(
            f"a base model was given as {type(base).__name__}",
            "a transformers model or configuration, a directory, a config.json, or a hub id",
            "pass one of these",
        )

    @cached_property
    def geometry(self) -> Geometry:
        return read_geometry(self.config)

    @property
    def id(self) -> BaseId:
        return BaseId(self.name, self.geometry)

    @cached_property
    def positions(self) -> PositionScheme:
        """How the model knows where its tokens stand, measured on a small model of the same structure."""
        with stage("measuring the base model's positions"):
            return probe(self.config)

    @cached_property
    def scale(self) -> float | None:
        """By what the installed transformers multiplies vectors that are given in the place of words.

        None where every release does the same, so that nobody has to know: see `softbridge_compat.embedding_scales`.

        Raises:
            BaseModelError: the factor matters for this model and cannot be measured.
        """
        if text_part(self.config).model_type not in embedding_scales.MOVED:
            return None
        scale = measure_scale(self.config)
        if scale is None:
            raise BaseModelError(
                f"a {self.config.model_type} model that does more to vectors before its first layer than multiply them",
                "one number",
                "run this prompt on the transformers that it was trained on",
            )
        return scale

    def scale_on(self, release: str) -> float | None:
        """What `scale` is on a release of transformers, as in ``4.57``.

        Raises:
            SoftbridgeError: that is no release.
        """
        text = text_part(self.config)
        if text.model_type not in embedding_scales.MOVED:
            return None
        try:
            return embedding_scales.scale_on(text.model_type, text.hidden_size, release)
        except ValueError as error:
            raise SoftbridgeError(str(error), "a version, as in 4.57", "correct --trained-on") from error

    def with_head(self, head: Mapping[str, Array]) -> BaseModel:
        """The same base model under a head like this one: a classifier with as many labels."""
        labels = label_count(head, self.geometry.hidden)
        if labels is None:
            return self
        config = copy.deepcopy(self.config)
        config.num_labels = labels
        return BaseModel(config, self.name, self._model, head, imagined=self._imagined, kept=self._kept)

    def keeping(self) -> BaseModel:
        """A copy that reads its weights once, for many prompts; memory: the model, in each precision that is asked for.

        It stands in for the base model in one process, and is given to no other.
        """
        return BaseModel(self.config, self.name, self._model, self._head, imagined=self._imagined, kept={})

    def imagine(self) -> BaseModel:
        """A copy that answers with random weights, for planning a conversion without loading any."""
        return self if self._imagined else self._imagination

    @property
    def imagined(self) -> bool:
        """Whether the weights are random ones, and the numbers that they give nobody's."""
        return self._imagined

    @cached_property
    def _imagination(self) -> BaseModel:
        return BaseModel(self.config, self.name, head=self._head, imagined=True)

    @cached_property
    def task(self) -> Task:
        """The head that verification puts on the model: one that the prompt's own fits, where it has one.

        Heads of several tasks may have the same names (BERT's classifiers of texts and of tokens): then the class of
        the model decides, or those that its configuration names.
        """
        if not self._head or self.geometry.is_encoder_decoder:
            return usual_task(self.config)
        able = [task for task in HEADED if self.config.model_type in classes_of(task)]
        named = {type(self._model).__name__} if self._model is not None else set(self.config.architectures or ())
        able.sort(key=lambda task: classes_of(task).get(self.config.model_type) not in named)
        return next((task for task in able if self._fits(task)), "causal-lm")

    def _fits(self, task: Task) -> bool:
        """Whether a model of this task has parameters of the names of the head."""
        import torch

        try:
            with torch.device("meta"):
                model = auto_class(task, self.config).from_config(self.small_config(), trust_remote_code=False)
        except Exception:  # models of transformers raise what they like; `build` says what
            return False
        return {name for name, _ in model.named_parameters()} >= self._head.keys()

    def structure(self, dtype: Any, seed: int = 0, window: int | None = None) -> Any:
        """A model with random weights and the same attention geometry, vocabulary and feed-forward width shrunk.

        Equality of two ways to run a prompt is a property of the architecture, so random weights can show it.

        Args:
            dtype: a torch dtype.
            seed: of the weights.
            window: what a longer sliding window is shortened to, so that short texts reach beyond it.
        """
        return build(self.small_config(window), self.task, dtype, seed)

    def small_config(self, window: int | None = None) -> Any:
        """The configuration of `structure`."""
        config = copy.deepcopy(self.config)
        text = text_part(config)
        if window is not None:
            shrink(text, sliding_window=window)
        config._name_or_path = ""  # it is not that model: no toolkit shall look the name up
        shrink(text, vocab_size=SMALL_VOCABULARY)
        shrink(text, intermediate_size=SMALL_FEED_FORWARD, n_inner=SMALL_FEED_FORWARD, d_ff=SMALL_FEED_FORWARD)
        if getattr(text, "n_inner", 0) is None:  # four times the hidden size
            text.n_inner = SMALL_FEED_FORWARD
        shrink(text, encoder_ffn_dim=SMALL_FEED_FORWARD, decoder_ffn_dim=SMALL_FEED_FORWARD)
        for part in _other_parts(config, text):  # what sees images or hears, and no text meets
            shrink(part, num_hidden_layers=1, depth=1, intermediate_size=SMALL_FEED_FORWARD)
        return config

    def bare(self) -> Any:
        """The model of `structure` without any weights, on no device, or None if it cannot be built so.

        It is built once, to be looked at: what is run, or given a prompt, is a model of its own.
        """
        return self._bare

    @cached_property
    def _bare(self) -> Any:
        import torch

        try:
            with torch.device("meta"):
                return auto_class(self.task, self.config).from_config(self.small_config(), trust_remote_code=False)
        except Exception:  # models of transformers raise what they like; `build` says what
            return None

    @cached_property
    def has_embedding_block(self) -> bool:
        """Whether positions, token types and a norm are added by a module of their own, as in most encoders."""
        model = self.bare()
        return model is not None and hasattr(model.base_model, "embeddings")

    def with_config(self, config: Any) -> BaseModel:
        """Another configuration under the same name and head, without weights."""
        return BaseModel(config, self.name, head=self._head)

    def weights(self, dtype: Any, *, lent: bool = False) -> Any:
        """The model itself, with its weights, in `dtype`.

        Args:
            lent: the caller leaves the model as it was, and others may be given the same one.

        Raises:
            BaseModelError: the base model was given as a configuration, or its weights cannot be loaded.
        """
        if self._imagined:
            return self.structure(dtype)
        if self._kept is None:
            return self._read(dtype)
        key = (self.task, getattr(self.config, "num_labels", None), dtype)
        if key not in self._kept:
            self._kept[key] = self._read(dtype)
        return self._kept[key] if lent else fresh(self._kept[key])

    def _read(self, dtype: Any) -> Any:
        import torch

        if self._model is not None:
            return fresh(self._model).to(dtype).eval()
        if self.name is None or self.name.endswith(".json"):
            raise BaseModelError(
                "the base model was given as a configuration only",
                "a model with weights",
                "pass a directory or a model",
            )
        try:
            with stage(f"loading the weights of {self.name}"), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # a head that the checkpoint lacks is drawn anew each time
                model = auto_class(self.task, self.config).from_pretrained(
                    self.name,
                    config=copy.deepcopy(self.config),
                    dtype=dtype,
                    attn_implementation="eager",
                    trust_remote_code=False,  # else transformers asks on the terminal
                )
        except (OSError, ValueError) as error:
            raise BaseModelError(
                f"no weights can be loaded from '{self.name}': {error}",
                "a directory or a hub id with the weights of the base model",
                "leave real weights out: the structure of the model is enough to show that two prompts are the same",
            ) from error
        return model.eval()


def _other_parts(config: Any, text: Any) -> list[Any]:
    """The parts of a composite configuration other than the text model's."""
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return [part for part in parts if part is not None and part is not text and config is not text]


def _read_whole(config: Any) -> Any:
    """The configuration, refused if it says what the installed transformers would not do."""
    ignored = transformers_configs.unread(config, text_part(config))
    if ignored:
        said = ", ".join(f"{key} = {value!r:.100}" for key, value in sorted(ignored.items()))
        raise BaseModelError(
            f"the {config.model_type} configuration says {said}, which the installed transformers does not read: it "
            "would run another model",
            f"a configuration of which transformers {versions()['transformers']} reads all that matters",
            f"install the transformers that wrote it ({transformers_configs.writer(config)}); or give a config.json "
            "that says the same in the words of the installed one",
        )
    return config


def _load_config(base: str, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        path = Path(base).expanduser()
        there = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, ~nobody, a NUL
        raise BaseModelError(
            f"there is no {base!r:.200}: {error!s:.200}", "a path of this machine, or a hub id", "check the spelling"
        ) from error
    if not there and (path.is_absolute() or base[:1] in ".~" or base.endswith(("/", ".json")) or base.count("/") > 1):
        raise BaseModelError(
            f"there is no '{base}'", "a directory with config.json, a config.json, or a hub id", "check the spelling"
        )
    _check_counts(path / "config.json" if path.is_dir() else path)
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    except Exception as error:  # configuration classes raise what they like
        raise BaseModelError(
            f"'{base}' cannot be read as a base model: {first_line(error)}",
            "a directory with config.json, a config.json, or a hub id that this machine can reach",
            "check the spelling; download the model's config.json and pass its path",
        ) from error
    foreign = sorted(_downloads(config))
    if foreign and not trust_remote_code:
        raise BaseModelError(
            f"the configuration of '{base}' asks for {', '.join(foreign)}, which transformers would download and run",
            "the name of an implementation that transformers brings",
            "take it out of config.json; or load the model yourself, if you trust its author, and pass the model",
        )
    return config


def _check_counts(path: Path) -> None:
    """Refuse a configuration of so many labels that transformers, which names each, would take gigabytes."""
    if not path.is_file():
        return
    try:
        said = untrusted.Files(path).json(path.name)
    except SoftbridgeError:  # transformers says it in its own words
        return
    for name in ("num_labels", "id2label", "num_hidden_layers", "num_layers", "n_layer"):
        count = said.get(name)
        count = len(count) if isinstance(count, dict) else count
        if isinstance(count, int) and count > MOST_NAMED:
            said_so = str(count) if count < 10**20 else f"a number of {len(str(count))} digits"
            raise BaseModelError(
                f"'{path}' says {name} = {said_so}",
                f"at most {MOST_NAMED}",
                "check the base model's config.json",
            )


def _downloads(config: Any) -> Iterator[str]:
    """Kernels of the hub, as ``owner/name``, that a configuration or a part of it wants its attention to be."""
    for name, value in vars(config).items():
        if "_implementation" in name:
            asked = value.values() if isinstance(value, dict) else [value]
            yield from (repr(one)[:80] for one in asked if isinstance(one, str) and "/" in one)
        elif hasattr(value, "model_type") and hasattr(value, "to_dict"):
            yield from _downloads(value)
