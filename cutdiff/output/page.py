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


def json_text(value: Any, *, names: bool = False) -> str:
    """A value as JSON that may stand in a page: no text inside can end a script, and a number that is not finite is
    null, or with `names` its name in JavaScript, such as "NaN"."""
    return json.dumps(finite(value, names=names), allow_nan=False).replace("<", "\\u003c")


def finite(value: Any, *, names: bool = False) -> Any:
    """A JSON value with None, or with `names` their names in JavaScript, for the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(part, names=names) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part, names=names) for part in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if not names else "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def save_page(path: Path, title: str, module: Path, data: Any) -> None:
    """Write a page whole, or leave `path` as it was.

    module: the Python module beside which the page's .html (what stands in the body), .css and .js (an ES module) lie.
    data: a JSON value that the script finds as the text of the element "data", in which a number that is not finite is
        its name in JavaScript, such as "NaN".
    """
    body, style, script = (module.with_suffix(end).read_text(encoding="utf-8") for end in (".html", ".css", ".js"))
    text = _page(title, body, style, script, json_text(data, names=True))
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
