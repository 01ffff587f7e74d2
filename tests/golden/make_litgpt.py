"""Make `litgpt_<release>.safetensors`: a LLaMA-Adapter that litgpt saved, and what the release itself computed with it.

    pip install --no-deps --target OLD/0.5.4 litgpt==0.5.4
    PYTHONPATH=OLD/0.5.4 python tests/golden/make_litgpt.py

in an environment with torch, transformers 5.24, PyYAML and typing_extensions. So were made 0.5.4 and 0.5.13. The
modules of the model, its adapter and its configuration are the release's own, unmodified. What they import only to
download or convert checkpoints (litgpt itself, which needs Lightning) is stood in for.

Tensors: ``lit_model.pth.adapter``, the bytes (uint8) of what `litgpt finetune_adapter` saves (a dictionary ``model`` of
what its own `adapter_filter` lets through, by torch.save); ``base.<name>``, the weights of a Llama under transformers'
names, float32 to be used in float64; ``input_ids`` [B, T]; ``logits`` [B, T, V] in float64; ``plain``, those without
the adapter. Metadata ``config``: transformers' configuration, JSON; ``versions``.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

HERE = Path(__file__).parent
SIZES: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
LENGTH, START = 3, 1


def stand_ins() -> None:
    """What the model's modules import, and do not use here."""
    folder = next(Path(entry) / "litgpt" for entry in sys.path if (Path(entry) / "litgpt" / "adapter.py").is_file())
    for name in ("litgpt", "litgpt.scripts"):
        package = types.ModuleType(name)
        package.__path__ = [str(folder / name.removeprefix("litgpt").removeprefix(".").replace(".", "/"))]
        sys.modules[name] = package
    unused = {"litgpt.utils": "find_multiple", "litgpt.scripts.convert_hf_checkpoint": "qkv_reassemble"}
    for name, function in unused.items():
        module: Any = types.ModuleType(name)
        setattr(module, function, None)
        sys.modules[name] = module


def translated(state: dict[str, torch.Tensor], *, interleaved: bool) -> dict[str, torch.Tensor]:
    """The weights under litgpt's names: up to 0.5.4 the fused projection has each group's rows together."""
    found = {
        "transformer.wte.weight": state["model.embed_tokens.weight"],
        "transformer.ln_f.weight": state["model.norm.weight"],
        "lm_head.weight": state["lm_head.weight"],
    }
    groups, size = SIZES["num_key_value_heads"], SIZES["hidden_size"] // SIZES["num_attention_heads"]
    for layer in range(SIZES["num_hidden_layers"]):
        theirs, ours = f"model.layers.{layer}.", f"transformer.h.{layer}."
        parts = [state[f"{theirs}self_attn.{name}_proj.weight"] for name in "qkv"]
        if interleaved:
            fused = torch.cat([part.view(groups, -1, size, part.shape[-1]) for part in parts], dim=1).flatten(0, 2)
        else:
            fused = torch.cat(parts)
        found[f"{ours}attn.{'attn' if interleaved else 'qkv'}.weight"] = fused
        names = {
            "norm_1": "input_layernorm",
            "norm_2": "post_attention_layernorm",
            "attn.proj": "self_attn.o_proj",
            "mlp.fc_1": "mlp.gate_proj",
            "mlp.fc_2": "mlp.up_proj",
            "mlp.proj": "mlp.down_proj",
        }
        found |= {f"{ours}{one}.weight": state[f"{theirs}{other}.weight"] for one, other in names.items()}
    return found


def main() -> None:
    release = importlib.metadata.version("litgpt")
    stand_ins()
    from litgpt import adapter

    config = transformers.LlamaConfig(**SIZES, initializer_range=0.4)
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config).double().eval()
    torch.set_default_dtype(torch.float64)
    model = adapter.GPT(
        adapter.Config(
            block_size=32,
            padded_vocab_size=24,
            n_layer=3,
            n_head=4,
            n_embd=16,
            n_query_groups=2,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            norm_eps=1e-5,
            mlp_class_name="LLaMAMLP",
            intermediate_size=24,
            adapter_prompt_length=LENGTH,
            adapter_start_layer=START,
        )
    ).eval()
    interleaved = hasattr(model.transformer.h[0].attn, "attn")
    missing, unexpected = model.load_state_dict(translated(base.state_dict(), interleaved=interleaved), strict=False)
    assert not unexpected
    assert all(adapter.adapter_filter(name, None) for name in missing), missing
    ids = torch.randint(3, 24, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain, expected = model(ids), base(ids).logits  # the gates are nothing yet
        assert (plain - expected).abs().max() < 1e-5 * expected.abs().max()
        generator = torch.Generator().manual_seed(2)
        for name, parameter in model.named_parameters():
            if adapter.adapter_filter(name, parameter):
                parameter.copy_(torch.randn(parameter.shape, generator=generator).float())
        for block in model.transformer.h:
            block.attn.adapter_kv_cache = None
        logits = model(ids)
    saved = {name: p.detach().float() for name, p in model.named_parameters() if adapter.adapter_filter(name, p)}
    stream = io.BytesIO()
    torch.save({"model": saved}, stream)
    tensors = {
        "lit_model.pth.adapter": torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8),
        "input_ids": ids,
        "logits": logits,
        "plain": plain,
        **{f"base.{name}": tensor.float() for name, tensor in base.state_dict().items()},
    }
    versions = {"litgpt": release, "torch": torch.__version__, "transformers": transformers.__version__}
    metadata = {"config": json.dumps(config.to_dict()), "versions": json.dumps(versions)}
    save_file(tensors, HERE / f"litgpt_{release}.safetensors", metadata)


if __name__ == "__main__":
    main()
