"""What tests of other libraries share: a small network with containers, ReLU and max pooling, inputs and classes."""

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.layer2 = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.layer2(self.layer1(x)).mean((2, 3)))


X = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([1, 0, 3])
