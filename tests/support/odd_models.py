"""Small models that do with their rows what models may do by themselves."""

import torch
from torch import Tensor, nn

from tests.support.family_inputs import VOCABULARY


class SequenceFirst(nn.Module):
    """torch's own default: length before batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.fc1, self.fc2 = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(input_ids).transpose(0, 1)
        return self.fc2(self.fc1(x).tanh()).transpose(0, 1)


class Guided(SequenceFirst):
    """Runs [conditional; unconditional] as one batch of twice the rows, and takes the difference."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(input_ids)
        both = self.fc2(self.fc1(torch.cat([x, x.flip(1)])).tanh())
        return both[: len(x)] - 0.5 * both[len(x) :]


class Experts(SequenceFirst):
    """A mixture whose experts are modules: each gets the tokens that chose it."""

    def __init__(self) -> None:
        super().__init__()
        self.specialists = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.fc1(self.embedding(input_ids))
        flat = x.flatten(0, 1)
        chosen, out = flat[:, 0] > 0, torch.zeros_like(flat)
        for index, specialist in enumerate(self.specialists):
            out[chosen == bool(index)] = specialist(flat[chosen == bool(index)])
        return out.view_as(x)


class Packed(SequenceFirst):
    """Runs its tokens without the padding, as one sequence."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x, kept = self.embedding(input_ids), attention_mask.bool()
        return torch.zeros_like(x).masked_scatter(kept[..., None], self.fc2(self.fc1(x[kept]).tanh()))


class SharedTable(SequenceFirst):
    """Projects a table of as many positions as there are tokens, which all rows share."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        table = self.fc2(self.embedding.weight[: input_ids.shape[1]])
        return self.fc1(self.embedding(input_ids)) + table


class Shuffled(SequenceFirst):
    """Compares each row with its neighbour's, as losses with negatives within the batch do."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.fc1(self.embedding(input_ids))
        return x + self.fc2(x.roll(1, dims=0))


class Windows(SequenceFirst):
    """Windows of two tokens as rows of their own; the last one is padded."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(nn.functional.pad(input_ids, (0, input_ids.shape[1] % 2)))
        windows = x.reshape(-1, 2, 16)
        return self.fc2(self.fc1(windows).mean(dim=1, keepdim=True) + windows).reshape(x.shape)
