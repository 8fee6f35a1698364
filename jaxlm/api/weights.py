"""Models to use, ours and others': `from_pretrained`, `generate`, `export`, `inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.api.places import folder_of
from jaxlm.config import MeshConfig
from jaxlm.files import read_json
from jaxlm.schema import JaxlmError, UserError

if TYPE_CHECKING:
    from jaxlm.language_model import LanguageModel


def generate(
    workdir: str | Path,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float | None = None,
    weights: str = "float32",
    draft: str | Path | None = None,
    **how: Any,
) -> list[str]:
    """Continuations of `prompts` by what `from_pretrained(workdir, weights=weights)` gives; `how`
    is what its `generate` takes, `draft` where that draft lies. `temperature` is 0.8 unless given,
    or `num_beams` are."""
    how |= {"max_new_tokens": max_new_tokens, "return_full_text": False}
    if temperature is None and how.get("num_beams", 1) == 1:
        temperature = 0.8
    if temperature is not None:
        how["temperature"] = temperature
    if draft is not None:
        how["draft"] = from_pretrained(draft)
    model = from_pretrained(workdir, weights=weights)
    return [texts[0] for texts in model.generate(prompts, **how)]


def from_pretrained(
    source: str | Path, *, devices: MeshConfig | None = None, weights: str = "float32"
) -> LanguageModel:
    """A model to use: a Hugging Face folder, a .gguf file, a run's or sweep's workdir (its best
    run), or else a name on the Hugging Face hub, which is fetched.

    It lies on one device (a run on its own mesh) unless `devices` names sizes of mesh axes, over
    all of them. `weights`: "float32", or in fewer bits "int8" or "int4" (`LanguageModel.in_bits`).
    Raises UserError for what is not there, damaged, or not computed by these layers.
    """
    if weights not in ("float32", "int8", "int4"):
        raise UserError(f"weights: expected float32, int8 or int4, got {weights!r}")
    model = _read(source, devices)
    return model if weights == "float32" else model.in_bits(8 if weights == "int8" else 4)


def _read(source: str | Path, devices: MeshConfig | None) -> LanguageModel:
    from jaxlm import job, loading
    from jaxlm.scaling import sweep as stages

    job.cache_compilations()
    if "://" not in str(source) and not _is_ours(Path(source)):
        return loading.of_checkpoint(source, devices)
    with folder_of(source) as folder:
        if (folder / "sweep.json").exists():
            folder = folder / "runs" / stages.best(folder)
        return loading.of_run(folder, devices)


def _is_ours(folder: Path) -> bool:
    """Whether a run or a sweep lies there, finished or not."""
    config = folder / "config.json"
    others = config.exists() and "model_type" in config.read_text("utf-8", "replace")
    return folder.is_dir() and not others and not any(folder.glob("*.gguf"))


def inspect(source: str | Path, prompt: str, out: str | Path) -> Path:
    """Writes a page that shows what the model that `from_pretrained(source)` gives makes of
    `prompt`: its tokens, where each head looks, what may follow. Returns the page's path."""
    from jaxlm.report.inspect_page import write_inspect_page

    found = from_pretrained(source).inspect(prompt)
    return write_inspect_page(str(source), prompt, found, Path(out))


def export(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str = "float32",
    verify: bool = False,
    scores: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Writes what `from_pretrained(source)` gives as a folder that `transformers` loads, with a
    model card (README.md) that tells the `scores` of these folders (`evaluate`'s `out`).

    Returns its `model_type` and, with `verify`, the largest |Δlogit| of the folder read back, by
    jaxlm and by transformers (None where it is not installed). Raises UserError; JaxlmError where
    logits differ by more than 1e-3 (float32 only).
    """
    import jax

    from jaxlm import loading
    from jaxlm.model.hf.verify import differences
    from jaxlm.report import model_card

    model = from_pretrained(source)
    told = [read_json(Path(folder) / "evaluation.json", "evaluation") for folder in scores]
    run = Path(source) if loading.is_run(Path(source)) else None
    card = model_card.text(str(source), model.config, run, told)
    family = loading.export(model, Path(out), dtype=dtype, card=card)
    found: dict[str, Any] = {
        "format": "jaxlm.export/1",
        "out": str(out),
        "family": family.model_type,
    }
    if verify:
        with jax.set_mesh(model.mesh):
            found["verified"] = differences(model.config, model.params, Path(out))
        worst = max(d for d in found["verified"].values() if d is not None)
        if dtype == "float32" and not worst <= 1e-3:
            raise JaxlmError(f"{out}: logits differ by {worst:.2g} after export")
    return found
