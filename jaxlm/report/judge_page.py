"""The page on which people judge answers, and the server that it talks to, on this machine only.

No answer, prompt or name is ever HTML: the page puts them in as text, and its policy allows no
script but its own.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from jaxlm.schema import UserError
from jaxlm.tasks.judging import Judgement

HOST = "127.0.0.1"
MAX_BYTES = 4096  # of a vote

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Which answer is better?</title>
<style>
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { margin: 1.5rem auto; max-width: 70rem; padding: 0 1rem }
h1 { font-size: 1.2rem } h2 { font-size: 1rem; margin: 0 }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0 0 }
#prompt { border-left: .25rem solid GrayText; padding-left: .75rem }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; margin: 1rem 0 }
.pair section { border: 1px solid GrayText; border-radius: .4rem; padding: .75rem }
@media (max-width: 40rem) { .pair { grid-template-columns: 1fr } }
kbd { border: 1px solid GrayText; border-radius: .2rem; padding: 0 .3rem }
table { border-collapse: collapse } td, th { padding: .2rem .8rem; text-align: right }
td:first-child, th:first-child { text-align: left }
[hidden] { display: none }
</style>
<main>
<h1>Which answer is better?</h1>
<p id="progress" role="status" aria-live="polite"></p>
<div id="judging" hidden>
<div id="prompt" class="text"></div>
<div class="pair">
<section aria-labelledby="l"><h2 id="l">Left</h2><div id="left" class="text"></div></section>
<section aria-labelledby="r"><h2 id="r">Right</h2><div id="right" class="text"></div></section>
</div>
<p>Keys: <kbd>←</kbd> left, <kbd>→</kbd> right, <kbd>↓</kbd> no difference,
<kbd>Backspace</kbd> the one before again.</p>
</div>
<div id="done" hidden><table><thead><tr><th>model<th>strength<th>95 %<th>wins</tr></thead>
<tbody></tbody></table></div>
</main>
<script nonce="NONCE">
const token = "TOKEN", $ = id => document.getElementById(id);
const keys = {ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie"};
let pair = null, before = [], busy = false;
async function ask(path, body) {
  const how = body ? {method: "POST", headers: {"X-Token": token}, body: JSON.stringify(body)} : {};
  const answer = await fetch(path, how);
  if (!answer.ok) throw new Error(await answer.text());
  return answer.json();
}
function show(state) {
  pair = state.pair;
  $("progress").textContent = `${state.votes} of ${state.pairs} judged`;
  $("judging").hidden = pair === null; $("done").hidden = pair !== null;
  if (pair !== null) {
    for (const name of ["prompt", "left", "right"]) $(name).textContent = pair[name];
    return;
  }
  const rows = state.models.map(m => {
    const band = m.ci95 ? m.ci95.map(x => x.toFixed(2)).join(" … ") : "–";
    const row = document.createElement("tr");
    for (const text of [m.model, m.strength.toFixed(2), band, m.wins]) {
      const cell = document.createElement("td"); cell.textContent = text; row.append(cell);
    }
    return row;
  });
  document.querySelector("tbody").replaceChildren(...rows);
}
addEventListener("keydown", async event => {
  if (busy || event.ctrlKey || event.metaKey || event.altKey) return;
  const vote = keys[event.key], back = event.key === "Backspace" && before.length > 0;
  if (!(vote && pair) && !back) return;
  event.preventDefault(); busy = true;
  try {
    if (back) { show(await ask("/pair/" + before.pop())); }
    else { before.push(pair.number); show(await ask("/vote", {pair: pair.number, vote})); }
  } catch (error) { $("progress").textContent = "not saved: " + error.message; }
  busy = false;
});
ask("/next").then(show);
</script>
</html>
"""


def server(judgement: Judgement, port: int = 0) -> ThreadingHTTPServer:
    """A server on 127.0.0.1, not yet serving; `server_address` has its port."""
    token = secrets.token_urlsafe(16)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            number = self.path.removeprefix("/pair/")
            if not self._is_ours():
                self._send(403, b"forbidden")
            elif self.path == "/":
                nonce = secrets.token_urlsafe(16)
                page = _PAGE.replace("NONCE", nonce).replace("TOKEN", token)
                self._send(200, page.encode(), "text/html; charset=utf-8", nonce)
            elif self.path == "/next":
                self._state()
            elif number.isdigit() and int(number) < len(judgement.pairs):
                self._state(int(number))
            else:
                self._send(404, b"not found")

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            allowed = secrets.compare_digest(self.headers.get("X-Token", ""), token)
            if not (self._is_ours() and allowed and self.path == "/vote"):
                self._send(403, b"forbidden")
            elif not length.isdigit() or int(length) > MAX_BYTES:
                self._send(413, b"too large")
            else:
                try:
                    said = json.loads(self.rfile.read(int(length)))
                    judgement.vote(said["pair"], said["vote"])
                except (ValueError, KeyError, TypeError, UserError):
                    self._send(400, b"expected a pair and a vote")
                else:
                    self._state()

        def _is_ours(self) -> bool:
            """Asked for under this machine's own name: no page elsewhere resolves to it."""
            name = self.headers.get("Host", "").rpartition(":")[0]
            return name in (HOST, "localhost")

        def _state(self, number: int | None = None) -> None:
            pair = judgement.next() if number is None else judgement.pairs[number]
            found: dict[str, Any] = judgement.result(resamples=0 if pair else 1000)
            shown = dataclasses.asdict(pair) if pair else None
            if shown:
                del shown["models"], found["models"]  # blind
            self._send(200, json.dumps({**found, "pair": shown}).encode(), "application/json")

        def _send(self, code: int, body: bytes, kind: str = "text/plain", nonce: str = "") -> None:
            self.send_response(code)
            policy = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'"
            if nonce:
                policy += (
                    f"; connect-src 'self'; style-src 'unsafe-inline'; script-src 'nonce-{nonce}'"
                )
            for name, value in (
                ("Content-Type", kind), ("Content-Length", str(len(body))),
                ("Content-Security-Policy", policy), ("X-Content-Type-Options", "nosniff"),
                ("Cache-Control", "no-store"),
            ):  # fmt: skip
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    return ThreadingHTTPServer((HOST, port), Handler)
