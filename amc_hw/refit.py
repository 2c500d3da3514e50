"""Least squares after slicing: every layer that lost inputs learns to give its original output from those it has."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from amc_hw.graph import LayerGraph
from amc_hw.models.channel_map import ChannelMap
from amc_hw.prune import Kept, KeptAxes, kept_axes
from amc_hw.tracing import trace_fx


@dataclass(frozen=True, eq=False)
class Gram:
    """Of a layer's input patches: mean (K,) and covariance (K, K), K = channels * kernel height * kernel width."""

    mean: Tensor
    covariance: Tensor


Grams = dict[str, Gram]


@torch.no_grad()
def gather_grams(
    module: nn.Module, graph: LayerGraph, images: Tensor, *, rows: int = 30_000, seed: int = 0, batch: int = 250
) -> Grams:
    """Mean and covariance of the input patches of every consumer layer of the unpruned network.

    images: (N, C, H, W), normalised. About `rows` patches per layer, at random positions of every image.
    """
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, list[Any]] = {}

    def read(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Tensor]) -> None:
            (x,) = args
            patches = _patches(layer, x, _sample(layer, x, math.ceil(rows / len(images)), generator))
            if name not in sums:
                zero = torch.zeros(patches.shape[1], dtype=torch.float64)
                sums[name] = [patches.mean(0), zero, torch.outer(zero, zero), 0]
            total = sums[name]
            patches = patches - total[0]  # near the mean, so that float32 products lose nothing
            total[1] += patches.sum(0)
            total[2] += patches.T @ patches
            total[3] += len(patches)

        return hook

    readers = {name: module.get_submodule(name) for group in graph.groups for name in group.modules("consumer")}
    handles = [layer.register_forward_pre_hook(read(name)) for name, layer in readers.items() if _refittable(layer)]
    with _eval_mode(module):
        for chunk in images.split(batch):
            module(chunk)
    for handle in handles:
        handle.remove()
    return {
        name: Gram(origin + first / count, second / count - torch.outer(first, first) / count**2)
        for name, (origin, first, second, count) in sums.items()
    }


@torch.no_grad()
def refit_fast(
    sliced: nn.Module, module: nn.Module, graph: LayerGraph, kept: Kept, grams: Grams, *, ridge: float = 1e-4
) -> None:
    """Refit every layer that lost inputs to its original output on the unpruned network's inputs; writes into
    `sliced`. One Cholesky solve on a sub-matrix of the layer's covariance (AMC, section 3; He et al., ICCV 2017)."""
    batch_norms = {layer.module: layer.batch_norm for layer in graph.layers if layer.module}
    for name, axes in kept_axes(graph, kept).items():
        if axes.into is None or name not in grams:
            continue
        gram, weight = grams[name], _weight(module, name)
        flat = weight.flatten(1).double()  # (O, K)
        if axes.out is not None:
            flat = flat[torch.from_numpy(axes.out)]
        stays = torch.zeros(weight.shape[1], dtype=torch.bool)
        stays[torch.from_numpy(axes.into)] = True
        stays = stays.repeat_interleave(weight[0, 0].numel())
        here, gone = stays.nonzero()[:, 0], (~stays).nonzero()[:, 0]
        lost = flat[:, gone].T  # (K gone, O)
        rows = gram.covariance.index_select(0, here)
        change = _solve(rows.index_select(1, here), rows.index_select(1, gone) @ lost, ridge)
        shift = gram.mean[gone].double() @ lost - gram.mean[here].double() @ change
        _write(sliced, name, batch_norms.get(name), change, shift)


