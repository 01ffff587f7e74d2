"""Make `mlx_<release>.safetensors`: a prompt cache that mlx-lm saved.

    pip install --no-deps --target OLD/0.31.3 mlx-lm==0.31.3
    PYTHONPATH=OLD/0.31.3 python tests/golden/make_mlx.py 0.31.3

in an environment with mlx 0.32.4, mlx-lm 0.32.2 and transformers 5.24. So were made 0.31.3 and, without a PYTHONPATH,
0.32.2. The two layouts differ; see `softbridge_mlx.prompt_cache`.

Three layers, the second with a window of 8. All have seen five tokens at once and one more, so that space which mlx-lm
allocated ahead lies behind them. The numbers are those of `numbers`, in float16.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

WINDOW, LAYERS, SHAPE = 8, 3, (2, 6, 4)


def numbers() -> np.ndarray:
    """[L, 2, K, P, D]: keys before values."""
    return np.random.default_rng(0).normal(size=(LAYERS, 2, *SHAPE)).astype(np.float16)


def main(release: str) -> None:
    import mlx.core as mx
    import mlx_lm
    from mlx_lm.models.cache import KVCache, RotatingKVCache, save_prompt_cache

    assert mlx_lm.__version__ == release, mlx_lm.__version__
    caches = [KVCache(), RotatingKVCache(max_size=WINDOW), KVCache()]
    for cache, (keys, values) in zip(caches, numbers(), strict=True):
        for rows in (slice(0, 5), slice(5, 6)):
            cache.update_and_fetch(mx.array(keys[None, :, rows]), mx.array(values[None, :, rows]))
    path = Path(__file__).with_name(f"mlx_{release}.safetensors")
    save_prompt_cache(str(path), caches, {"model": "a/base", "tokenizer_config": "{}"})


if __name__ == "__main__":
    main(sys.argv[1])
