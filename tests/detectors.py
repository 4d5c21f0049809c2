"""Small detectors for tests, and batches with boxes."""

import torch
from pytorch_lightning import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lit_compress.detection import box_masks

LAYERS = ("body.2", "body.6", "body.9")  # strides 1, 2 and 4


class TinyDetector(LightningModule):
    """Says for each position of its coarsest map whether a box is there; knows nothing of the package."""

    def __init__(self, frozen: bool = False, dropout: float = 0.0):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 10, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(10, 10, 1),
        )  # fmt: skip
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Conv2d(10, 1, 1)
        if frozen:
            self.body[:3].requires_grad_(False)

    def training_step(self, batch, batch_idx):
        images, targets = batch
        scores = self.head(self.dropout(self.body(images)))
        wanted = box_masks([target["boxes"] for target in targets], tuple(scores.shape[2:]), (4, 4))
        return F.binary_cross_entropy_with_logits(scores, wanted.float())

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", TinyDetector.training_step(self, batch, batch_idx), batch_size=1)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.05, momentum=0.9, weight_decay=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Squares(Dataset):
    """Images of noise with one to two bright squares, some without any."""

    def __init__(self, count: int = 12, empty: int = 4, size: tuple[int, int] = (16, 20)):
        generator = torch.Generator().manual_seed(count)
        self.samples = []
        for number in range(count):
            image, boxes = torch.rand(3, *size, generator=generator) * 0.3, []
            for _ in range(0 if number % empty == empty - 1 else 1 + number % 2):
                x, y = (int(torch.randint(0, length - 6, (), generator=generator)) for length in (size[1], size[0]))
                image[:, y : y + 6, x : x + 5] += 0.6
                boxes.append([float(x), float(y), x + 5.0, y + 6.0])
            self.samples.append((image, torch.tensor(boxes).view(-1, 4)))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        image, boxes = self.samples[index]
        return image, {"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.int64)}


def stacked(samples):
    """A batch of images of one size."""
    return torch.stack([image for image, _ in samples]), [target for _, target in samples]


def listed(samples):
    """A batch of images of any size."""
    return [image for image, _ in samples], [target for _, target in samples]


def squares(batch_size: int = 3, **options) -> DataLoader:
    return DataLoader(Squares(), batch_size, **{"shuffle": True, "collate_fn": stacked, **options})


class Wrapped(LightningModule):
    """What a user writes around a detector of torchvision: ignore regions are left out of its targets."""

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.net = detector

    def training_step(self, batch, batch_idx):
        images, targets = batch
        targets = [{"boxes": one["boxes"][one["labels"] == 1], "labels": one["labels"][one["labels"] == 1]} for one in targets]
        return sum(self.net(images, targets).values())

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 1e-3, momentum=0.9)
