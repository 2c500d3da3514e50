"""Least squares after slicing: every layer that lost inputs learns to give its original output from those it has."""

from __future__ import annotations

import copy
import math
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from amc_hw.errors import UserError
from amc_hw.graph import LayerGraph
from amc_hw.models.channel_map import ChannelMap
from amc_hw.padding import as_plane, in_plane, padded, padding_of, reach_of
from amc_hw.prune import Kept, KeptAxes, kept_axes, plain_weight
from amc_hw.symbolic import (
    BATCH_NORMS,
    CONVS,
    TRANSPOSED,
    batch_norm_affine,
    eval_mode,
    has_computed_weight,
    holds_any,
    readers,
    shared_tensors,
    trace_fx,
)


@dataclass(frozen=True, eq=False)
class Gram:
    """Of a layer's input patches: mean (K,) and covariance (K, K), K = channels * kernel height * kernel width."""

    mean: Tensor
    covariance: Tensor


Grams = dict[str, Gram]
#: What a network reads: one tensor (N, ...), or one for every input.
Inputs = Tensor | Sequence[Tensor]

#: A layer with more inputs than this, kernel included, has a covariance too large to gather and to solve.
MAX_GRAM = 8192
#: Rows of such a layer's dual problem.
DUAL_ROWS = 4096
#: After a first fit to all targets, those beyond the bend of a rectifier follow the prediction this often.
RECTIFIER_ROUNDS = 3
UNBOUNDED = (-math.inf, math.inf)


@torch.no_grad()
def gather_grams(
    module: nn.Module, graph: LayerGraph, images: Inputs, *, rows: int = 30_000, seed: int = 0, batch: int = 250
) -> Grams:
    """Mean and covariance of the input patches of every consumer layer of the unpruned network.

    images: normalised. About `rows` patches per layer, at random positions of every image. Layers with
    more than MAX_GRAM inputs are left out, with a warning: only the faithful refit reaches them.
    """
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, list[Any]] = {}

    def read(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Tensor]) -> None:
            (x,) = args
            patches = _patches(layer, x, _sample(layer, x, math.ceil(rows / count_of(images)), generator))
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
    readers = {name: layer for name, layer in readers.items() if _refittable(layer)}
    large = [name for name in readers if _weight(module, name)[0].numel() > MAX_GRAM]
    if large:
        warnings.warn(f"too many inputs for the fast refit, which leaves out {', '.join(large)}", stacklevel=2)
    handles = [layer.register_forward_pre_hook(read(name)) for name, layer in readers.items() if name not in large]
    with eval_mode(module):
        for chunk in batches(images, batch):
            module(*chunk)
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
        rows, mean = gram.covariance.index_select(0, here), gram.mean.double()
        intercept = batch_norms.get(name) is not None or module.get_submodule(name).bias is not None
        if not intercept:  # no constant can make up for the mean: least squares through the origin
            rows = rows + torch.outer(mean[here], mean)
        square = rows.index_select(1, here)
        factor = _factor(square, ridge * float(square.diagonal().mean()))
        change = torch.cholesky_solve(rows.index_select(1, gone) @ lost, factor)
        shift = mean[gone] @ lost - mean[here] @ change
        _write(sliced, name, batch_norms.get(name), change, shift)


@torch.no_grad()
def refit_faithful(
    sliced: nn.Module,
    module: nn.Module,
    graph: LayerGraph,
    kept: Kept,
    images: Inputs,
    *,
    rows_per_layer: int = 30_000,
    ridge: float = 1e-4,
    seed: int = 0,
) -> None:
    """Refit layer by layer, in network order, on the sliced network's own inputs; writes into `sliced`.

    Both networks run in lock-step over `images`. A layer's target is what the unpruned network has at
    the same positions after the batch-norm, the shortcut's error included, so that the sum matches (He et al., ICCV
    2017, section 3.2). Where a rectifier follows, an output only has to lie on the right side of its bend (Zhang et
    al., TPAMI 2016, section 2.2): solved by a few rounds in which such targets follow the prediction.
    A layer that is called at several places, or shares its weights, keeps them: a refit for one would spoil the others.
    """
    axes = kept_axes(graph, kept)
    touched = {name.rsplit(".", depth)[0] for name in axes for depth in range(name.count(".") + 1)}
    generator = torch.Generator().manual_seed(seed)
    shared = shared_tensors(sliced)
    with eval_mode(module), eval_mode(sliced):
        run = _Lockstep(module, sliced, images)
        for node in run.nodes:
            run.unpruned(node)
            once = node.op == "call_module" and run.calls[node.target] == 1
            layer = sliced.get_submodule(str(node.target)) if once else None
            refittable = layer is not None and _refittable(layer) and not holds_any(layer, shared)
            if refittable and run.differs(node.all_input_nodes[0]):
                out = axes.get(str(node.target), KeptAxes()).out
                channels = None if out is None else torch.from_numpy(out)
                _fit(run, node, channels, rows=rows_per_layer, generator=generator, ridge=ridge)
            run.pruned(node, touched=node.op in ("call_module", "get_attr") and str(node.target) in touched)


