"""Big models on the chips that they are meant for: the rows of docs/results/aot.md."""

from dataclasses import replace

from jaxlm.config import Config, MeshConfig, OptimizerConfig, TrainConfig
from jaxlm.model.presets import preset


def config(
    name, batch, mesh, *, accumulation=1, steps=1000, objective="next_token", offload=False, **model
):
    return Config(
        name=name,
        model=replace(preset(name), **{"remat": "full", **model}),
        train=TrainConfig(
            global_batch_size=batch,
            accumulation_steps=accumulation,
            steps=steps,
            objective=objective,
        ),
        optimizer=OptimizerConfig(offload=offload),
        mesh=MeshConfig(**{"data": 1, **mesh}),
    )


GPT3 = {"vocab_size": 50304}

# name → (config, topology, slices)
ROWS = {
    "gpt2": (config("gpt2-124m", 512, {"data": 16}, accumulation=4, remat="none"), "v5e:4x4", 1),
    "llama8b-v5e": (config("llama3-8b", 128, {"fsdp": 64, "tensor": 4}), "v5e:16x16", 1),
    "llama8b-v6e": (config("llama3-8b", 256, {"fsdp": 256}), "v6e:16x16", 1),
    "llama8b-8": (config("llama3-8b", 8, {"fsdp": 8}, seq_len=4096), "v5e:2x4", 1),
    "llama8b-8-offload": (
        config("llama3-8b", 8, {"fsdp": 8}, seq_len=4096, offload=True), "v5e:2x4", 1,
    ),
    "llama70b": (config("llama3-70b", 256, {"fsdp": 128, "tensor": 4}), "v5p:8x8x8", 1),
    "gpt3": (config("gpt3-175b", 1024, {"fsdp": 128, "tensor": 8}, **GPT3), "v5p:8x8x16", 1),
    "gpt3-pod": (
        config("gpt3-175b", 2240, {"data": 140, "fsdp": 8, "tensor": 8}, **GPT3),
        "v5p:16x20x28",
        1,
    ),
    "t5-11b": (
        config("t5-11b", 512, {"fsdp": 32, "tensor": 4}, objective="span_corruption",
               target_len=128),
        "v5p:4x4x8",
        1,
    ),
    "mixtral": (
        config("mixtral-8x22b", 512, {"fsdp": 16, "expert": 8, "tensor": 4}, seq_len=4096),
        "v5p:8x8x8",
        1,
    ),
    "llama8b-slices": (config("llama3-8b", 512, {"data": 2, "fsdp": 256}, seq_len=4096),
                       "v5e:16x16", 2),
}  # fmt: skip
