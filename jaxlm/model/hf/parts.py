"""Parts of config.json that say by several keys what several fields of ours say together."""

from __future__ import annotations

from jaxlm.config import ModelConfig
from jaxlm.model.hf.family import Json, Part
from jaxlm.schema import UserError

# ------------------------------------------------------------------------------- rotary positions

# Our field of `rope_scaling` → their key, for each kind.
_SCALED = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_seq_len": "original_max_position_embeddings",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_seq_len": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    },
}


def _read_scaling(stated: Json, where: str) -> Json:
    kind = stated.get("rope_type", stated.get("type", "default"))
    if kind not in _SCALED:
        raise UserError(f"{where}: rope_type is {kind!r}; built here: {', '.join(_SCALED)}")
    found = {"rope_scaling.kind": "none" if kind == "default" else kind}
    for ours, theirs in _SCALED[kind].items():
        if stated.get(theirs) is not None:
            found[f"rope_scaling.{ours}"] = stated[theirs]
    return found


def _write_scaling(config: ModelConfig) -> Json:
    scaling = config.rope_scaling
    kind = "default" if scaling.kind == "none" else scaling.kind
    known = _SCALED.get(kind, {})
    values = {theirs: getattr(scaling, ours) for ours, theirs in known.items()}
    return {"rope_type": kind, **{k: v for k, v in values.items() if v is not None}}


def _stated(theirs: Json, where: str) -> Json:
    """`rope_parameters` (transformers 5), or the `rope_scaling` that came before."""
    stated = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    if not isinstance(stated, dict):
        raise UserError(f"{where}: rope_parameters: expected an object, got {stated!r}")
    return stated


def rope(theta: float, fraction: float | None = None) -> Part:
    """One rotation for all layers; `theta` and `fraction` are what the keys' absence means.
    Without `fraction` the whole head rotates."""

    def read(theirs: Json, where: str) -> Json:
        stated = _stated(theirs, where)
        base = theirs.get("rope_theta", theirs.get("rotary_emb_base", theta))
        share = theirs.get("partial_rotary_factor", theirs.get("rotary_pct", fraction or 1.0))
        share = stated.get("partial_rotary_factor", share)
        if fraction is None and share != 1.0:
            raise UserError(f"{where}: partial_rotary_factor is {share!r}; expected none here")
        return {
            "rope_theta": stated.get("rope_theta", base),
            "rope_fraction": share,
            **_read_scaling(stated, where),
        }

    def write(config: ModelConfig) -> Json:
        made = {"rope_theta": config.rope_theta, **_write_scaling(config)}
        if config.rope_fraction != 1.0 or fraction is not None:
            made["partial_rotary_factor"] = config.rope_fraction
        return {"rope_parameters": made}

    return Part(read, write)


def _read_two(theirs: Json, where: str) -> Json:
    stated = _stated(theirs, where)
    if "full_attention" not in stated:
        stated = {
            "full_attention": {"rope_theta": theirs.get("rope_theta", 1e6), **stated},
            "sliding_attention": {"rope_theta": theirs.get("rope_local_base_freq", 1e4)},
        }
    far, near = stated["full_attention"], stated.get("sliding_attention", {})
    if near.get("rope_type", "default") != "default":
        raise UserError(f"{where}: scaled rotary positions in local layers are not built here")
    return {
        "rope_theta": far.get("rope_theta", 1e6),
        "local_rope_theta": near.get("rope_theta", 1e4),
        **_read_scaling(far, where),
    }


def _write_two(config: ModelConfig) -> Json:
    far = {"rope_theta": config.rope_theta, **_write_scaling(config)}
    near = {"rope_theta": config.local_rope_theta, "rope_type": "default"}
    return {"rope_parameters": {"full_attention": far, "sliding_attention": near}}


TWO_ROPES = Part(_read_two, _write_two)
"""One rotation for global layers and one for local ones (Gemma 3)."""

# -------------------------------------------------------------------------- which layers are local


def local_layers(every: int, pattern_key: str = "") -> Part:
    """`layer_types` against `global_every`; without it each `every`-th layer is global."""

    def read(theirs: Json, where: str) -> Json:
        window, types = theirs.get("sliding_window"), theirs.get("layer_types")
        n = theirs.get(pattern_key) or theirs.get(pattern_key.lstrip("_")) or every
        if types is not None:
            kinds = {"sliding_attention": True, "full_attention": False}
            local = [kinds.get(kind) for kind in types]
            n = local.index(False) + 1 if False in local else 0
            regular = [n == 0 or (i + 1) % n != 0 for i in range(len(local))]
            if local != regular:
                raise UserError(f"{where}: layer_types {types}: expected each n-th one global")
        return {"sliding_window": window, "global_every": n if window else 0}

    def write(config: ModelConfig) -> Json:
        kinds = ["sliding_attention" if x else "full_attention" for x in config.local]
        return {"sliding_window": config.sliding_window, "layer_types": kinds}

    return Part(read, write)


def _read_window(theirs: Json, where: str) -> Json:
    return {"sliding_window": theirs.get("sliding_window"), "global_every": 0}


WINDOW = Part(_read_window, lambda config: {"sliding_window": config.sliding_window})
"""A sliding window in every layer, or in none (Mistral)."""

# -------------------------------------------------------------------------------------------- other


def _root(default: float) -> Part:
    def read(theirs: Json, where: str) -> Json:
        return {"attention_scale": theirs.get("query_pre_attn_scalar", default) ** -0.5}

    def write(config: ModelConfig) -> Json:
        scale = config.attention_scale or config.head_dim**-0.5
        n = scale**-2
        return {"query_pre_attn_scalar": round(n) if abs(n - round(n)) < 1e-6 * n else n}

    return Part(read, write)


QUERY_SCALE = _root(256)
"""`query_pre_attn_scalar`: scores are divided by its root (Gemma)."""