class _Lockstep:
    """The unpruned and the pruned network, node by node, over chunks of images.

    A chunk is what both networks know by now: {node of the unpruned network: value}. What no later node reads is
    dropped.
    """

    CHUNK = 250  # images: few enough that the allocator reuses the memory of a layer's values

    def __init__(self, module: nn.Module, sliced: nn.Module, images: Inputs) -> None:
        self.module, self.sliced = module, sliced
        examples = [part[:1] for part in ((images,) if isinstance(images, Tensor) else images)]
        self._first, self._second = (fx.Interpreter(trace_fx(each, examples)[0]) for each in (module, sliced))
        nodes, twins = (list(each.graph.nodes) for each in (self._first, self._second))
        if [node.op for node in nodes] != [node.op for node in twins]:
            raise UserError("the network's forward takes another way once it is pruned: does it count channels?")
        self._twin = dict(zip(nodes, twins, strict=True))
        self.calls = Counter(node.target for node in nodes if node.op == "call_module")
        self._last_reader = {source: node for node in nodes for source in node.all_input_nodes}
        self.nodes = [node for node in nodes if node.op not in ("placeholder", "output")]
        sources = [node for node in nodes if node.op == "placeholder"]
        images = [_channels_last(part) for part in ((images,) if isinstance(images, Tensor) else images)]
        chunks = [dict(zip(sources, chunk, strict=True)) for chunk in batches(images, self.CHUNK)]
        self.chunks: list[tuple[dict[fx.Node, Any], dict[fx.Node, Any]]] = [(chunk, chunk.copy()) for chunk in chunks]

    def differs(self, node: fx.Node) -> bool:
        if all(a[node] is b[node] for a, b in self.chunks):
            return False
        return any(a[node].shape != b[node].shape or not torch.equal(a[node], b[node]) for a, b in self.chunks)

    def unpruned(self, node: fx.Node) -> None:
        for first, second in self.chunks:
            shared = [source for source in node.all_input_nodes if first[source] is second[source]]
            if len(shared) < len(node.all_input_nodes):  # an addition in place would be made twice
                second.update({source: copy.deepcopy(first[source]) for source in shared})
            first[node] = self._unpruned_value(node, first)

    def pruned(self, node: fx.Node, *, touched: bool) -> None:
        """touched: whether the node's layer has other weights than the unpruned network's; where it has not, and reads
        the very same values, it gives the same."""
        for first, second in self.chunks:
            same = not touched and all(first[source] is second[source] for source in node.all_input_nodes)
            second[node] = first[node] if same else self._pruned_value(node, second)
        for chunk in self.chunks:
            for source in node.all_input_nodes:
                if self._last_reader[source] is node:
                    for values in chunk:
                        values.pop(source, None)

    def both(self, node: fx.Node, chunk: tuple[dict[fx.Node, Any], dict[fx.Node, Any]]) -> tuple[Tensor, Tensor]:
        """A node's values in both networks; a shortcut without weights may be read before its turn."""
        first, second = chunk
        if node in second:
            return first[node], second[node]
        return self._unpruned_value(node, first), self._pruned_value(node, second)

    def _unpruned_value(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        return _value(self._first, node, values)

    def _pruned_value(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        twins = {self._twin[source]: values[source] for source in node.all_input_nodes}
        return _value(self._second, self._twin[node], twins)

    def is_of_images(self, node: fx.Node) -> bool:
        """Whether a node's value, if it is known, is no parameter but has as many images as the first chunk."""
        known = self.chunks[0][0]
        count = len(next(value for value in known.values() if isinstance(value, Tensor)))
        value = known.get(node)
        return node.op != "get_attr" and (not isinstance(value, Tensor) or value.dim() > 0 and len(value) == count)

    def can_be_read(self, node: fx.Node) -> bool:
        """Whether both values of a node are known, or follow from known ones without weights."""
        known = self.chunks[0][1]
        if node in known:
            return True
        part = self.module.get_submodule(str(node.target)) if node.op == "call_module" else None
        return isinstance(part, nn.Identity | ChannelMap) and all(source in known for source in node.all_input_nodes)


def _value(interpreter: fx.Interpreter, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """What a node gives for the values of its sources; `view` is given them with channels first."""
    interpreter.env = values
    try:
        return interpreter.run_node(node)
    except RuntimeError as error:
        if "view size" not in str(error):
            raise
    for source in node.all_input_nodes:
        if isinstance(values[source], Tensor):
            values[source] = values[source].contiguous()
    return interpreter.run_node(node)


def _channels_last(images: Tensor) -> Tensor:
    """Where there are channels: in the layout that convolutions are faster on."""
    return images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images


def _fit(
    run: _Lockstep, node: fx.Node, out: Tensor | None, *, rows: int, generator: torch.Generator, ridge: float
) -> None:
    """Least squares for one layer of `run.sliced`; out: its output channels that are left, None for all."""
    name, source = str(node.target), node.all_input_nodes[0]
    layer, follow = run.sliced.get_submodule(name), _follow(node, run)
    weight = _weight(run.sliced, name).flatten(1)  # (O, K)
    scale, offset = torch.ones(len(weight)), torch.zeros(len(weight))
    if follow.batch_norm is not None:
        scale, offset = batch_norm_affine(run.sliced.get_submodule(follow.batch_norm))
    dual = weight.shape[1] > MAX_GRAM
    per_image = math.ceil(min(rows, DUAL_ROWS if dual else rows) / sum(len(values[source]) for _, values in run.chunks))
    parts = []
    for chunk in run.chunks:
        positions = _sample(layer, chunk[1][source], per_image, generator)
        patches = _patches(layer, chunk[1][source], positions)
        goal = _rows(chunk[0][node], positions, out, last=isinstance(layer, nn.Linear)) * scale + offset
        now = F.linear(patches, weight, layer.bias if isinstance(layer.bias, Tensor) else None) * scale + offset
        if follow.shortcut is not None:
            wanted, present = run.both(follow.shortcut, chunk)
            last = isinstance(layer, nn.Linear)
            goal += _rows(wanted, positions, out, last=last)
            now += _rows(present, positions, None, last=last)
        parts.append((patches, goal, now))
    patches, goal, now = (torch.cat(values) for values in zip(*parts, strict=True))  # (R, K), (R, O), (R, O)
    del parts
    # a scale so small that nothing can be made up for is not divided by
    divisor = torch.where(scale.abs() <= 1e-3 * scale.abs().max(), torch.inf, scale)
    intercept = isinstance(layer.bias, Tensor) or follow.batch_norm is not None
    mean = patches.mean(0) if intercept else torch.zeros(patches.shape[1])
    patches -= mean
    gram = patches @ patches.T if dual else patches.T @ patches
    factor = _factor(gram.double() / len(patches), ridge * float(patches.square().mean()))
    low, high = follow.bounds
    aim = goal
    for _ in range(1 + RECTIFIER_ROUNDS if follow.bounds != UNBOUNDED else 1):
        error = (aim - now) / divisor
        shift = error.mean(0) if intercept else torch.zeros(error.shape[1])
        centred = (error - shift) / len(patches)
        if dual:
            change = patches.T @ torch.cholesky_solve(centred.double(), factor).float()
        else:
            change = torch.cholesky_solve((patches.T @ centred).double(), factor).float()
        predicted = now + (patches @ change + shift) * scale
        aim = torch.where(goal <= low, predicted.clamp(max=low), goal)
        aim = torch.where(goal >= high, predicted.clamp(min=high), aim)
    _write(run.sliced, name, follow.batch_norm, change, shift - mean @ change)
    if follow.batch_norm is not None:
        bias = layer.bias if isinstance(layer.bias, Tensor) else None
        outputs = F.linear(patches + mean, _weight(run.sliced, name).flatten(1), bias)
        _absorb(run.sliced.get_submodule(follow.batch_norm), outputs)


@dataclass(frozen=True)
class _Follow:
    """What comes right after a layer: a batch-norm; the other side of an addition, if that can be read by now; the
    values outside of which the following activation is flat."""

    batch_norm: str | None
    shortcut: fx.Node | None
    bounds: tuple[float, float] = UNBOUNDED


def _follow(node: fx.Node, run: _Lockstep) -> _Follow:
    batch_norm: str | None = None
    shortcut: fx.Node | None = None
    current = node
    while len(readers(current)) == 1:
        (user,) = readers(current)
        part = run.module.get_submodule(str(user.target)) if user.op == "call_module" else None
        alone = run.calls[user.target] == 1  # one that others use, too, is not changed for this layer
        if isinstance(part, BATCH_NORMS) and alone and batch_norm is None and shortcut is None:
            batch_norm = str(user.target)
            act = getattr(part, "act", None)  # of a class that has its activation inside
            if isinstance(act, nn.ReLU | nn.ReLU6):
                return _Follow(batch_norm, shortcut, (0.0, 6.0 if isinstance(act, nn.ReLU6) else math.inf))
            if act is not None and not isinstance(act, nn.Identity):
                break
        elif user.target in (operator.add, operator.iadd, torch.add) and shortcut is None:
            others = [source for source in user.all_input_nodes if source is not current]
            if len(others) != 1 or not run.can_be_read(others[0]) or not run.is_of_images(others[0]):
                break
            (shortcut,) = others
        elif isinstance(part, nn.ReLU) or user.target in (F.relu, torch.relu):
            return _Follow(batch_norm, shortcut, (0.0, math.inf))
        elif isinstance(part, nn.ReLU6):
            return _Follow(batch_norm, shortcut, (0.0, 6.0))
        elif not isinstance(part, nn.Identity | nn.Dropout):
            break
        current = user
    return _Follow(batch_norm, shortcut)


def _absorb(norm: nn.Module, inputs: Tensor) -> None:
    """Make the batch-norm's statistics those of `inputs` (R, O) and keep its function: re-estimating them later then
    takes nothing of the refit back."""
    scale, offset = batch_norm_affine(norm)
    assert isinstance(norm, BATCH_NORMS) and norm.running_var is not None and norm.running_mean is not None
    if not norm.affine or len(inputs) < 2:
        return  # without weights of its own it cannot keep its function; one row has no variance
    norm.running_mean.copy_(inputs.mean(0))
    norm.running_var.copy_(inputs.var(0))
    norm.weight.copy_(scale * (norm.running_var + norm.eps).sqrt())
    norm.bias.copy_(offset + scale * norm.running_mean)


def _refittable(layer: nn.Module) -> bool:
    known = isinstance(layer, nn.Linear) or (isinstance(layer, (*CONVS, *TRANSPOSED)) and layer.groups == 1)
    return known and not has_computed_weight(layer)


def _weight(module: nn.Module, name: str) -> Tensor:
    """Outputs first: a transposed convolution's as those of the plain convolution of `_laid_out`."""
    layer = module.get_submodule(name)
    weight = plain_weight(layer, name)
    return _turned(weight).transpose(0, 1) if isinstance(layer, TRANSPOSED) else weight


def _turned(weight: Tensor) -> Tensor:
    """A kernel from its end to its beginning."""
    return weight.flip(*range(2, weight.dim()))


def _factor(gram: Tensor, penalty: float) -> Tensor:
    """Cholesky factor of gram + penalty on its diagonal, (K, K)."""
    gram = gram.clone()
    gram.diagonal().add_(penalty + 1e-12)
    try:
        return torch.linalg.cholesky(gram)
    except torch.linalg.LinAlgError:
        raise UserError("a layer's values are not finite or far too large: such weights have no refit") from None


def _write(sliced: nn.Module, name: str, batch_norm: str | None, change: Tensor, shift: Tensor) -> None:
    """Add `change` (K, O) to the weights and `shift` (O,) to the bias, or to what the batch-norm subtracts."""
    layer = sliced.get_submodule(name)
    weight = plain_weight(layer, name)
    added = change.T.reshape(_weight(sliced, name).shape).to(weight.dtype)
    weight += _turned(added).transpose(0, 1) if isinstance(layer, TRANSPOSED) else added
    if isinstance(layer.bias, Tensor):
        layer.bias += shift.to(layer.bias.dtype)
    elif batch_norm is not None:
        norm = sliced.get_submodule(batch_norm)
        assert isinstance(norm, BATCH_NORMS) and norm.running_mean is not None
        norm.running_mean -= shift.to(norm.running_mean.dtype)


def _laid_out(layer: Any, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """(what a plain convolution with the same outputs slides over, its stride): padded; for a transposed convolution
    with zeros between the pixels, too (Dumoulin and Visin, 2016, chapter 4)."""
    x = as_plane(x)
    (height, width), (sh, sw) = x.shape[2:], in_plane(layer.stride, 1)
    if isinstance(layer, CONVS):
        return padded(x, padding_of(layer, (height, width))), (sh, sw)
    spread = x.new_zeros(*x.shape[:2], (height - 1) * sh + 1, (width - 1) * sw + 1)
    spread[:, :, ::sh, ::sw] = x
    padding, (more_high, more_wide) = in_plane(layer.padding, 0), in_plane(layer.output_padding, 0)
    top, left = (reach - 1 - zeros for reach, zeros in zip(reach_of(layer), padding, strict=True))
    return F.pad(spread, (left, left + more_wide, top, top + more_high)), (1, 1)


def _out_size(layer: Any, padded: Tensor, stride: tuple[int, int]) -> tuple[int, int]:
    reach = reach_of(layer)
    height, width = ((padded.shape[2 + axis] - reach[axis]) // stride[axis] + 1 for axis in (0, 1))
    return height, width


def _sample(layer: nn.Module, x: Tensor, per_image: int, generator: torch.Generator) -> Tensor | None:
    """Output positions to look at, (N, P) flat indices; None for a layer without positions."""
    if isinstance(layer, nn.Linear) and x.dim() == 2:
        return None
    sizes = x.shape[1:-1] if isinstance(layer, nn.Linear) else _out_size(layer, *_laid_out(layer, x[:1]))
    positions = math.prod(sizes)
    if per_image >= positions:
        return torch.arange(positions).expand(len(x), -1)
    return torch.randint(positions, (len(x), per_image), generator=generator)


def _patches(layer: Any, x: Tensor, positions: Tensor | None) -> Tensor:
    """Input patches at output positions: (N * P, C * kh * kw), in the order of the flattened weight."""
    if positions is None:
        return x
    if isinstance(layer, nn.Linear):
        return _at(x.flatten(1, -2), positions)
    (kh, kw), (dh, dw) = in_plane(layer.kernel_size, 1), in_plane(layer.dilation, 1)
    x, (sh, sw) = _laid_out(layer, x)
    _, width = _out_size(layer, x, (sh, sw))
    n, c, padded_h, padded_w = x.shape
    corner = positions // width * sh * padded_w + positions % width * sw  # (N, P)
    tap = (torch.arange(kh) * dh * padded_w)[:, None] + torch.arange(kw) * dw
    index = (torch.arange(n) * padded_h * padded_w)[:, None, None] + corner[..., None] + tap.flatten()
    pixels = x.permute(0, 2, 3, 1).reshape(-1, c).index_select(0, index.flatten())
    return pixels.view(-1, kh * kw, c).transpose(1, 2).reshape(-1, c * kh * kw)


def _rows(value: Tensor, positions: Tensor | None, channels: Tensor | None, *, last: bool = False) -> Tensor:
    """Outputs at positions, (N * P, O), of the given channels; last: those are the last axis of an image."""
    if channels is not None:
        value = value.index_select(-1 if last else 1, channels)
    if positions is None:
        return value
    return _at((value if last else value.movedim(1, -1)).flatten(1, -2), positions)


def _at(value: Tensor, positions: Tensor) -> Tensor:
    """Rows of `value` (N, H * W, C) at `positions` (N, P): (N * P, C)."""
    index = (torch.arange(len(value)) * value.shape[1])[:, None] + positions
    return value.reshape(-1, value.shape[-1]).index_select(0, index.flatten())


def batches(inputs: Inputs, size: int) -> Iterator[tuple[Tensor, ...]]:
    """`size` images at a time, a tensor for every input of the network."""
    parts = (inputs,) if isinstance(inputs, Tensor) else inputs
    return zip(*(part.split(size) for part in parts), strict=True)


def count_of(inputs: Inputs) -> int:
    return len(inputs if isinstance(inputs, Tensor) else inputs[0])


@torch.no_grad()
def reestimate_batch_norm(module: nn.Module, images: Inputs, *, batch: int = 128) -> None:
    """Batch-norm statistics as the plain average over batches of nearly equal size, of `batch` images at most;
    everything else stays in eval mode. A single image leaves them: where a map is one pixel it has no variance."""
    norms = [part for part in module.modules() if isinstance(part, BATCH_NORMS) and part.track_running_stats]
    if not norms or count_of(images) < 2:
        return
    momenta = [norm.momentum for norm in norms]
    with eval_mode(module):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        parts = (images,) if isinstance(images, Tensor) else images
        even = math.ceil(count_of(images) / batch)
        for chunk in zip(*(part.tensor_split(even) for part in parts), strict=True):
            module(*chunk)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
