"""Turn a model spec into a module in eval mode, with its input shape, normalisation and weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from amc_hw.errors import UserError
from amc_hw.models.checkpoint import load_checkpoint, not_finite
from amc_hw.models.mobilenet import mobilenet_v1, mobilenet_v1_cifar
from amc_hw.models.resnet_cifar import plain20, resnet20, resnet56
from amc_hw.specs import (
    FACTORY_FORMS,
    Spec,
    call_factory,
    guess_options,
    one_line,
    parse_spec,
    positive_float,
    positive_int,
    read_options,
    unknown_name,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ModelEntry:
    """A network of ours: how to build it, the (C, H, W) it was made for, and its options with their converters."""

    build: Callable[..., nn.Module]
    input_shape: tuple[int, int, int]
    options: Mapping[str, Callable[[str], Any]] = field(default_factory=lambda: {"num_classes": positive_int})


_MOBILENET_OPTIONS = {"width": positive_float, "num_classes": positive_int}

MODELS: dict[str, ModelEntry] = {
    "mobilenet_v1": ModelEntry(mobilenet_v1, (3, 224, 224), _MOBILENET_OPTIONS),
    "mobilenet_v1_cifar": ModelEntry(mobilenet_v1_cifar, (3, 32, 32), _MOBILENET_OPTIONS),
    "plain20": ModelEntry(plain20, (3, 32, 32)),
    "resnet20": ModelEntry(resnet20, (3, 32, 32)),
    "resnet56": ModelEntry(resnet56, (3, 32, 32)),
}


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A module in eval mode on the CPU, with what is needed to run it.

    `input_shape` is that of one input, (C, H, W) of an image, (C, L) of a signal, (L, C) of a sequence, (C,) of a
    vector; `mean` and `std` are of images in [0, 1] by channel, of what else is read by its first or its last axis, or
    one number; `example_inputs` are tensors with a batch of 1; `checkpoint_sha256` is null for a module with random
    weights; `file` is the spec with the path at which its file was found, where that is another; `asked` is the input
    shape where the caller named it; `assumed`: which of `mean` and `std` are ImageNet's because a factory of the
    user's names none.
    """

    spec: str
    module: nn.Module
    input_shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    example_inputs: tuple[Tensor, ...]
    checkpoint_sha256: str | None
    file: str | None = None
    asked: tuple[int, ...] | None = None
    assumed: tuple[str, ...] = ()

    @property
    def found(self) -> str:
        """The spec that makes this model from the working directory."""
        return self.file or self.spec

    def weights_sha256(self) -> str:
        """Of the checkpoint's file; of the weights themselves where they came from none."""
        if self.checkpoint_sha256 is not None:
            return self.checkpoint_sha256
        digest = hashlib.sha256()
        for name, value in sorted(self.module.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().double().numpy().tobytes())
        return digest.hexdigest()

    def normalised(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1], or what else it reads, as the module wants them."""

        def along(values: tuple[float, ...]) -> Tensor:
            first = len(values) in (1, self.input_shape[0])  # else of a sequence's last axis
            return torch.tensor(values).view(-1, *[1] * (len(self.input_shape) - 1) if first else [])

        return (images - along(self.mean)) / along(self.std)


@dataclass(frozen=True)
class _Built:
    """What a source knows of the module it made; None where it leaves that to the caller."""

    module: nn.Module
    input_shape: Sequence[int] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    example_inputs: tuple[Tensor, ...] | None = None


def load_model(
    spec: str | Spec,
    *,
    input_shape: Sequence[int] | None = None,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> LoadedModel:
    """Build the model that `spec` names: one of ours, `torchvision:NAME`, `timm:NAME`, or a factory.

    Args:
        spec: for instance `mobilenet_v1?width=0.5`, `torchvision:resnet18?num_classes=10`, `nets.py:factory`.
        input_shape: such as (C, H, W) or (1, C, H, W), in place of the model's own.
        checkpoint: a file of weights, loaded strictly; without it the weights are random, the same for one `seed`.
        seed: for the random weights; the global random state is left alone.
        mean, std: per channel for images in [0, 1], or one value for all; in place of the model's own. A model
            that names none gets ImageNet's for three channels, and none (0 and 1) for any other number.

    Raises:
        UserError: unknown model or option, a factory that fails or gives no module, no input shape, an input that
            the model does not take, a checkpoint that cannot be read or does not fit.
    """
    spec = parse_spec(spec)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the GPUs
        built = _build(spec)
        module = built.module.cpu().eval()
        digest = None if checkpoint is None else load_checkpoint(module, checkpoint)
        _make_plain(module)
        if checkpoint is None and (bad := not_finite(module, module.state_dict())):
            raise UserError(f"{str(spec)!r} has weights that are no finite numbers: {bad[0]}")
        shape, inputs = _inputs(spec, built, input_shape)
    fallback = (IMAGENET_MEAN, IMAGENET_STD) if len(shape) == shape[0] == 3 else ((0.0,), (1.0,))
    loaded_mean = _per_channel("mean", mean, built.mean, fallback[0], shape=shape)
    loaded_std = _per_channel("std", std, built.std, fallback[1], shape=shape)
    if not all(value > 0 for value in loaded_std):
        raise UserError(f"std of {str(spec)!r} must be above 0, not {loaded_std}")
    asked = None if input_shape is None else shape
    unsaid = (("mean", mean, built.mean), ("std", std, built.std)) if has_own_weights(str(spec)) else ()
    assumed = tuple(name for name, *given in unsaid if given == [None, None] and fallback[0] == IMAGENET_MEAN)
    return LoadedModel(str(spec), module, shape, loaded_mean, loaded_std, inputs, digest, asked=asked, assumed=assumed)


def _make_plain(module: nn.Module) -> None:
    """Weights that are computed of others, as by weight norms, become parameters: such can be pruned."""
    for part in module.modules():
        if parametrize.is_parametrized(part):
            for name in list(part.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(part, name)
        for hook in list(part._forward_pre_hooks.values()):  # as they were made before PyTorch 1.9
            if isinstance(hook, WeightNorm):
                remove_weight_norm(part, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(part, hook.name)


def _build(spec: Spec) -> _Built:
    if spec.name in MODELS:
        if spec.path is not None:
            raise UserError(f"{spec.name} takes no ':PATH', got {str(spec)!r}")
        entry = MODELS[spec.name]
        return _Built(entry.build(**read_options(spec, entry.options)), entry.input_shape)
    if spec.name in _LIBRARIES:
        if spec.path is None:
            raise UserError(f"{spec.name!r} does not say which model: write {spec.name}:NAME")
        return _LIBRARIES[spec.name](spec)
    return _from_factory(spec)


def _from_torchvision(spec: Spec) -> _Built:
    import torchvision

    options = guess_options(spec)
    segmenting = torchvision.models.list_models(module=torchvision.models.segmentation)
    names = [*torchvision.models.list_models(module=torchvision.models), *segmenting]
    if spec.path not in names:
        raise unknown_name("torchvision model", str(spec.path), names, forms=FACTORY_FORMS)
    if spec.path in segmenting:
        options.setdefault("weights_backbone", None)  # which it would fetch
    if "weights" in options:
        raise UserError(f"{str(spec)!r}: weights come from a file, with --checkpoint")
    size = options.get("image_size", 299 if spec.path == "inception_v3" else 224)
    if spec.path in ("googlenet", "inception_v3"):
        options.setdefault("init_weights", True)  # its default, which it warns about when left unsaid
    try:
        module = torchvision.models.get_model(spec.path, weights=None, **options)
    except Exception as exc:
        raise UserError(f"{str(spec)!r} cannot be built: {one_line(exc)}") from exc
    return _Built(module, (3, size, size))


def _from_timm(spec: Spec) -> _Built:
    try:
        import timm  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as exc:
        raise UserError(f"{str(spec)!r} needs timm: pip install timm") from exc
    if ":" not in (spec.path or "") and not timm.is_model(spec.path or ""):
        raise unknown_name("timm model", spec.path or "", timm.list_models(), listed=False)
    try:
        module: Any = timm.create_model(spec.path or "", **{**guess_options(spec), "pretrained": False})
    except Exception as exc:
        raise UserError(f"{str(spec)!r} cannot be built: {one_line(exc)}") from exc
    config = module.pretrained_cfg
    return _Built(module, config.get("input_size"), config.get("mean"), config.get("std"))


_LIBRARIES: dict[str, Callable[[Spec], _Built]] = {"torchvision": _from_torchvision, "timm": _from_timm}


def has_own_weights(spec: str) -> bool:
    """Whether the model comes from a user's factory, which may load a trained network itself."""
    name = parse_spec(spec).name
    return name not in MODELS and name not in _LIBRARIES


