"""Configs: what goes in comes out, what is wrong is one clear line, what matters is identity."""

import dataclasses
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm import pyfile
from jaxlm.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    Rung,
    Shape,
    Sweep,
    TrainConfig,
    validate,
)
from jaxlm.experiment import fingerprint, load
from jaxlm.pyfile import resolve
from jaxlm.schema import UserError, describe, from_dict, override, to_dict

QUICK = settings(deadline=None, derandomize=True, max_examples=100)
_FILES = sorted((Path(__file__).parent.parent / "experiments").glob("*.py"))
EXPERIMENTS = [path for path in _FILES if "def get_" in path.read_text()]  # else a data source


def refused(f, *args, **kwargs) -> str:
    with pytest.raises(UserError) as e:
        f(*args, **kwargs)
    assert e.value.exit_code == 2 and "\n" not in str(e.value)
    return str(e.value)


def values_of(want):
    """Values that the annotation of a field allows."""
    origin, args = typing.get_origin(want), typing.get_args(want)
    if dataclasses.is_dataclass(want):
        return st.builds(want, **{k: values_of(v) for k, v in typing.get_type_hints(want).items()})
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin is tuple and args[-1] is Ellipsis:
        return st.lists(values_of(args[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values_of, args))
    if origin is not None:  # X | None
        return st.none() | values_of(args[0])
    if want is typing.Any:
        return st.integers() | st.text()
    floats = st.floats(allow_nan=False, allow_infinity=False)
    return {int: st.integers(), float: floats, bool: st.booleans(), str: st.text()}[want]


@QUICK
@given(values_of(Config) | values_of(Sweep))
def test_every_config_survives_json(config):
    assert from_dict(type(config), to_dict(config)) == config


@QUICK
@given(st.data())
def test_no_value_of_a_field_gives_anything_but_one_clear_line(data):
    """Any small number, text, list or nothing, by JSON and by flag: accepted or refused."""
    small = st.integers(-3, 300) | st.floats(-2, 300) | st.text(max_size=5) | st.none()
    group = data.draw(st.sampled_from(["model", "data", "optimizer", "train", "mesh"]))
    names = sorted(to_dict(Config())[group])
    given = data.draw(
        st.dictionaries(st.sampled_from(names), small | st.lists(small, max_size=2), max_size=4)
    )
    for road in (
        lambda: from_dict(Config, {group: given}),
        lambda: [override(Config(), f"{group}.{k}", str(v)) for k, v in given.items()][-1:],
    ):
        try:
            made = road()
            validate(made if isinstance(made, Config) else (made or [Config()])[0])
        except UserError as e:
            assert "\n" not in str(e) and str(e).startswith(f"config.{group}")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.name)
def test_shipped_experiments_are_valid_and_survive_json(path):
    experiment = load(path)
    assert from_dict(type(experiment), to_dict(experiment)) == experiment


def test_every_field_is_explained():
    for kind in (Config, Sweep):
        rows = describe(kind)
        assert len(rows) == len({flag for flag, _, _ in rows}) > 5
        assert [flag for flag, _, text in rows if not text] == []


# --------------------------------------------------------------------------- three roads, one check

WRONG = [
    ("model.d_modl", 8, ["config.model.d_modl", "no such field", "did you mean 'd_model'?"]),
    ("optimizr", {}, ["config.optimizr", "no such field", "did you mean 'optimizer'?"]),
    ("train.batch", 8, ["config.train.batch", "global_batch_size"]),
    ("model.d_model", "wide", ["config.model.d_model", "int", "'wide'"]),
    ("model.d_model", 8.5, ["config.model.d_model", "int", "8.5"]),
    ("model.bias", 1, ["config.model.bias", "bool", "1"]),
    ("model.norm", "rmsnrm", ["config.model.norm", "'rmsnrm'", "did you mean 'rmsnorm'?"]),
    ("model.norm", "x", ["config.model.norm", "choose from rmsnorm, layernorm"]),
    ("optimizer.learning_rate", "fast", ["config.optimizer.learning_rate", "float", "'fast'"]),
    ("model.n_layers", None, ["config.model.n_layers", "int", "None"]),
    ("mesh.data", "two", ["config.mesh.data", "int", "'two'"]),
]


@pytest.mark.parametrize("dotted, value, said", WRONG, ids=lambda x: str(x)[:30])
def test_misspelt_and_wrongly_typed_fields_by_json_and_flag(dotted, value, said):
    group, _, name = dotted.partition(".")
    lines = [
        refused(from_dict, Config, {group: {name: value} if name else value}),
        refused(override, Config(), dotted, str(value)),
    ]
    for line in lines:
        assert all(part in line for part in said), line


def experiment(tmp_path, body, name="mine.py"):
    path = tmp_path / name
    path.write_text(f"from jaxlm.config import *\n\ndef get_config():\n    {body}\n")
    return path


