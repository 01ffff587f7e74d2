"""What a base model makes of vectors before its first layer: how a prompt moves behind it, and what multiplies it."""

from __future__ import annotations

import copy
from typing import Any

from softbridge.base.build import build, shrink, usual_task
from softbridge.geometry import text_part


def measure_scale(config: Any) -> float | None:
    """By what a model multiplies vectors that are given in the place of words, before its first layer.

    Read off a model of one small layer: whatever it adds to them (positions, token types) drops out of the difference
    of two inputs. None: not by one number, as where a norm or a projection lies between.

    Args:
        config: of a model with a decoder and no encoder, or of an encoder.

    Raises:
        BaseModelError: no model can be built from the configuration.
    """
    import torch

    config = copy.deepcopy(text_part(config))
    task = usual_task(config)
    if vars(config).get("layer_types"):
        config.layer_types = config.layer_types[:1]
    shrink(config, vocab_size=64, intermediate_size=32, n_inner=32, d_ff=32, num_hidden_layers=1)
    model = build(config, task, torch.float64, seed=0)
    width = model.get_input_embeddings().embedding_dim
    rows = torch.randn((1, 3, width), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def entering(vectors: Any) -> Any:
        return model(inputs_embeds=vectors, output_hidden_states=True).hidden_states[0]

    with torch.no_grad():
        one, none, other = (entering(vectors) for vectors in (torch.ones_like(rows), torch.zeros_like(rows), rows))
    if one.shape != rows.shape:
        return None
    scale = float((one - none)[0, 0, 0])
    return scale if torch.allclose(other - none, scale * rows, rtol=1e-9, atol=1e-9) else None
