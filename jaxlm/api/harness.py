"""lm-eval's tasks, answered by a model of ours (extra `eval`).

Importing this registers `jaxlm` with lm-eval: `lm_eval.simple_evaluate(model="jaxlm",
model_args="pretrained=FOLDER", tasks=[…])`, or `model=JaxlmLM(language_model)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlm.api.weights import from_pretrained
from jaxlm.data.extras import library
from jaxlm.language_model import LanguageModel

_Base: Any = library("lm_eval.api.model", "eval").TemplateLM
_registry = library("lm_eval.api.registry", "eval")
_utils = library("lm_eval.utils", "eval")


@_registry.register_model("jaxlm")
class JaxlmLM(_Base):
    """A LanguageModel as lm-eval asks one; longer texts lose their beginning, as in its `hf`."""

    def __init__(self, model: LanguageModel | None = None, pretrained: str = "", **_: Any) -> None:
        super().__init__()
        self.model = from_pretrained(pretrained) if model is None else model
        self.max_length = self.model.config.seq_len

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.model.begins

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        ids = self.model.tokenizer.encode(string).tolist()
        bos = self.model.bos_id
        return ids if bos is None or add_special_tokens is False else [bos, *ids]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        ids, starts = [], []
        for _asked, before, after in requests:
            row = np.array([*before, *after][-(self.max_length + 1) :], np.int32)
            ids.append(row)
            starts.append(len(row) - len(after))
        return self.model.score_ids(ids, starts)

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        ids, starts, owner = [], [], []
        for i, request in enumerate(requests):
            (text,) = request.args
            windows = _utils.get_rolling_token_windows(
                self.model.tokenizer.encode(text).tolist(),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for before, after in map(_utils.make_disjoint_window, windows):
                ids.append(np.array([*before, *after], np.int32))
                starts.append(len(before))
                owner.append(i)
        total = np.zeros(len(requests))
        for i, (log_p, _greedy) in zip(owner, self.model.score_ids(ids, starts), strict=True):
            total[i] += log_p
        return total.tolist()

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        out = []
        for request in requests:
            prompt, how = request.args
            new = int(how.get("max_gen_toks", 256))
            ids = self.model.tokenizer.encode(prompt)[-max(1, self.max_length - new) :]
            [[text]] = self.model.generate(
                self.model.tokenizer.decode(ids),
                max_new_tokens=new,
                temperature=float(how.get("temperature", 0.0)) if how.get("do_sample") else 0.0,
                stop=how.get("until") or (),
                return_full_text=False,
            )
            out.append(text)
        return out