@pytest.mark.parametrize(
    "body, said",
    [
        (
            "return Config(model=ModelConfig(d_modl=8))",
            ["mine.py:4", "ModelConfig has no field 'd_modl'; did you mean 'd_model'?"],
        ),
        ("return Config(modle=ModelConfig())", ["mine.py:4", "did you mean 'model'?"]),
        ("return Config(model=ModelConfig(d_model='8'))", ["config.model.d_model", "int", "'8'"]),
        ("return Config(model=dict(d_modl=8))", ["config.model.d_modl", "did you mean"]),
        ("return Config(optimizer=TrainConfig())", ["config.optimizer", "OptimizerConfig"]),
        ("return ModelConfig()", ["mine.py returned ModelConfig, not a Config"]),
        ("pass", ["mine.py returned NoneType, not a Config"]),
        ("return 1 / 0", ["mine.py:4: ZeroDivisionError: division by zero"]),
        ("return Confg()", ["mine.py:4: NameError", "Confg"]),
        ("return Config(", ["mine.py:4: SyntaxError"]),
        ("import nothing_like_it", ["mine.py:4: ModuleNotFoundError", "nothing_like_it"]),
    ],
)
def test_a_broken_experiment_file_is_told_by_line(tmp_path, body, said, monkeypatch):
    path = experiment(tmp_path, body)
    line = refused(load, path)
    assert all(part in line for part in said), line
    monkeypatch.chdir(tmp_path)
    path.rename("renamed.py")  # by a relative path too, and nothing is remembered of the first
    said = [part.replace("mine.py", "renamed.py") for part in said]
    line = refused(load, "renamed.py")
    assert all(part in line for part in said), line


def test_a_file_without_an_experiment_or_no_file_at_all(tmp_path):
    (tmp_path / "empty.py").write_text("x = 1\n")
    assert "neither get_config() nor get_sweep()" in refused(load, tmp_path / "empty.py")
    assert "no such file" in refused(load, tmp_path / "missing.py")
    (tmp_path / "top.py").write_text("x = 1\nboom\n")
    assert "top.py:2: NameError" in refused(load, tmp_path / "top.py")


def test_flags_override_an_experiment_with_the_types_of_its_fields(tmp_path):
    path = experiment(tmp_path, "return Config(model=ModelConfig(d_model=32))")
    flags = [
        ("model.n_heads", "8"), ("optimizer.learning_rate", "1e-4"), ("train.steps", "1e3"),
        ("model.bias", "true"), ("model.n_kv_heads", "None"), ("data.sources", "a.txt, b.txt"),
        ("train.probes", "('the sky is',)"), ("name", "3"), ("model.n_kv_heads", "2"),
    ]  # fmt: skip
    config = load(path, flags)
    assert config.model == ModelConfig(d_model=32, n_heads=8, bias=True, n_kv_heads=2)
    assert config.optimizer == OptimizerConfig(learning_rate=1e-4)
    assert (config.train.steps, config.train.probes) == (1000, ("the sky is",))
    assert (config.data.sources, config.name) == (("a.txt", "b.txt"), "3")
    line = refused(load, path, [("model.n_heads.x", "1")])
    assert "config.model.n_heads" in line and "no fields" in line


def test_a_sweep_is_checked_through_its_base(tmp_path):
    path = tmp_path / "sweep.py"
    path.write_text(
        "from jaxlm.config import *\n"
        "def get_sweep():\n"
        "    return Sweep(rungs=(Rung(1e9, (Shape(8, 1),)),), base=Config(seed=3))\n"
    )
    sweep = load(path, [("base.train.steps", "7")])
    assert sweep.rungs == (Rung(1e9, (Shape(8, 1),)),)
    assert (sweep.base.seed, sweep.base.train.steps) == (3, 7)
    line = refused(load, path, [("base.model.n_heads", "3")])
    assert "config.base.model.n_heads" in line and "nearest" in line
    assert "config.rungs[0].shapes" in refused(
        from_dict, Sweep, {"rungs": [{"shapes": [{"d_model": "x"}]}]}
    )


# ------------------------------------------------------------------------------- numbers in range


@pytest.mark.parametrize(
    "dotted, value, said",
    [
        ("model.n_heads", 3, ["divisor of d_model=128", "nearest: 2", "got 3"]),
        ("model.n_heads", 30, ["nearest: 32"]),
        ("model.n_heads", 0, ["at least 1"]),
        ("model.n_kv_heads", 3, ["divisor of n_heads=4", "nearest: 2", "got 3"]),
        ("model.n_kv_heads", 0, ["at least 1"]),
        ("model.d_head", 5, ["even width for rotary positions", "nearest: 6"]),
        ("model.vocab_size", 1, ["at least 2"]),
        ("model.base_d_model", 0, ["at least 1"]),
        ("data.sources", (), ["at least one source"]),
        ("data.eval_fraction", 1.0, ["below 1"]),
        ("optimizer.learning_rate", 0.0, ["above 0"]),
        ("optimizer.learning_rate", float("nan"), ["above 0", "nan"]),
        ("optimizer.b2", 1.0, ["below 1"]),
        ("optimizer.grad_clip", -1.0, ["at least 0"]),
        ("optimizer.warmup_fraction", 1.5, ["between 0 and 1"]),
        ("optimizer.decay_fraction", 0.97, ["at most 1 - warmup_fraction = 0.95"]),
        ("train.steps", 0, ["at least 1"]),
        ("train.accumulation_steps", 3, ["divisor of global_batch_size=16", "nearest: 2"]),
        ("train.profile", "5:3", ["'START:STOP'", "'5:3'"]),
        ("train.track", ("wandbb",), ["tensorboard, wandb, trackio", "wandbb"]),
    ],
)
def test_numbers_out_of_range_name_the_field_and_what_would_do(dotted, value, said):
    config = override(Config(), dotted, value)
    line = refused(validate, config)
    assert line.startswith(f"config.{dotted}"), line
    assert all(part in line for part in said), line