def _from_factory(spec: Spec) -> _Built:
    known = [*MODELS, *_LIBRARIES]
    made = call_factory(spec, kind="model", known=known)
    module, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    said = {key: getattr(module, key, None) for key in ("input_shape", "mean", "std")}
    while hasattr(module, "_orig_mod") or isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        module = getattr(module, "_orig_mod", None) or module.module  # compiled, or for several devices
    if not isinstance(module, nn.Module):
        raise UserError(f"{str(spec)!r} returned a {type(made).__name__}, not a module or (module, example inputs)")
    if inputs is not None:
        inputs = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
        if not inputs or not all(isinstance(x, Tensor) and x.dim() > 0 for x in inputs):
            raise UserError(f"{str(spec)!r} returned example inputs that are not tensors")
        inputs = tuple(x[:1].cpu() for x in inputs)
    shape, mean, std = (getattr(module, key, None) if value is None else value for key, value in said.items())
    return _Built(module, shape, mean, std, inputs)


def _inputs(spec: Spec, built: _Built, input_shape: Sequence[int] | None) -> tuple[tuple[int, ...], tuple[Tensor, ...]]:
    """The shape of one input, and inputs that the module takes."""
    wanted = input_shape if input_shape is not None else built.input_shape
    shapes = [] if wanted is None else _shapes(spec, wanted)
    if built.example_inputs is not None:
        own = tuple(built.example_inputs[0].shape[1:])
        if not 1 <= len(own) <= 3:
            raise UserError(f"the example input of {str(spec)!r} has {len(own) + 1} axes: two to four are supported")
        if input_shape is None or own in shapes:
            _check_forward(spec, built.module, built.example_inputs)
            return own, built.example_inputs
    if wanted is None:
        raise UserError(f"the input shape of {str(spec)!r} is not known: give --input 1x3x224x224")
    failed: list[str] = []
    for shape in shapes:
        inputs = (torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)),)
        try:
            _check_forward(spec, built.module, inputs)
            return shape, inputs
        except UserError as error:
            failed.append(str(error))
    raise UserError("; ".join(dict.fromkeys(failed)))


