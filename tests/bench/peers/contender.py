"""Owns what a contender is: weights in its own form, a command that serves them, and what it computes."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import numpy as np

from .models import Model
from .process import Server, free_port

Settings = dict[str, int]
Grid = dict[str, tuple[int, ...]]


class Contender(ABC):
    """A server with weights of one precision."""

    name: str
    # Type of keys and values in its cache.
    kv_dtype: str
    ready_path: ClassVar[str] = "/health"
    ready_timeout_s: ClassVar[float] = 300
    # What --tune tries, by option; the first of each is the default.
    grid: ClassVar[Grid] = {}

    @abstractmethod
    def prepare(self, model: Model) -> None:
        """Installs what is missing and converts the weights; raises Unavailable if it cannot."""

    @abstractmethod
    def command(self, model: Model, port: int, settings: Settings) -> list:
        """What starts the server."""

    @abstractmethod
    def bits_per_weight(self, model: Model) -> float:
        """Bits of a weight in the matrices that every token is multiplied with."""

    @abstractmethod
    def logprobs(self, model: Model, ids: list[int], positions: list[int]) -> np.ndarray:
        """Logarithms of the next token's probabilities after each position: [positions, vocabulary]."""

    @abstractmethod
    def sources(self, model: Model) -> list[Path]:
        """The files that its distributions depend on."""

    def environment(self) -> dict[str, str]:
        """Variables of the server's process."""
        return {}

    def defaults(self) -> Settings:
        """The settings that serve it best, as --tune found."""
        return {option: values[0] for option, values in self.grid.items()}

    def start(self, model: Model, settings: Settings) -> Server:
        """The server, yet to be entered; its log lies beside the weights."""
        port = free_port()
        command = self.command(model, port, settings)
        return Server(command, self.environment(), port, self.ready_path, self.log(model))

    def log(self, model: Model) -> Path:
        """Where its server writes."""
        return model.folder / f"{self.name.replace(' ', '-')}.log"