@torch.no_grad()
def refit_faithful(
    sliced: nn.Module,
    module: nn.Module,
    graph: LayerGraph,
    kept: Kept,
    images: Tensor,
    *,
    rows_per_layer: int = 30_000,
    ridge: float = 1e-4,
    seed: int = 0,
) -> None:
    """Refit layer by layer, in network order, on the sliced network's own inputs; writes into `sliced`.

    Both networks run in lock-step over `images` (N, C, H, W). A layer's target is the unpruned layer's output at
    the same positions; where it is added to a shortcut, the target also makes up for the error on the shortcut, so
    that the sum matches (He et al., ICCV 2017, section 3.2).
    """
    axes = kept_axes(graph, kept)
    generator = torch.Generator().manual_seed(seed)
    per_image = math.ceil(rows_per_layer / len(images))
    with _eval_mode(module), _eval_mode(sliced):
        traced, traced_small = trace_fx(module), trace_fx(sliced)
        first, second = fx.Interpreter(traced), fx.Interpreter(traced_small)
        nodes = list(traced.graph.nodes)
        twin = dict(zip(nodes, traced_small.graph.nodes, strict=True))
        first.args_iter, second.args_iter = iter([images]), iter([images])
        last_reader = {source: node for node in nodes for source in node.all_input_nodes}
        for node in nodes:
            if node.op == "output":
                break
            first.env[node] = first.run_node(node)
            layer = sliced.get_submodule(str(node.target)) if node.op == "call_module" else None
            if layer is not None and _refittable(layer):
                original, small = first.env[node.args[0]], second.env[twin[node].args[0]]
                if original.shape != small.shape or not torch.equal(original, small):
                    name = str(node.target)
                    batch_norm, shortcut = _follow(node, module, first.env)
                    positions = _sample(layer, small, per_image, generator)
                    out = axes.get(name, KeptAxes()).out
                    channels = None if out is None else torch.from_numpy(out)
                    patches = _patches(layer, small, positions)
                    bias = layer.bias if isinstance(layer.bias, Tensor) else None
                    now = F.linear(patches, _weight(sliced, name).flatten(1), bias)
                    error = _rows(first.env[node], positions, channels) - now
                    if shortcut is not None:
                        missing = _rows(_value(first, shortcut), positions, channels)
                        missing = missing - _rows(_value(second, twin[shortcut]), positions, None)
                        error += missing / _gain(sliced, batch_norm, error.shape[1])
                    mean, error_mean = patches.mean(0), error.mean(0)
                    patches = patches - mean
                    covariance = (patches.T @ patches).double() / len(patches)
                    change = _solve(covariance, (patches.T @ (error - error_mean)).double() / len(patches), ridge)
                    _write(sliced, name, batch_norm, change, error_mean.double() - mean.double() @ change)
            second.env[twin[node]] = second.run_node(twin[node])
            for source in node.all_input_nodes:
                if last_reader[source] is node:
                    first.env.pop(source, None)
                    second.env.pop(twin[source], None)


