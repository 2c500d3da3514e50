"""Least squares after slicing: every layer that lost inputs learns to give its original output from those it has."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from amc_hw.graph import LayerGraph
from amc_hw.prune import Kept, KeptAxes, kept_axes
from amc_hw.tracing import trace_fx

EXP: dict = {}


@dataclass(frozen=True, eq=False)
class Gram:
    mean: Tensor
    covariance: Tensor | None
    rows: Tensor | None = None


Grams = dict[str, Gram]


@torch.no_grad()
def gather_grams(module, graph, images, *, rows=30_000, max_gram=8192, seed=0, batch=250) -> Grams:
    layers = _refittable(module, graph)
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, list] = {}

    def read(name):
        def hook(layer, args):
            (x,) = args
            positions = _sample(layer, x, math.ceil(rows / len(images)), generator)
            patches = _patches(layer, x, positions)
            if name not in sums:
                k = patches.shape[1]
                sums[name] = [patches.mean(0), torch.zeros(k, dtype=torch.float64), torch.zeros(k, k, dtype=torch.float64), 0]
            total = sums[name]
            patches -= total[0]
            total[1] += patches.sum(0)
            total[2] += patches.T @ patches
            total[3] += len(patches)
        return hook

    handles = [module.get_submodule(n).register_forward_pre_hook(read(n)) for n in layers]
    with _eval_mode(module):
        for chunk in images.split(batch):
            module(chunk)
    for h in handles:
        h.remove()
    out = {}
    for name, (origin, first, second, count) in sums.items():
        first = first / count
        cov = second / count - torch.outer(first, first)
        out[name] = Gram(origin + first, cov)
    return out


@torch.no_grad()
def refit_fast(sliced, module, graph, kept, grams, *, ridge=1e-4):
    bns = {l.module: l.batch_norm for l in graph.layers if l.module}
    for name, axes in kept_axes(graph, kept).items():
        if axes.into is None or name not in grams:
            continue
        gram = grams[name]
        layer = module.get_submodule(name)
        weight = layer.weight.flatten(1).double()
        if axes.out is not None:
            weight = weight[torch.from_numpy(axes.out)]
        taps = layer.weight[0, 0].numel()
        stays = torch.zeros(layer.weight.shape[1], dtype=torch.bool)
        stays[torch.from_numpy(axes.into)] = True
        stays = stays.repeat_interleave(taps)
        s, r = stays.nonzero()[:, 0], (~stays).nonzero()[:, 0]
        lost = weight[:, r].T
        cs = gram.covariance.index_select(0, s)
        d = _solve(cs.index_select(1, s), cs.index_select(1, r) @ lost, ridge)
        shift = gram.mean[r] @ lost - gram.mean[s] @ d
        _write(sliced, name, bns.get(name), d, shift)


@torch.no_grad()
def refit_faithful(sliced, module, graph, kept, images, *, rows_per_layer=30_000, ridge=1e-4, seed=0):
    axes = kept_axes(graph, kept)
    generator = torch.Generator().manual_seed(seed)
    per_image = math.ceil(rows_per_layer / len(images))
    with _eval_mode(module), _eval_mode(sliced):
        first, second = fx.Interpreter(trace_fx(module)), fx.Interpreter(trace_fx(sliced))
        nodes = list(zip(first.module.graph.nodes, second.module.graph.nodes, strict=True))
        order = {a: i for i, (a, _) in enumerate(nodes)}
        twin = {a: b for a, b in nodes}
        first.args_iter, second.args_iter = iter([images]), iter([images])
        last = {}
        for a, b in nodes:
            for u in a.all_input_nodes:
                last[u] = a
        dead: dict = {}
        for k, v in last.items():
            dead.setdefault(v, []).append(k)
        for a, b in nodes:
            assert a.name == b.name
            if a.op == "output":
                break
            first.env[a] = first.run_node(a)
            layer = module.get_submodule(a.target) if a.op == "call_module" else None
            if isinstance(layer, nn.Conv2d | nn.Linear) and (getattr(layer, "groups", 1) == 1 or EXP.get("dw")):
                small = sliced.get_submodule(a.target)
                x = second.env[b.args[0]]
                xo = first.env[a.args[0]]
                if not (x.shape == xo.shape and torch.equal(x, xo)) :
                    follow = _follow(a, module, order)
                    positions = _sample(small, x, per_image, generator)
                    outs = axes.get(a.target, KeptAxes()).out
                    outs = None if outs is None else torch.from_numpy(outs)
                    target = _rows(first.env[a], positions, outs)
                    e = lambda t: t
                    g, h = torch.ones(target.shape[1]), torch.zeros(target.shape[1])
                    if follow["bn"]:
                        bn = sliced.get_submodule(follow["bn"])
                        g = bn.weight / (bn.running_var + bn.eps).sqrt()
                        h = bn.bias - g * bn.running_mean
                    target = target * g + h
                    other = 0
                    if follow["other"] is not None and EXP.get("shortcut", True):
                        o = follow["other"]
                        target += _rows(first.env[o], positions, outs)
                        other = _rows(second.env[twin[o]], positions, None)
                        full = True
                    else:
                        full = follow["other"] is None
                    safe = torch.where(g.abs() < 1e-3 * g.abs().max(), torch.inf, g)
                    if getattr(small, "groups", 1) > 1:
                        _refit_dw(sliced, a.target, follow["bn"], small, x, positions, target, g, h, safe, ridge)
                    else:
                        patches = _patches(small, x, positions)
                        w = small.weight.flatten(1).T
                        now = patches @ w
                        if small.bias is not None:
                            now += small.bias
                        now = now * g + h + other
                        mean = patches.mean(0)
                        patches = patches - mean
                        gram = (patches.T @ patches).double() / len(patches)
                        gram.diagonal().add_(ridge * gram.diagonal().mean() + 1e-12)
                        chol = torch.linalg.cholesky(gram)
                        d = torch.zeros(w.shape, dtype=torch.float64)
                        shift = torch.zeros(w.shape[1], dtype=torch.float64)
                        lo, hi = follow["bounds"] if full and EXP.get("relu") else (None, None)
                        its = EXP.get("its", 8) if lo is not None else 1
                        for it in range(its):
                            pred = now + (patches @ d.float() + (shift + mean.double() @ d).float()) * g if it else now
                            t = target
                            if lo is not None:
                                t = torch.where(target <= lo, pred.clamp(max=lo), target)
                                if hi is not None:
                                    t = torch.where(target >= hi, pred.clamp(min=hi), t)
                            e = (t - now) / safe
                            me = e.mean(0)
                            d = torch.cholesky_solve((patches.T @ (e - me)).double() / len(patches), chol)
                            shift = me.double() - mean.double() @ d
                        _write(sliced, a.target, follow["bn"], d, shift)
            second.env[b] = second.run_node(b)
            for k in dead.get(a, []):
                first.env.pop(k, None)
                second.env.pop(twin[k], None)


def _refit_dw(sliced, name, bn, small, x, positions, target, g, h, safe, ridge):
    c = x.shape[1]
    patches = _patches(small, x, positions).view(-1, c, small.weight[0, 0].numel()).transpose(0, 1)  # (C, R, T)
    w = small.weight.flatten(1)  # (C, T)
    now = torch.einsum("crt,ct->rc", patches, w) * g + h
    e = ((target - now) / safe)
    mean = patches.mean(1)
    me = e.mean(0)
    p = patches - mean[:, None]
    gram = (p.transpose(1, 2) @ p).double() / p.shape[1]
    tr = gram.diagonal(dim1=1, dim2=2).mean(1)
    gram.diagonal(dim1=1, dim2=2).add_((ridge * tr + 1e-12)[:, None])
    cross = torch.einsum("crt,rc->ct", p, e - me).double() / p.shape[1]
    d = torch.linalg.solve(gram, cross[..., None])[..., 0]  # (C,T)
    shift = me.double() - (mean.double() * d).sum(1)
    _write(sliced, name, bn, d.T, shift)


def _follow(node, module, order):
    bn = other = bounds = None
    current = node
    while len(current.users) == 1:
        (user,) = current.users
        part = module.get_submodule(user.target) if user.op == "call_module" else None
        if isinstance(part, nn.BatchNorm2d) and bn is None and other is None:
            bn = user.target
        elif isinstance(part, nn.Identity | nn.Dropout):
            pass
        elif user.target in (operator.add, operator.iadd, torch.add) and other is None:
            others = [n for n in user.all_input_nodes if n is not current]
            if len(others) != 1 or order[others[0]] > order[node]:
                other = None
                return {"bn": bn, "other": None, "bounds": (None, None)}
            other = others[0]
        elif isinstance(part, nn.ReLU) or user.target in (F.relu, torch.relu):
            bounds = (0.0, None)
            break
        elif isinstance(part, nn.ReLU6):
            bounds = (0.0, 6.0)
            break
        else:
            break
        current = user
    return {"bn": bn, "other": other, "bounds": bounds or (None, None)}


def _solve(gram, cross, ridge):
    gram = gram.clone()
    gram.diagonal().add_(ridge * gram.diagonal().mean() + 1e-12)
    return torch.cholesky_solve(cross, torch.linalg.cholesky(gram))


def _write(sliced, name, bn, d, shift):
    layer = sliced.get_submodule(name)
    layer.weight += d.T.reshape(layer.weight.shape).to(layer.weight.dtype)
    if layer.bias is not None:
        layer.bias += shift.to(layer.bias.dtype)
    elif bn is not None:
        sliced.get_submodule(bn).running_mean -= shift.float()


def _refittable(module, graph):
    names = {}
    for g in graph.groups:
        for n in g.modules("consumer"):
            m = module.get_submodule(n)
            if isinstance(m, nn.Linear) or isinstance(m, nn.Conv2d) and m.groups == 1:
                names[n] = m
    return names


def _out_size(layer, x):
    return tuple(
        (size + 2 * pad - dil * (k - 1) - 1) // st + 1
        for size, pad, dil, k, st in zip(x.shape[2:], layer.padding, layer.dilation, layer.kernel_size, layer.stride)
    )


def _sample(layer, x, per_image, generator):
    if isinstance(layer, nn.Linear):
        return None
    h, w = _out_size(layer, x)
    if per_image >= h * w:
        return torch.arange(h * w).expand(len(x), -1)
    return torch.randint(h * w, (len(x), per_image), generator=generator)


def _patches(layer, x, positions):
    if positions is None:
        return x.flatten(0, -2)
    h, w = _out_size(layer, x)
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    ph, pw = layer.padding
    x = F.pad(x, (pw, pw, ph, ph)) if ph or pw else x
    n, c, hp, wp = x.shape
    corner = positions // w * sh * wp + positions % w * sw
    tap = (torch.arange(kh) * dh * wp)[:, None] + torch.arange(kw) * dw
    index = (torch.arange(n) * hp * wp)[:, None, None] + corner[..., None] + tap.flatten()
    pix = x.permute(0, 2, 3, 1).reshape(-1, c).index_select(0, index.flatten())
    return pix.view(-1, kh * kw, c).transpose(1, 2).reshape(-1, c * kh * kw)


def _rows(value, positions, channels):
    if positions is None:
        v = value.flatten(0, -2)
        return v if channels is None else v[:, channels]
    if channels is not None:
        value = value.index_select(1, channels)
    n, c, h, w = value.shape
    index = (torch.arange(n) * h * w)[:, None] + positions
    return value.permute(0, 2, 3, 1).reshape(-1, c).index_select(0, index.flatten())


@contextmanager
def _eval_mode(module):
    flags = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, flag in flags.items():
            part.training = flag


@torch.no_grad()
def reestimate_batch_norm(module, images, *, batch=128):
    norms = [p for p in module.modules() if isinstance(p, nn.modules.batchnorm._BatchNorm) and p.track_running_stats]
    with _eval_mode(module):
        old = [p.momentum for p in norms]
        for p in norms:
            p.reset_running_stats()
            p.momentum = None
            p.train()
        for chunk in images.split(batch):
            module(chunk)
    for p, m in zip(norms, old):
        p.momentum = m
