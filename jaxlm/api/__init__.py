"""The Python and notebook face: `jaxlm.train(config)`, `jaxlm.sweep(sweep)`, `jaxlm.fit(source)`.

The command line calls the same functions; what they do can be told from the folders they leave.
"""

from __future__ import annotations

from jaxlm.api.evaluation import evaluate, lm_eval
from jaxlm.api.judging import judge
from jaxlm.api.laws import compare, coordcheck, fit, fit_laws, plot_fit, plot_laws
from jaxlm.api.plans import plan
from jaxlm.api.runs import banner, lint, report, summary, sweep, sweep_share, train
from jaxlm.api.serving import chat, serve
from jaxlm.api.tuning import finetune
from jaxlm.api.weights import export, from_pretrained, generate, inspect

__all__ = [
    "banner",
    "chat",
    "compare",
    "coordcheck",
    "evaluate",
    "export",
    "finetune",
    "fit",
    "fit_laws",
    "from_pretrained",
    "generate",
    "inspect",
    "judge",
    "lint",
    "lm_eval",
    "plan",
    "plot_fit",
    "plot_laws",
    "report",
    "serve",
    "summary",
    "sweep",
    "sweep_share",
    "train",
]