def test_intervals_are_multiples_of_a_dispatch():
    train = TrainConfig(steps_per_dispatch=8, eval_every=20)
    line = refused(validate, Config(train=train))
    assert "config.train.eval_every" in line and "8" in line
    assert "nearest: 16" in line or "nearest: 24" in line
    validate(Config(train=dataclasses.replace(train, eval_every=24, checkpoint_every=0)))


# -------------------------------------------------------------------------- references to own code


def test_references_resolve_or_say_what_is_wrong(tmp_path):
    own = tmp_path / "own.py"
    own.write_text("def objective():\n    return 42\n")
    broken = tmp_path / "broken.py"
    broken.write_text("x = 1\nimport nothing_like_it\n")
    assert resolve(f"{own}:objective", "config.x")() == 42
    assert resolve("jaxlm.config:Config", "config.x") is Config
    line = refused(resolve, f"{own}:objectiv", "config.train.objective")
    assert line.startswith("config.train.objective") and "did you mean 'objective'?" in line
    for reference, said in [
        (f"{tmp_path}/none.py:f", "no such file"),
        (f"{broken}:f", "broken.py:2: ModuleNotFoundError"),
        ("nothing.like.it:f", "cannot import 'nothing.like.it'"),
        ("objective", "expected 'file.py:name' or 'module:name'"),
    ]:
        line = refused(resolve, reference, "config.model.layer")
        assert line.startswith("config.model.layer: ") and said in line, line


# ----------------------------------------------------------------------------------- fingerprint

# Names, places, what is only watched and how work is spread: all else changes what is computed.
NOT_IDENTITY = {
    "name", "data.dir", "data.licence", "data.file_urls", "data.workers", "data.engine",
    "train.log_every", "train.eval_every", "train.checkpoint_every", "train.xla_preset",
    "mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.context", "mesh.expert", "mesh.stage",
    "model.remat", "model.scan_layers", "model.pipeline_repeats", "model.pipeline_microbatches",
    "optimizer.offload",
    "train.keep_checkpoints", "train.probes", "train.sample_prompts", "train.sample_tokens",
    "train.tasks", "train.task_items", "train.track", "train.profile",
    "tune.start", "tune.examples",  # what they hold counts, as part of the data
}  # fmt: skip


def leaves(config, prefix=""):
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{f.name}.")
        else:
            want = typing.get_type_hints(type(config))[f.name]
            yield prefix + f.name, value, want


def another(value, want):
    if typing.get_origin(want) is typing.Literal:
        return next(a for a in typing.get_args(want) if a != value)
    if want is bool:
        return not value
    if isinstance(value, tuple):
        item = typing.get_args(want)[0]
        more = {str: "more", float: 1.0}.get(item, (0.5, (1.0,)))
        return (*value, more)
    return f"{value}x" if want is str else (value or 0) + 1


@pytest.mark.parametrize("name, value, want", list(leaves(Config())), ids=lambda x: str(x)[:30])
def test_the_fingerprint_changes_with_what_matters_and_nothing_else(name, value, want):
    changed = override(Config(), name, another(value, want))
    same = fingerprint(changed) == fingerprint(Config())
    assert same == (name in NOT_IDENTITY)


def test_what_a_pipeline_draws_for_is_part_of_the_identity():
    def marks(dropout):
        models = [ModelConfig(dropout=dropout, pipeline_microbatches=n) for n in (0, 8)]
        return {fingerprint(Config(model=m)) for m in models}

    assert len(marks(0.0)) == 1 and len(marks(0.1)) == 2


def test_the_text_of_own_files_is_part_of_the_identity(tmp_path):
    own = tmp_path / "own.py"
    for field in ("model.layer", "optimizer.name", "optimizer.schedule", "train.objective"):
        own.write_text("def f(): return 1\n")
        config = override(Config(), field, f"{own}:f")
        before = fingerprint(config)
        assert fingerprint(config) == before
        own.write_text("def f(): return 2\n")
        assert fingerprint(config) != before, field
    config = Config(data=DataConfig(sources=(f"{own}:f",)))
    before = fingerprint(config)
    own.write_text("def f(): return 3\n")
    assert fingerprint(config) != before


def test_a_fingerprint_is_stable_over_processes_and_json():
    assert len(fingerprint(Config())) == 16
    assert fingerprint(from_dict(Config, to_dict(Config()))) == fingerprint(Config())
    assert pyfile.is_reference("a/b.py:f") and not pyfile.is_reference("stdlib")
