"""vLLM: soft prompts by name in an unmodified server. A format, a connector that vLLM loads, a client, and a server.

`format` says what can be served, `placeholders` how a request names a prompt, `shelf` reads a directory of prompts,
`requests` finds the prompt that a request names, and `heads` what one rank has of it. None of these needs vLLM.
`connector` is imported by vLLM alone, and `client` by whoever makes requests. `server` runs vLLM in this process, so
that a conversion can be judged.
"""

from __future__ import annotations

from collections.abc import Sequence

from softbridge.plugin.hookspecs import Format, hookimpl
from softbridge.plugin.serving import Server
from softbridge_vllm.format import FORMAT
from softbridge_vllm.server import SERVER


@hookimpl
def softbridge_formats() -> Sequence[Format]:
    """Return the format ``vllm``."""
    return [FORMAT]


@hookimpl
def softbridge_servers() -> Sequence[Server]:
    """Return the server ``vllm``."""
    return [SERVER]
