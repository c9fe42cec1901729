"""One self-contained HTML file: a page of static text, a style, a module of code and the data that it shows."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from pathlib import Path
from typing import Any

from cutdiff.output.images import write_atomically

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{}'"
"""The things that a browser lets the page do: run its one script, which is named by its hash, and no network."""


def save_page(path: Path, title: str, module: Path, data: Any) -> None:
    """Write a page whole, or leave `path` as it was.

    module: the Python module beside which the page's .html (what stands in the body), .css and .js (an ES module) lie.
    data: a JSON value that the script finds as the text of the element "data", in which a number that is not finite is
        its name in JavaScript, such as "NaN".
    """
    body, style, script = (module.with_suffix(end).read_text(encoding="utf-8") for end in (".html", ".css", ".js"))
    text = _page(title, body, style, script, json.dumps(_finite(data), allow_nan=False).replace("<", "\\u003c"))
    write_atomically(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def _page(title: str, body: str, style: str, script: str, data: str) -> str:
    code = f"\n{script}"
    policy = POLICY.format(base64.b64encode(hashlib.sha256(code.encode()).digest()).decode())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>
{style}</style>
</head>
<body>
{body}<script id="data" type="application/json">{data}</script>
<script type="module">{code}</script>
</body>
</html>
"""


def _finite(value: Any) -> Any:
    """A JSON value with the names of numbers that JSON does not have in their place."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
