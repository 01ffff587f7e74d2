"""How a request names its prompt: by P token ids in front of its text, which say which prompt stands there.

An API of vLLM takes token ids, and whatever else a request carries differs between its APIs and its releases. vLLM's
own prefix cache keys blocks on token ids alone. So the ids name the *content* of a prompt: its digest. A client that
has an old copy of a prompt meets a refusal, and not its new numbers.

The P ids are: a marker, which no text begins with; the leading 128 bits of the digest, in digits of the vocabulary's
size, as many as there is room for; and markers up to P. A short prompt has room for few: of one virtual token the
marker is all there is, and of two (with 32,000 words) one old copy in 32,000 goes unnoticed. Within one server no two
prompts have the same ids, which `softbridge_vllm.shelf` checks.
"""

from __future__ import annotations

from softbridge.errors import SoftbridgeError

#: How much of a digest is told.
BITS = 128


def placeholders(digest: str, length: int, vocabulary: int, marker: int) -> tuple[int, ...]:
    """The token ids [P] in the place of a prompt.

    Args:
        digest: of the prompt, hexadecimal; see `softbridge.prompt.container.digest_of`.
        length: P.
        vocabulary: how many token ids there are.
        marker: the first of them. The text of a request without a prompt must not begin with it.

    Raises:
        SoftbridgeError: there is no such marker.
    """
    check_marker(marker, vocabulary)
    if vocabulary < 2:
        raise SoftbridgeError(f"a vocabulary of {vocabulary}", "two token ids or more", "check the base model")
    left, digits = int(digest, 16) >> (4 * len(digest) - BITS), []
    for _ in range(min(length - 1, _digits(vocabulary))):
        left, digit = divmod(left, vocabulary)
        digits.append(digit)
    return (marker, *digits, *[marker] * (length - 1 - len(digits)))


def check_marker(marker: int, vocabulary: int) -> None:
    """Raises `SoftbridgeError` if the marker is no token id."""
    if not 0 <= marker < vocabulary:
        raise SoftbridgeError(
            f"the marker {marker}", f"a token id from 0 to {vocabulary - 1}", "choose one that no text begins with"
        )


def _digits(vocabulary: int) -> int:
    """How many digits hold `BITS` bits."""
    count, reach = 0, 1
    while reach < 1 << BITS:
        count, reach = count + 1, reach * vocabulary
    return count
