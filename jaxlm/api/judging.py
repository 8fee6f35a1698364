"""People's own judgement of models: `judge`."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from jaxlm.api.places import Say, workdir_of


def judge(
    answers: dict[str, str],
    workdir: str | Path,
    *,
    seed: int = 0,
    port: int = 0,
    say: Say = print,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Serves a page that shows two models' answers at a time, blind, and keeps each vote in
    `workdir`; until Ctrl-C, or `stop` is set. Returns `Judgement.result`.

    `answers`: model → file of its answers (`jaxlm evaluate --out`). Raises UserError.
    """
    from jaxlm.report.judge_page import server
    from jaxlm.tasks import judging

    shown = judging.pairs(answers, seed)
    with workdir_of(workdir) as (folder, _):
        judgement = judging.Judgement(folder, shown)
        with server(judgement, port) as serving:
            thread = threading.Thread(target=serving.serve_forever, daemon=True)
            thread.start()
            host, at = serving.server_address[:2]
            say(f"http://{host!s}:{at}/ shows {len(shown)} pairs; Ctrl-C ends, votes are kept")
            try:
                (stop or threading.Event()).wait()
            except KeyboardInterrupt:
                pass
            finally:
                serving.shutdown()
        return judgement.result()
