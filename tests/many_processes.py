"""What each process of `test_many_processes.py` does: trains a prompt under DDP and FSDP2, runs one under a tensor
parallel plan, and leaves what came of it in a folder. Alone (one process, no launcher) it is the reference."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import softbridge as sb
from softbridge.errors import EngineError
from softbridge.methods import MLP, PrefixTuning, PromptTuning, PTuningV2
from softbridge.testing import tiny_model

STEPS, GLOBAL_BATCH, TOKENS, RATE = 4, 4, 7, 0.05


def texts() -> torch.Tensor:
    """[B, T] of one length, so that every process counts the same number of labels."""
    return torch.randint(3, 90, (STEPS * GLOBAL_BATCH, TOKENS), generator=torch.Generator().manual_seed(1))


def attached() -> Any:
    return sb.attach(tiny_model("llama"), PrefixTuning(4, MLP(8)), seed=0).double()


def with_trainer(folder: Path) -> dict[str, Any]:
    """DDP, if there is more than one process."""
    settings: dict[str, Any] = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
    each = GLOBAL_BATCH // int(os.environ.get("WORLD_SIZE", "1"))
    arguments = TrainingArguments(
        str(folder), max_steps=STEPS, save_steps=STEPS, learning_rate=RATE, per_device_train_batch_size=each, **settings
    )
    model = attached()
    data: Any = [{"input_ids": row, "labels": row} for row in texts()]
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    trainer.save_model(str(folder))
    return {"wrapped": type(trainer.model_wrapped).__name__}


def with_shards(folder: Path) -> dict[str, Any]:
    """FSDP2, as accelerate has it: each layer and then the model, and one whole state that is gathered for saving."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    model = attached()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for batch in texts().split(GLOBAL_BATCH):
        optimizer.zero_grad()
        model(batch[rank::world], labels=batch[rank::world]).loss.backward()
        optimizer.step()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    model.save_pretrained(folder, state_dict=state, is_main_process=rank == 0)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    sharded = sum(type(parameter).__name__ == "DTensor" for parameter in model.parameters())
    return {"sharded": sharded, "accelerate": str(Accelerator(cpu=True, fsdp_plugin=plugin).distributed_type)}


def whole(folder: Path) -> None:
    """The reference of `with_shards`, in one process."""
    model = attached()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for batch in texts().split(GLOBAL_BATCH):
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)


def with_a_plan(folder: Path) -> dict[str, Any]:
    """A tensor parallel plan: an input prompt is the same function, a prefix is refused."""
    base = folder / "base"
    if dist.get_rank() == 0:
        tiny_model("llama", torch.float32).save_pretrained(base)
    dist.barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 5 would have it in a configuration of its own
        parallel = AutoModelForCausalLM.from_pretrained(base, tp_plan="auto", attn_implementation="eager")
    alone = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    text = texts()[:1]
    bare = alone(text).logits
    wanted, found = (sb.attach(model, PromptTuning(4), seed=0)(text).logits for model in (alone, parallel))
    far = [float((logits - wanted).abs().max() / wanted.abs().max()) for logits in (found, bare)]
    try:
        sb.attach(sb.detach(parallel), PTuningV2(4), seed=0)
    except EngineError as error:
        return {"distance": far[0], "effect": far[1], "refused": str(error)}
    return {"distance": far[0], "effect": far[1], "refused": ""}


def main(folder: Path) -> None:
    told = with_trainer(folder / "trainer") | with_shards(folder / "shards") | with_a_plan(folder)
    if dist.get_rank() == 0:
        (folder / "told.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
