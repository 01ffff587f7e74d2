"""Does a server serve the prompt? It answers texts itself, and is held to what transformers answers.

A server computes in its own precision, with kernels and layouts of its own: no absolute bound is right for all of them.
Its own noise is the yardstick: how far it is from transformers with the base model alone, measured in the same run. A
prompt may make every rounding count for more, whoever computes it: how much more, transformers itself shows, in float32
with it and without. A prompt is served if the server with it is no further than that noise, times that and a stated
factor, from transformers with it; and if the comparison would have noticed a missing prompt, and a wrong one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from softbridge import untrusted
from softbridge.base.model import BaseModel
from softbridge.errors import EngineError, LoweringError
from softbridge.geometry import Geometry, read_geometry
from softbridge.lowering.planner import lower
from softbridge.lowering.steps import Target
from softbridge.plugin.hookspecs import Engine, Format, Servable
from softbridge.plugin.optional import able
from softbridge.plugin.registry import servers
from softbridge.plugin.serving import Answer, Request, Server
from softbridge.prompt.container import digest_of
from softbridge.prompt.soft_prompt import SoftPrompt
from softbridge.verification.certificate import Fault
from softbridge.verification.faults import faulty_prompts
from softbridge.verification.probes import LENGTHS
from softbridge.verification.run import attached, choose_engine, threads

SCHEMA = "softbridge/serving/1"
#: How many tokens are picked for a text.
TOKENS = 6
#: With a prompt, a server may be this many times further from transformers than without.
FACTOR = 4.0
#: A fault is noticed if it moves the answers this many times further than the bound allows.
NOTICED = 10.0
#: The name under which the prompt itself is served.
_RIGHT = "prompt"


@dataclass(frozen=True)
class Serving:
    """What a server made of a prompt's files. Distances are the largest of log-probabilities, at any step of any text.

    Steps count as long as both sides have picked the same tokens before.

    Attributes:
        server: its name.
        version: what ran, and in which dtype.
        base: name of the base model, or None.
        weights: with which weights it was served.
        digest: of the prompt (see `digest_of`).
        seed: of the texts, and of random weights.
        noise: the server with the base model alone from transformers, in float64, on the same texts.
        strain: how much more the prompt makes rounding count: transformers in float32 from itself in float64, with the
            prompt, over the same without it; at least 1.
        bound: `FACTOR` times noise and strain, or the rounding of float32 where that is less.
        alone: the server with the prompt from transformers, text by text.
        batch: the same in one batch with bare texts, and with other prompts.
        bare: of these bare texts from transformers without a prompt.
        effect: how far the prompt moves the answers in transformers.
        faults: prompts that are similar and wrong, served from files like the right one, from the right answers.
        untried: fault -> why no file of this format holds it.
    """

    server: str
    version: str
    base: str | None
    weights: str
    digest: str
    seed: int
    noise: float
    strain: float
    bound: float
    alone: float
    batch: float
    bare: float
    effect: float
    faults: tuple[Fault, ...]
    untried: Mapping[str, str]

    @property
    def verdict(self) -> Literal["served", "different", "insensitive"]:
        tried = bool(self.faults) and all(fault.noticed for fault in self.faults)
        if not (self.effect > NOTICED * self.bound and tried):
            return "insensitive"
        near = max(self.alone, self.batch) <= self.bound and self.bare <= self.bound / self.strain
        return "served" if near else "different"

    def summary(self) -> str:
        """One line."""
        return (
            f"{self.verdict} by {self.server} ({self.version}): difference {max(self.alone, self.batch):.1e}, its own "
            f"noise {self.noise:.1e} (bound {self.bound:.1e}), prompt's effect {self.effect:.1e}"
        )

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "verdict": self.verdict, **asdict(self)}


def server_of(form: Format) -> Server | None:
    """The server that reads the files of a format, whether or not it can be used here; None: there is none."""
    servable = able(form, Servable)
    return None if servable is None else servers().get(servable.server)


def judge(
    form: Format,
    prompt: SoftPrompt,
    base: BaseModel,
    *,
    weights: bool = False,
    seed: int = 0,
    engine: str = "",
    encoding: str | None = None,
) -> Serving:
    """Let the server of a format answer with what is written of a prompt, and compare with transformers.

    Args:
        form: a format with a server that can be used here.
        prompt: as it was lowered for the format.
        base: the base model, a decoder alone.
        weights: whether its own weights are served, or random ones of its structure.
        seed: of texts and random weights.
        engine: that runs the prompt in transformers; empty: the first that can.
        encoding: of the files, one of the format's `encodings`; None: the first.

    Raises:
        EngineError: the server cannot be used here, does not serve this base model, or does not start.
    """
    import torch

    server = server_of(form)
    reason = f"no server reads files of '{form.name}'" if server is None else server.unavailable()
    if server is None or reason is not None:
        raise EngineError(f"no server can judge this: {reason}", "a server in this environment", "install its extra")
    with tempfile.TemporaryDirectory() as folder, threads(None if weights else 1):
        scratch = Path(folder)
        model = base.weights(torch.float32) if weights else base.structure(torch.float32, seed)
        found = server.obstacles(model.config)
        if found:
            reasons, remedies = (
                "; ".join(dict.fromkeys(texts)) for texts in zip(*((o.reason, o.remedy) for o in found), strict=True)
            )
            raise EngineError(reasons, f"a base model that {server.name} serves", remedies)
        model.save_pretrained(scratch / "base")
        runner, _ = choose_engine(prompt, engine, model)
        texts = _texts(model.config, seed)
        # A server has one cache, of one dtype, and a fault that rotates keys computes in a wider one.
        dtypes = {array.dtype.name for part in prompt.parts for _, array in part.arrays()}
        target = Target(form.name, form.capabilities, base, dtypes.pop() if len(dtypes) == 1 else None)
        # What whoever wants the right prompt has accepted of the format is accepted of the wrong ones.
        accepted = {o.name for o in form.obstacles(prompt, base.geometry) if o.acceptable}
        prompts = {_RIGHT: prompt}
        untried = {}
        for name, wrong in faulty_prompts(prompt, base.positions):
            if wrong is not None:
                try:
                    prompts[name] = lower(wrong, target, accepted, form.obstacles).prompt
                except LoweringError as error:
                    untried[name] = "; ".join(obstacle.reason for obstacle in error.obstacles)
        # The model that is served may have fewer words than the base.
        geometry = read_geometry(model.config)
        folders = {name: scratch / str(n) for n, name in enumerate(prompts)}
        paths = {name: _written(form, one, geometry, folders[name], encoding) for name, one in prompts.items()}
        (scratch / "server").mkdir()
        with server.open(scratch / "base", paths, scratch / "server") as ask:
            bare = [ask([Request(text)], TOKENS)[0] for text in texts]
            alone = [ask([Request(text, _RIGHT)], TOKENS)[0] for text in texts]
            mixed = [Request(texts[0], _RIGHT), *(Request(text) for text in texts), Request(texts[-1], _RIGHT)]
            mixed += [Request(texts[0], name) for name in prompts if name != _RIGHT]
            together = ask(mixed, TOKENS)
        rounded = [answered(model, text) for text in texts], [_prompted(runner, model, prompt, text) for text in texts]
        model = model.double()
        plain = [answered(model, text) for text in texts]
        right = [_prompted(runner, model, prompt, text) for text in texts]
    noise = _furthest(bare, plain)
    without, with_it = _furthest(rounded[0], plain), _furthest(rounded[1], right)
    strain = max(1.0, with_it / without) if without else 1.0
    scale = max(float(np.abs(answer.log_probabilities).max()) for answer in plain)
    bound = max(FACTOR * noise * strain, float(np.finfo(np.float32).eps) * scale)
    count = len(texts)
    moved = {name: _apart(one, right[0]) for name, one in zip([*prompts][1:], together[count + 2 :], strict=True)}
    return Serving(
        server=server.name,
        version=server.version(),
        base=base.name,
        weights="the model's own" if weights else f"random, seed {seed}",
        digest=digest_of(prompt),
        seed=seed,
        noise=noise,
        strain=strain,
        bound=bound,
        alone=_furthest(alone, right),
        batch=_furthest([together[0], together[count + 1]], [right[0], right[-1]]),
        bare=_furthest(together[1 : count + 1], plain),
        effect=_furthest(plain, right),
        faults=tuple(Fault(name, far, not far <= NOTICED * bound) for name, far in moved.items()),
        untried=untried,
    )


def _texts(config: Any, seed: int) -> list[tuple[int, ...]]:
    special = {getattr(config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    ordinary = [token for token in range(config.vocab_size) if token not in special]
    generator = np.random.default_rng(seed)
    return [tuple(generator.choice(ordinary, length).tolist()) for length in LENGTHS]


def _written(form: Format, prompt: SoftPrompt, geometry: Geometry, folder: Path, encoding: str | None) -> Path:
    """What is written of a prompt for a base model: the one file, if it is one, or its directory."""
    content = form.write(replace(prompt, base=replace(prompt.base, geometry=geometry)), geometry, encoding)
    untrusted.write(folder, content)
    return folder / next(iter(content)) if len(content) == 1 else folder


def _prompted(engine: Engine, model: Any, prompt: SoftPrompt, text: Sequence[int]) -> Answer:
    with attached(engine, model, prompt) as running:
        return answered(running, text)


def answered(model: Any, text: Sequence[int]) -> Answer:
    """What transformers answers, by the whole text through the forward for each token."""
    import torch

    ids, steps = torch.tensor([text]), []
    with torch.no_grad():
        for _ in range(TOKENS):
            logits = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
            steps.append(logits.double().log_softmax(-1).numpy())
            ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
    return Answer(ids[0, -TOKENS:].numpy(), np.stack(steps))


def _furthest(ours: Sequence[Answer], theirs: Sequence[Answer]) -> float:
    return float(np.max([_apart(one, other) for one, other in zip(ours, theirs, strict=True)]))


def _apart(one: Answer, other: Answer) -> float:
    """The largest difference of log-probabilities, up to the first step at which another token is picked."""
    same = np.asarray(one.tokens) == np.asarray(other.tokens)
    steps = len(same) if same.all() else int(np.argmin(same)) + 1
    ours, theirs = (np.asarray(answer.log_probabilities, np.float64)[:steps] for answer in (one, other))
    return float(np.abs(ours - theirs).max())
