"""Every family against transformers, live: `make test-parity` (extra `parity`).

With JAXLM_WRITE_DOCS=1 the table in docs/parity.md is written anew.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import small

from jaxlm import mesh
from jaxlm.config import Config
from jaxlm.data import pretrained, tokenizer
from jaxlm.model.hf import export, load, verify
from jaxlm.model.hf.family import flat
from jaxlm.model.scale import size

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch", reason="needs the extra parity: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent / "golden"))
import make  # noqa: E402

YARN = make._scaled("yarn", original_max_position_embeddings=8, beta_fast=4.0, beta_slow=1.0)
LLAMA = ("LlamaForCausalLM", "LlamaConfig")
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama_yarn": (*LLAMA, {**make.GROUPED, "rope_parameters": YARN}),
    "llama_linear": (*LLAMA, {**make.GROUPED, "rope_parameters": make._scaled("linear")}),
    "llama_tied_mqa": (
        *LLAMA, {**make.SMALL, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "pythia_serial": (
        "GPTNeoXForCausalLM", "GPTNeoXConfig",
        {**make.MODELS["pythia"][2], "use_parallel_residual": False},
    ),
    "qwen3_moe_unnormalized": (
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig",
        {**make.MODELS["qwen3_moe"][2], "norm_topk_prob": False},
    ),
}  # fmt: skip
make.MODELS.update(VARIANTS)
GRADIENTS = ("gpt2", "llama3", "bert", "t5", "t5_v1_1")
ROWS: dict[str, dict[str, Any]] = {}


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    yield
    if os.environ.get("JAXLM_WRITE_DOCS") and set(make.MODELS) == set(ROWS):
        (ROOT / "docs" / "parity.md").write_text(document())


def document() -> str:
    lines = [
        f"| {name} | {row['architecture']} | {row['params']:,} | {row['read']:.1e} |"
        f" {row['exported']:.1e} | {row.get('gradients', '–')} |"
        for name, row in ROWS.items()
    ]
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return "\n".join(
        [
            "# Parity with transformers",
            "",
            "Written by `JAXLM_WRITE_DOCS=1 make test-parity` (tests/test_parity.py) with"
            f" {versions}, jax",
            f"{jax.__version__}, float32 on a CPU. Each model is tiny, its weights random and large"
            " enough that all of",
            "them count (logits have a standard deviation of 1 to 2). *read*: max |Δ| of the output"
            " (logits, class",
            "logits, or a bare encoder's states) between transformers and jaxlm reading what"
            " transformers saved;",
            "*exported*: between transformers before, and transformers reading what jaxlm wrote of"
            " it; *gradients*: the",
            "largest |Δ| of any parameter's gradient over the largest entry of that gradient. The"
            " limit is 1e-4 for all.",
            "",
            "| model | architecture | parameters | read | exported | gradients |",
            "|---|---|---|---|---|---|",
            *lines,
            "",
        ]
    )


@pytest.mark.parametrize("name", list(make.MODELS))
def test_output_and_gradients(name: str, tmp_path: Path) -> None:
    model, ids = make.build(name, seed=1), make.tokens(1)
    make.save(name, model, tmp_path / "theirs")
    with torch.no_grad():
        want = make.output(model, ids).numpy()
    checkpoint = load.open_folder(tmp_path / "theirs")
    config = checkpoint.config
    with jax.set_mesh(mesh.make(Config(model=config), jax.devices()[:1])), small.compiled_quickly():
        params = load.load(checkpoint)
        got = np.asarray(jax.jit(verify.output, static_argnums=0)(config, params, ids))
        export.export(config, params, tmp_path / "ours")
        row = {
            "architecture": checkpoint.family.architecture,
            "params": size(config).params,
            "read": float(np.abs(got - want).max()),
            "exported": float(np.abs(verify.torch_output(tmp_path / "ours", ids) - want).max()),
        }
        if name in GRADIENTS:
            row["gradients"] = f"{gradients(model, checkpoint, params, ids):.1e}"
    ROWS[name] = row
    print(name, row)
    assert row["read"] <= 1e-4 and row["exported"] <= 1e-4
    assert float(row.get("gradients", 0)) <= 1e-4


def gradients(model: Any, checkpoint: load.Checkpoint, params: Any, ids: np.ndarray) -> float:
    """Largest difference of the gradients of a cross-entropy, relative to each tensor's largest
    entry. Where that is rounding (key biases, which a softmax does not see) it is left out."""
    targets = make.tokens(2)
    loss = torch.nn.functional.cross_entropy(
        make.output(model, ids).flatten(0, 1), torch.tensor(targets.reshape(-1), dtype=torch.int64)
    )
    loss.backward()
    want = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}

    def ours(params: Any) -> jax.Array:
        log_p_btv = jax.nn.log_softmax(verify.output(checkpoint.config, params, ids))
        chosen_btv = jax.nn.one_hot(targets, log_p_btv.shape[-1])
        return -(log_p_btv * chosen_btv).sum(-1).mean()

    grads = flat(jax.jit(jax.grad(ours))(params))
    got: dict[str, np.ndarray] = {}
    for path, one in checkpoint.layouts.items():
        for tensor in one.tensors():
            theirs = got.setdefault(tensor.name, np.zeros(tensor.shape, np.float32))
            one.write(np.asarray(grads[path])[one.place(tensor.at)] + one.row.add, theirs)
    assert got.keys() <= want.keys()
    worst = 0.0
    for name, g in got.items():
        largest = np.abs(want[name]).max()
        if largest > 1e-6:
            worst = max(worst, float(np.abs(g - want[name]).max() / largest))
    return worst


# ------------------------------------------------------------------------------------- tokenizers

TEXT = (
    "The sky is blue, isn't it? 今日は 1,234 日目。\t👩‍👩‍👧 déjà  vu\r\n"
    "<|endoftext|> def f(x):\n    return x"
)


def test_exported_tokenizers_are_equal(tmp_path: Path) -> None:
    words = tokenizer.create("bpe", 400, [TEXT.replace("<|endoftext|>", "")] * 8)
    for i, ours in enumerate((tokenizer.Bytes(), words)):
        folder = tmp_path / str(i)
        folder.mkdir()
        for name, text in pretrained.as_files(ours, 64).items():
            (folder / name).write_text(text)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        plain = TEXT.replace("<|endoftext|>", "")
        ids = theirs(plain, add_special_tokens=False)["input_ids"]
        assert ids == ours.encode(plain).tolist()
        assert theirs.decode(ids) == ours.decode(ids) == plain
        assert i == 0 or theirs.eos_token_id == ours.eos_id


def test_tokenizers_of_files_are_equal(tmp_path: Path) -> None:
    """GPT-2's vocab.json and merges.txt, BERT's vocab.txt: as transformers makes them."""
    words = tokenizer.create("bpe", 400, [TEXT.replace("<|endoftext|>", "")] * 8)
    model = json.loads(words.inner.to_str())["model"]
    gpt2 = tmp_path / "gpt2"
    gpt2.mkdir()
    (gpt2 / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (gpt2 / "merges.txt").write_text("\n".join(lines) + "\n")
    theirs = transformers.GPT2Tokenizer.from_pretrained(gpt2)
    ours = pretrained.from_folder(gpt2)
    plain = TEXT.replace("<|endoftext|>", "")
    assert ours.encode(plain).tolist() == theirs(plain)["input_ids"]
    assert ours.decode(ours.encode(plain)) == theirs.decode(theirs(plain)["input_ids"]) == plain

    bert = tmp_path / "bert"
    bert.mkdir()
    letters = sorted({c for c in TEXT.lower() if not c.isspace()})
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    (bert / "vocab.txt").write_text("\n".join([*vocab, "the", "sky", "blue", "##ue"]) + "\n")
    theirs = transformers.BertTokenizer.from_pretrained(bert)
    ours = pretrained.from_folder(bert)
    assert ours.encode_with_special(TEXT).tolist() == theirs(TEXT)["input_ids"]
    cut = theirs(TEXT, truncation=True, max_length=9)["input_ids"]
    assert ours.encode_with_special(TEXT, 9).tolist() == cut
