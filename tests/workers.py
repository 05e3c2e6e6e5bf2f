"""What a worker of a DataLoader is given: it starts with nothing but a pickle of this."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from openllama import OpenLlamaConfig, OpenLlamaForCausalLM, OpenLlamaTokenizer


class Scored(Dataset[list[object]]):
    """Ids of each text, what a model says of them, and the number of the worker's layers."""

    def __init__(
        self, texts: list[str], tokenizer: OpenLlamaTokenizer, model: OpenLlamaForCausalLM, config: OpenLlamaConfig
    ) -> None:
        self.texts, self.tokenizer, self.model, self.config = texts, tokenizer, model, config

    def __len__(self) -> int:
        return len(self.texts)

    @torch.no_grad()
    def __getitem__(self, index: int) -> list[object]:
        torch.set_num_threads(1)
        ids = self.tokenizer.encode(self.texts[index])
        loss = self.model.loss(torch.tensor([ids]), torch.tensor([ids]))
        return [ids, float(loss), self.config.num_hidden_layers]
