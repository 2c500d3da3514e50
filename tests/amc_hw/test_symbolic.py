"""A network with its batch-norms folded computes the same, and whatever cannot be folded is left as it is."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import Net
from torch import nn

from amc_hw.models import load_model
from amc_hw.symbolic import folded


def norms(module: nn.Module) -> int:
    return sum(isinstance(part, nn.BatchNorm2d) for part in module.modules())


def stirred(module: nn.Module) -> nn.Module:
    """Statistics and weights that are not those of an untrained network; in eval mode."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for value in (part.running_mean, part.weight, part.bias):
                if value is not None:
                    nn.init.uniform_(value, -1, 1)
            if part.running_var is not None:
                nn.init.uniform_(part.running_var, 0.5, 2)
    return module.eval()


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v1_cifar?width=0.25"])
def test_a_folded_network_computes_the_same_and_the_other_is_left_alone(name: str) -> None:
    module = stirred(load_model(name).module)
    before = copy.deepcopy(module.state_dict())
    images = torch.randn(4, 3, 32, 32)
    small = folded(module)
    with torch.no_grad():
        torch.testing.assert_close(small(images), module(images), rtol=1e-4, atol=1e-4)
    assert norms(module) > 0 and norms(small) == 0
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


class Standardised(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return nn.functional.conv2d(x, weight, self.bias)


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, 3, 1)


LEFT = {
    "a convolution that is called twice": Net(lambda n, x: n.b(n.a(x)) + n.a(x + 1), a=conv(), b=nn.BatchNorm2d(3)),
    "a convolution that others read": Net(lambda n, x: n.b(y := n.a(x)) + y, a=conv(), b=nn.BatchNorm2d(3)),
    "a batch-norm that is called twice": Net(lambda n, x: n.b(n.b(n.a(x))), a=conv(), b=nn.BatchNorm2d(3)),
    "a class of its own": Net(lambda n, x: n.b(n.a(x)), a=Standardised(3, 3, 1), b=nn.BatchNorm2d(3)),
    "no running statistics": Net(lambda n, x: n.b(n.a(x)), a=conv(), b=nn.BatchNorm2d(3, track_running_stats=False)),
    "a sum": Net(lambda n, x: n.b(n.a(x) + x), a=conv(), b=nn.BatchNorm2d(3)),
}


@pytest.mark.parametrize("why", LEFT)
def test_what_cannot_be_folded_stays(why: str) -> None:
    net, images = stirred(LEFT[why]), torch.randn(4, 3, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(folded(net)(images), net(images))
    assert norms(folded(net)) == 1


def test_hooks_training_and_what_is_not_traced() -> None:
    net, images = stirred(Net(lambda n, x: n.b(n.a(x)), a=conv(), b=nn.BatchNorm2d(3))), torch.randn(4, 3, 6, 6)
    handle = net.a.register_forward_hook(lambda part, args, value: value + 1)
    torch.testing.assert_close(folded(net)(images), net(images))
    handle.remove()
    assert norms(folded(net)) == 0
    assert norms(folded(net.train())) == 1
    branching = Net(lambda n, x: x if x.sum() > 0 else -x)
    assert folded(branching) is branching