def _refittable(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def _weight(module: nn.Module, name: str) -> Tensor:
    weight = module.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


def _value(run: fx.Interpreter, node: fx.Node) -> Tensor:
    """A node's value; a shortcut without weights may be read before its turn."""
    value: Tensor = run.env[node] if node in run.env else run.run_node(node)
    return value


def _gain(module: nn.Module, batch_norm: str | None, channels: int) -> Tensor:
    """What the following batch-norm multiplies by, (O,); infinite where so small that nothing can be made up for."""
    if batch_norm is None:
        return torch.ones(channels)
    norm = module.get_submodule(batch_norm)
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    return torch.where(gain.abs() < 1e-3 * gain.abs().max(), torch.inf, gain)


def _follow(node: fx.Node, module: nn.Module, ready: dict[fx.Node, Any]) -> tuple[str | None, fx.Node | None]:
    """(batch-norm right after a layer, the shortcut that its output is added to, if that can be read by now)."""
    batch_norm: str | None = None
    current = node
    while len(current.users) == 1:
        (user,) = current.users
        part = module.get_submodule(str(user.target)) if user.op == "call_module" else None
        if isinstance(part, nn.BatchNorm2d) and batch_norm is None:
            batch_norm = str(user.target)
        elif user.target in (operator.add, operator.iadd, torch.add):
            others = [source for source in user.all_input_nodes if source is not current]
            if len(others) != 1:
                break
            (other,) = others
            weightless = other.op == "call_module" and isinstance(
                module.get_submodule(str(other.target)), nn.Identity | ChannelMap
            )
            known = other in ready or (weightless and all(source in ready for source in other.all_input_nodes))
            return batch_norm, other if known else None
        elif not isinstance(part, nn.Identity | nn.Dropout):
            break
        current = user
    return batch_norm, None


def _solve(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """(gram + ridge * mean diagonal)^-1 cross: (K, K), (K, O) -> (K, O)."""
    gram = gram.clone()
    gram.diagonal().add_(ridge * gram.diagonal().mean() + 1e-12)
    return torch.cholesky_solve(cross, torch.linalg.cholesky(gram))


def _write(sliced: nn.Module, name: str, batch_norm: str | None, change: Tensor, shift: Tensor) -> None:
    """Add `change` (K, O) to the weights and `shift` (O,) to the bias, or to what the batch-norm subtracts."""
    layer = sliced.get_submodule(name)
    weight = _weight(sliced, name)
    weight += change.T.reshape(weight.shape).to(weight.dtype)
    if isinstance(layer.bias, Tensor):
        layer.bias += shift.to(layer.bias.dtype)
    elif batch_norm is not None:
        norm = sliced.get_submodule(batch_norm)
        assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
        norm.running_mean -= shift.to(norm.running_mean.dtype)


def _out_size(layer: Any, x: Tensor) -> tuple[int, int]:
    reach = [dilation * (kernel - 1) + 1 for dilation, kernel in zip(layer.dilation, layer.kernel_size, strict=True)]
    height, width = (
        (x.shape[2 + axis] + 2 * layer.padding[axis] - reach[axis]) // layer.stride[axis] + 1 for axis in (0, 1)
    )
    return height, width


def _sample(layer: nn.Module, x: Tensor, per_image: int, generator: torch.Generator) -> Tensor | None:
    """Output positions to look at, (N, P) flat indices; None for a layer without positions."""
    if isinstance(layer, nn.Linear):
        return None
    height, width = _out_size(layer, x)
    if per_image >= height * width:
        return torch.arange(height * width).expand(len(x), -1)
    return torch.randint(height * width, (len(x), per_image), generator=generator)


def _patches(layer: Any, x: Tensor, positions: Tensor | None) -> Tensor:
    """Input patches at output positions: (N * P, C * kh * kw), in the order of the flattened weight."""
    if positions is None:
        return x.flatten(0, -2)
    _, width = _out_size(layer, x)
    (kh, kw), (sh, sw), (dh, dw), (ph, pw) = layer.kernel_size, layer.stride, layer.dilation, layer.padding
    x = F.pad(x, (pw, pw, ph, ph))
    n, c, padded_h, padded_w = x.shape
    corner = positions // width * sh * padded_w + positions % width * sw  # (N, P)
    tap = (torch.arange(kh) * dh * padded_w)[:, None] + torch.arange(kw) * dw
    index = (torch.arange(n) * padded_h * padded_w)[:, None, None] + corner[..., None] + tap.flatten()
    pixels = x.permute(0, 2, 3, 1).reshape(-1, c).index_select(0, index.flatten())
    return pixels.view(-1, kh * kw, c).transpose(1, 2).reshape(-1, c * kh * kw)


def _rows(value: Tensor, positions: Tensor | None, channels: Tensor | None) -> Tensor:
    """Outputs at positions, (N * P, O), of the given channels."""
    if channels is not None:
        value = value.index_select(1, channels)
    if positions is None:
        return value.flatten(0, -2)
    n, c, h, w = value.shape
    index = (torch.arange(n) * h * w)[:, None] + positions
    return value.permute(0, 2, 3, 1).reshape(-1, c).index_select(0, index.flatten())


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    flags = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, flag in flags.items():
            part.training = flag


@torch.no_grad()
def reestimate_batch_norm(module: nn.Module, images: Tensor, *, batch: int = 128) -> None:
    """Batch-norm statistics as the plain average over `images` (N, C, H, W); everything else stays in eval mode."""
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d) and part.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    with _eval_mode(module):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        for chunk in images.split(batch):
            module(chunk)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
