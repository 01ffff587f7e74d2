"""Every soft-prompt method of the literature: a parameterisation composed with an injection.

`kinds` is the table of what only training sees (an MLP, an LSTM, a low-rank product, ...), and `parameterisations`
evaluates it into what a model sees. `published` names the methods, with their papers and defaults, as values that start
a new prompt:

    >>> method = PrefixTuning(length=20, reparameterisation=MLP(bottleneck_size=512))
    >>> method.parameters(geometry)  # how many numbers are trained
    >>> prompt = method.initialise(geometry, seed=0)

Importing this needs no deep-learning framework, evaluating does.
"""

from softbridge.methods.kinds import KINDS, MLP_TENSORS, activation
from softbridge.methods.method import Method, Paper, TaskHead
from softbridge.methods.parameterisations import evaluate, tasks_of, trained
from softbridge.methods.parameterisations import float32_parameterisation as float32_parameterisation
from softbridge.methods.parameterisations import materialise as materialise
from softbridge.methods.parameterisations import materialise_tasks as materialise_tasks
from softbridge.methods.parameterisations import materialise_vectors as materialise_vectors
from softbridge.methods.parameterisations import rematerialise as rematerialise
from softbridge.methods.published import (
    METHODS,
    MLP,
    Cartridge,
    ContextAwarePromptTuning,
    MultitaskPromptTuning,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
)

__all__ = [
    "KINDS",
    "METHODS",
    "MLP",
    "MLP_TENSORS",
    "Cartridge",
    "ContextAwarePromptTuning",
    "Method",
    "MultitaskPromptTuning",
    "PTuning",
    "PTuningV2",
    "Paper",
    "PrefixTuning",
    "PromptTuning",
    "TaskHead",
    "activation",
    "evaluate",
    "materialise",
    "materialise_tasks",
    "materialise_vectors",
    "rematerialise",
    "tasks_of",
    "trained",
]
