"""Rows to TensorBoard, W&B or trackio, besides metrics.jsonl, which is always written."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from jaxlm.config import Config
from jaxlm.schema import UserError, to_dict


class Trackers:
    """Sends a run's rows on while in its `with`. Raises UserError saying what to install."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.board: Any = None
        self.services: list[Any] = []
        for name in config.train.track:
            module = need(name)
            if name == "tensorboard":
                self.board = module.SummaryWriter(str(folder / "tensorboard"))
            else:  # wandb and trackio share one interface
                module.init(project="jaxlm", name=config.name, config=to_dict(config))
                self.services.append(module)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *error: object) -> None:
        if self.board is not None:
            self.board.close()
        for service in self.services:
            service.finish()

    def row(self, row: dict[str, Any]) -> None:
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}
        if self.board is not None:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, row["step"])
            if "sample/text" in row:
                text = row["sample/prompt"] + row["sample/text"]
                self.board.add_text("sample", text, row["step"])
        for service in self.services:
            service.log(numbers, step=row["step"])


_MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


def need(name: str) -> Any:
    """The module of a tracker. Raises UserError saying what to install if it is missing."""
    try:
        return importlib.import_module(_MODULES[name])
    except ImportError as e:
        raise UserError(
            f"--track={name}: {_MODULES[name]} is not installed: pip install 'jaxlm[{name}]'"
        ) from e
