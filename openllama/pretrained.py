"""What every model class inherits: its configuration, where it lives, loading and saving."""

from __future__ import annotations

import torch
from torch import nn

from openllama.config import OpenLlamaConfig


class PretrainedModel(nn.Module):
    """Base of the decoder and of the heads on it; heads keep the decoder in ``self.model``."""

    base_model_prefix = "model"

    def __init__(self, config: OpenLlamaConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def config(self) -> OpenLlamaConfig:
        """The architecture; frozen, but may be replaced as a whole, which reaches the decoder too."""
        return self._config

    @config.setter
    def config(self, config: OpenLlamaConfig) -> None:
        self._config = config
        if self.base_model is not self:
            self.base_model.config = config

    @property
    def base_model(self) -> PretrainedModel:
        """The decoder without head: this model itself where it has none."""
        return getattr(self, "model", self)

    @property
    def device(self) -> torch.device:
        parameter = next(self.parameters(), None)
        return torch.get_default_device() if parameter is None else parameter.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def tie_weights(self) -> None:
        """Share the tensors the config wants shared; only a causal-LM head has any."""
