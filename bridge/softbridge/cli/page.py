"""A certificate as one HTML page."""

from __future__ import annotations

import json
from html import escape

from softbridge.cli.html import Row, document, plot, table_of, text_of
from softbridge.cli.tables import certificate_table
from softbridge.verification.certificate import Certificate

#: Powers of ten at which the axes end.
_ENDS = (-18, 2)


def page(certificate: Certificate) -> str:
    """The page: verdict, tables, the differences by probe and by layer, and the certificate's JSON."""
    *tables, verdict = certificate_table(certificate).renderables
    bounds = [("bound", certificate.bound), ("noise floor", certificate.yardstick)]
    probes: list[Row] = [(figure.probe, (figure.float64, figure.working)) for figure in certificate.figures]
    layers: list[Row] = [(f"{one.stack} {one.layer} {one.part}", (one.apart,)) for one in certificate.layers]
    content = json.dumps(certificate.to_json(), indent=2, sort_keys=True)
    return document(
        f"{certificate.verdict}: {certificate.source.path}, {certificate.target.path}",
        (
            "<h1>softbridge certificate</h1>",
            f'<p class="verdict {"same" if certificate.same else "not"}">{text_of(verdict)}</p>',
            *map(table_of, tables),
            "<h2>Difference by probe</h2>",
            plot(probes, ("float64", certificate.dtype), bounds, _ENDS, 4),
            "<h2>Difference by layer, first text, float64</h2>",
            plot(layers, ("float64",), bounds[:1], _ENDS, 4) if layers else "<p>no layers were found to watch</p>",
            f"<details><summary>certificate.json</summary><pre>{escape(content)}</pre></details>",
        ),
    )
