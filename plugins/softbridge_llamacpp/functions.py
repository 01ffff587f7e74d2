"""llama.cpp's C functions (include/llama.h), through ctypes: from llama-cpp-python, or from xllamacpp's extension.

llama-cpp-python is built on the machine and brings functions and structures that fit each other. xllamacpp is built
already, with llama.cpp inside its extension module and the functions exported, but without a description of the
structures. They are described here as build 11549 has them, with room behind, and what the library itself says are
their defaults shows whether it has them so.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from softbridge.errors import EngineError

#: Module -> distribution, the first one that is there is used.
PACKAGES = {"xllamacpp": "xllamacpp", "llama_cpp": "llama-cpp-python"}

_INT, _BYTE, _WORD, _FLOAT, _POINTER = ctypes.c_int32, ctypes.c_bool, ctypes.c_uint32, ctypes.c_float, ctypes.c_void_p
#: Bytes behind a structure, so that a library whose own is longer writes into none but its own.
_ROOM = ("room", ctypes.c_char * 256)


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", _INT),
        ("token", ctypes.POINTER(_INT)),
        ("embd", ctypes.POINTER(_FLOAT)),
        ("pos", ctypes.POINTER(_INT)),
        ("n_seq_id", ctypes.POINTER(_INT)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(_INT))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


class _ModelParameters(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("devices", "tensor_buft_overrides")),
        *((name, _INT) for name in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")),
        *((name, _POINTER) for name in ("tensor_split", "progress_callback", "progress_data", "kv_overrides")),
        *((name, _BYTE) for name in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc")),
        _ROOM,
    ]


class _ContextParameters(ctypes.Structure):
    _fields_ = [
        *((name, _WORD) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, _WORD) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, _INT) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type", "pooling_type")),
        *((name, _INT) for name in ("attention_type", "flash_attn_type")),
        *((name, _FLOAT) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor")),
        *((name, _FLOAT) for name in ("yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", _WORD),
        ("defrag_thold", _FLOAT),
        *((name, _POINTER) for name in ("cb_eval", "cb_eval_user_data")),
        *((name, _INT) for name in ("type_k", "type_v")),
        ("moe_cache_size", ctypes.c_size_t),
        *((name, _POINTER) for name in ("abort_callback", "abort_callback_data")),
        *((name, _BYTE) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")),
        _ROOM,
    ]


#: What `llama_model_default_params` and `llama_context_default_params` return in build 11549.
_DEFAULTS: dict[type[ctypes.Structure], dict[str, Any]] = {
    _ModelParameters: {
        "n_gpu_layers": -1,
        "split_mode": 1,
        "main_gpu": 0,
        "vocab_only": False,
        "use_extra_bufts": True,
    },
    _ContextParameters: {
        "n_ctx": 512,
        "n_batch": 2048,
        "n_ubatch": 512,
        "n_seq_max": 1,
        "n_threads": 4,
        "n_threads_batch": 4,
        "flash_attn_type": -1,
        "rope_freq_base": 0.0,
        "yarn_ext_factor": -1.0,
        "yarn_beta_slow": -1.0,
        "defrag_thold": -1.0,
        "type_k": 1,
        "type_v": 1,
        "embeddings": False,
        "offload_kqv": True,
        "no_perf": True,
        "op_offload": True,
        "swa_full": True,
        "kv_unified": False,
    },
}

_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_SIZE, _TEXT = ctypes.c_size_t, ctypes.c_char_p
_TOKENS = ctypes.POINTER(_INT)
#: Function -> what it returns, and takes.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "llama_backend_init": (None,),
    "llama_log_set": (None, _LOG, _POINTER),
    "llama_model_default_params": (_ModelParameters,),
    "llama_context_default_params": (_ContextParameters,),
    "llama_model_load_from_file": (_POINTER, _TEXT, _ModelParameters),
    "llama_model_free": (None, _POINTER),
    "llama_model_get_vocab": (_POINTER, _POINTER),
    "llama_vocab_n_tokens": (_INT, _POINTER),
    "llama_init_from_model": (_POINTER, _POINTER, _ContextParameters),
    "llama_free": (None, _POINTER),
    "llama_get_memory": (_POINTER, _POINTER),
    "llama_memory_seq_pos_min": (_INT, _POINTER, _INT),
    "llama_memory_seq_pos_max": (_INT, _POINTER, _INT),
    "llama_batch_init": (_Batch, _INT, _INT, _INT),
    "llama_batch_free": (None, _Batch),
    "llama_decode": (_INT, _POINTER, _Batch),
    "llama_get_logits_ith": (ctypes.POINTER(_FLOAT), _POINTER, _INT),
    "llama_state_seq_save_file": (_SIZE, _POINTER, _TEXT, _INT, _TOKENS, _SIZE),
    "llama_state_seq_load_file": (_SIZE, _POINTER, _TEXT, _INT, _TOKENS, _SIZE, ctypes.POINTER(_SIZE)),
}


def module() -> str | None:
    """The one of `PACKAGES` that is installed, or None. Imports nothing."""
    return next((name for name in PACKAGES if importlib.util.find_spec(name) is not None), None)


def functions() -> Any:
    """Every function of `_SIGNATURES` as an attribute; and ``llama_log_callback``, the type of a callback.

    Raises:
        EngineError: no library can be loaded, or it is of a build whose structures are not known here.
    """
    name = module()
    try:
        if name == "llama_cpp":
            return _of_llama_cpp_python()
        if name == "xllamacpp":
            return _of_xllamacpp()
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        raise EngineError(
            f"llama.cpp's functions in {name}: {error}",
            "a library for this system that exports them",
            "install another",
        ) from error
    raise EngineError("no llama.cpp", f"one of {', '.join(PACKAGES.values())}", "install one of them")


def _of_llama_cpp_python() -> Any:
    import llama_cpp

    return llama_cpp


def _of_xllamacpp() -> Any:
    spec = importlib.util.find_spec("xllamacpp")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    paths = [path for folder in folders for path in sorted(Path(folder).glob("xllamacpp*.*")) if path.suffix != ".py"]
    if len(paths) != 1:
        raise OSError(f"{len(paths)} extension modules")
    library = ctypes.CDLL(str(paths[0]))
    made = SimpleNamespace(llama_log_callback=_LOG)
    for name, (returned, *taken) in _SIGNATURES.items():
        function: Callable[..., Any] = getattr(library, name)
        function.restype, function.argtypes = returned, taken  # type: ignore[attr-defined]
        setattr(made, name, function)
    for found in (made.llama_model_default_params(), made.llama_context_default_params()):
        wrong = {
            name: getattr(found, name) for name, told in _DEFAULTS[type(found)].items() if getattr(found, name) != told
        }
        if wrong:
            raise EngineError(
                f"another build of llama.cpp in xllamacpp, whose defaults read as {wrong}",
                "structures as build 11549 has them",
                "install xllamacpp 2026.10.11549, or llama-cpp-python",
            )
    return made
