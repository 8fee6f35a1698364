"""A LanguageModel from where it lies, a run, a folder of others' or a GGUF file; and back out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np

from jaxlm import job, mesh
from jaxlm.config import Config, MeshConfig
from jaxlm.data import chat, pretrained, tokenizer
from jaxlm.data.chat import ChatTemplate
from jaxlm.evaluate.reading import Pooling
from jaxlm.files import read_json, write_json
from jaxlm.language_model import LanguageModel
from jaxlm.model import transformer
from jaxlm.model.hf import export as hf
from jaxlm.model.hf import hub, load
from jaxlm.model.hf.family import Family, Json
from jaxlm.model.hf.gguf import Gguf
from jaxlm.model.hf.source import read_object
from jaxlm.model.transformer import Params
from jaxlm.schema import UserError
from jaxlm.train import parameters
from jaxlm.train.run import read_config


def of_any(source: str | Path) -> LanguageModel:
    """A run's folder, or what `of_checkpoint` takes."""
    return of_run(Path(source)) if is_run(Path(source)) else of_checkpoint(source)


def is_run(folder: Path) -> bool:
    """Whether a run lies there, finished or not; a checkpoint of others states a model_type."""
    config = folder / "config.json"
    return config.is_file() and "model_type" not in config.read_text("utf-8", "replace")


def of_run(folder: Path, devices: MeshConfig | None = None) -> LanguageModel:
    """The newest checkpoint of a run; with adapters its context is that of what it began with,
    however short the examples were. Raises UserError where there is none."""
    config = read_config(folder)
    words = tokenizer.load(folder / "tokenizer")
    if devices is not None:
        config = replace(config, mesh=devices)
    on = job.reading_mesh(config)
    with jax.set_mesh(on):
        params = job.load_params(config, folder)
        if config.tune.lora.rank:
            start = of_any(config.tune.start)
            model = replace(config.model, seq_len=start.config.seq_len)
            config = replace(config, model=model)
            base = parameters.frozen(config, begun(config, start))
            params = jax.jit(partial(parameters.whole, config))(params, base)
    named = folder / "labels.json"
    labels = tuple(read_json(named, "labels")["labels"]) if named.exists() else ()
    bos_id, template = _kept(folder)
    read, t = (words, config.model, params, on), config.train
    infills = t.objective == "fill_in_the_middle"
    marks = t.corruption.marks(config.model.vocab_size) if infills else None
    return LanguageModel(*read, bos_id=bos_id, labels=labels, chat=template, infill=marks)


def keep(folder: Path, bos_id: int | None, template: ChatTemplate | None) -> None:
    """Writes into a run's folder how it reads texts and conversations: as what it began with."""
    spelled = template and {"source": template.source, "tokens": template.tokens}
    kept = {"format": "jaxlm.reading/1", "bos_id": bos_id, "chat": spelled}
    write_json(folder / "reading.json", kept)


def _kept(folder: Path) -> tuple[int | None, ChatTemplate | None]:
    path = folder / "reading.json"
    if not path.exists():  # a run that began with nothing
        return None, None
    kept = read_json(path, "reading")
    return kept["bos_id"], ChatTemplate(**kept["chat"]) if kept["chat"] else None


def begun(config: Config, start: LanguageModel, labels: tuple[str, ...] = ()) -> Params:
    """The parameters of `config.model` that `start` gives, on the current mesh, and fresh ones for
    what it lacks: a classifier of these `labels`. Positions beyond `seq_len` are left out."""
    fresh = jax.jit(lambda: transformer.init(config.model, jax.random.key(config.seed)))()
    kept = {k for k in fresh if k != "classifier" or (labels and start.labels == labels)}
    theirs = {k: v for k, v in start.params.items() if k in kept}
    if "positions" in theirs:
        theirs["positions"] = theirs["positions"][: config.model.seq_len]
    layout = jax.tree.map(lambda x: x.sharding, {k: fresh[k] for k in theirs})
    return {**fresh, **jax.device_put(jax.tree.map(np.asarray, theirs), layout)}


def of_checkpoint(source: str | Path, devices: MeshConfig | None = None) -> LanguageModel:
    """A Hugging Face folder, a .gguf file (or a folder with one), or a name on the hub, on one
    device unless `devices` says more.

    A local path is taken first; only a name that is none is looked up on the hub. Raises UserError.
    """
    path = hub.located(source)
    if path.suffix == ".gguf":
        file = Gguf(path)
        checkpoint, words = load.of_gguf(file), pretrained.from_gguf(file.metadata, str(path))
        pooling, template = Pooling(), chat.of_gguf(file.metadata)
    else:
        checkpoint, words = load.open_folder(path), pretrained.from_folder(path)
        pooling, template = _pooling(path), chat.of_folder(path)
    if words.vocab_size > checkpoint.config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {words.vocab_size:,} ids, the model"
            f" {checkpoint.config.vocab_size:,}"
        )
    on = mesh.make(
        Config(model=checkpoint.config, mesh=devices or MeshConfig()),
        jax.devices() if devices else jax.devices()[:1],
    )
    with jax.set_mesh(on):
        params = load.load(checkpoint)
    labels = _labels(checkpoint.theirs, checkpoint.config.n_classes)
    told = pooling, words.bos_id, labels, template
    return LanguageModel(words, checkpoint.config, params, on, *told)


def _labels(theirs: Json, n: int) -> tuple[str, ...]:
    """What config.json calls the classes."""
    names = theirs.get("id2label") or {}
    return tuple(str(names.get(str(i), f"LABEL_{i}")) for i in range(n))


def export(model: LanguageModel, out: Path, *, dtype: str = "float32", card: str = "") -> Family:
    """Writes a folder that `transformers` loads, with a model card. Raises UserError as
    `hf.export`."""
    ids = {"eos_token_id": model.tokenizer.eos_id, "bos_token_id": model.bos_id}
    spelled = model.chat.tokens if model.chat else {}
    files = pretrained.as_files(model.tokenizer, model.config.seq_len, spelled)
    files |= {"chat_template.jinja": model.chat.source} if model.chat else {}
    files |= {"README.md": card}
    with jax.set_mesh(model.mesh):
        return hf.export(model.config, model.params, out, files=files, ids=ids, dtype=dtype)


def _pooling(folder: Path) -> Pooling:
    """What sentence-transformers' modules.json and 1_Pooling/config.json say."""
    path = folder / "1_Pooling" / "config.json"
    if not path.exists():
        return Pooling()
    stated = read_object(path)
    modes = {
        "cls": stated.get("pooling_mode_cls_token") or stated.get("pooling_mode") == "cls",
        "mean": stated.get("pooling_mode_mean_tokens") or stated.get("pooling_mode") == "mean",
    }
    if sum(map(bool, modes.values())) != 1:
        raise UserError(f"{path}: expected mean or cls pooling, got {stated}")
    modules = (
        (folder / "modules.json").read_text("utf-8") if (folder / "modules.json").exists() else ""
    )
    cut = folder / "sentence_bert_config.json"
    most = read_object(cut).get("max_seq_length") if cut.exists() else None
    return Pooling(bool(modes["cls"]), "Normalize" in modules, most)
