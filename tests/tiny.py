"""Small models and distillers that several test files use."""

import torch
from torch import Tensor, nn

from distillkit import ClassLogits, Distiller, Features


class Net(nn.Module):
    """A classifier with names worth tapping: stem, blocks.0, blocks.1, head; dropout to tell train from eval."""

    def __init__(self, width: int = 8, classes: int = 5):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x).relu()
        return self.head(self.drop(x.mean((2, 3))))


class MSE(Distiller):
    """Mean squared difference of one feature map."""

    reads = Features
    short_name = "mse"

    def __init__(self, at: str, teacher_at: str | None = None, **kwargs):
        super().__init__(**kwargs)
        self.student_at, self.teacher_at = at, teacher_at or at

    def forward(self, student: Features, teacher: Features, targets: object) -> Tensor:
        return (student.maps[0] - teacher.maps[0]).pow(2).mean()


class KL(Distiller):
    """A user's own distiller: Hinton's loss at T = 1."""

    reads = ClassLogits
    short_name = "kl"

    def forward(self, student: ClassLogits, teacher: ClassLogits, targets: object) -> Tensor:
        return nn.functional.kl_div(student.logits.log_softmax(-1), teacher.logits.softmax(-1), reduction="batchmean")


def batch(n: int = 4, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 16, 16, generator=g), torch.randint(0, classes, (n,), generator=g)
