"""Rows to TensorBoard, W&B or trackio, besides metrics.jsonl, which is always written."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm.config import Config
from jaxlm.schema import UserError, to_dict


class Trackers:
    """Sends a run's rows on. Raises UserError saying what to install for what is missing."""

    def __init__(self, names: Sequence[str], config: Config, folder: Path) -> None:
        self.board: Any = None
        self.services: list[Any] = []
        for name in names:
            if name == "tensorboard":
                self.board = _module("tensorboardX", name).SummaryWriter(
                    str(folder / "tensorboard")
                )
            else:  # wandb and trackio share one interface
                service = _module(name, name)
                service.init(project="jaxlm", name=config.name, config=to_dict(config))
                self.services.append(service)

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

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
        for service in self.services:
            service.finish()


def _module(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise UserError(
            f"--track={name}: {module} is not installed: pip install -e '.[{name}]'"
        ) from e