def _shapes(spec: Spec, wanted: Sequence[int]) -> list[tuple[int, ...]]:
    """Of one input, what `wanted` may mean: the first of its sizes is perhaps a batch of 1."""
    try:
        sizes = tuple(int(size) for size in wanted)
    except (TypeError, ValueError):
        sizes = ()
    with_batch = [sizes[1:]] if len(sizes) > 1 and sizes[0] == 1 else []
    shapes = ([sizes] if len(sizes) <= 3 else []) + with_batch
    if not sizes or min(sizes) < 1 or not shapes or len(shapes[-1]) > 3:
        raise UserError(f"input of {str(spec)!r} must be like 1x3x224x224, or 9x128 of a signal, not {wanted!r}")
    return shapes


def _check_forward(spec: Spec, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    try:
        with torch.no_grad():
            module(*inputs)
    except Exception as exc:
        shapes = " and ".join("x".join(map(str, x.shape)) for x in inputs)
        raise UserError(f"{str(spec)!r} does not take input {shapes}: {one_line(exc)}") from exc


def _per_channel(name: str, *candidates: Sequence[float] | None, shape: tuple[int, ...]) -> tuple[float, ...]:
    """The first that is given: of an image a value for every channel, of what else is read one for all, or for every
    element of its first or its last axis."""
    values = next(candidate for candidate in candidates if candidate is not None)
    try:
        numbers = tuple(torch.as_tensor(values, dtype=torch.float64).flatten().tolist())
    except (TypeError, ValueError, RuntimeError):
        numbers = ()
    if len(shape) == 3 and len(numbers) == 1:
        numbers *= shape[0]
    known = [shape[0]] if len(shape) == 3 else sorted({1, shape[0], shape[-1]})
    if len(numbers) not in known or not all(map(math.isfinite, numbers)):
        counts = " or ".join(map(str, known))
        raise UserError(f"{name} must have {counts} finite values, one for each channel of the input, not {values!r}")
    return numbers
