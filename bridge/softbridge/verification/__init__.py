"""Whether two prompts compute the same function, with the evidence."""

from __future__ import annotations

from softbridge.verification.bench import Subject
from softbridge.verification.certificate import Certificate, Fault, Figure, Layer, Side
from softbridge.verification.claim import Claim, Level
from softbridge.verification.proof import compare, probe, verify, verify_claim, verify_prompts
from softbridge.verification.recorded import Recording

__all__ = [
    "Certificate",
    "Claim",
    "Fault",
    "Figure",
    "Layer",
    "Level",
    "Recording",
    "Side",
    "Subject",
    "compare",
    "probe",
    "verify",
    "verify_claim",
    "verify_prompts",
]
