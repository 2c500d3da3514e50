"""A module as torch.fx sees it."""

from __future__ import annotations

import copy
import inspect
import operator
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from amc_hw.errors import UserError
from amc_hw.models.channel_map import ChannelMap
from amc_hw.specs import one_line

#: As of `origin`: to import torchvision takes as long as PyTorch does, and many networks do without.
PERMUTE = ("torchvision.ops.misc", "Permute")
#: Attribute of a convolution that had several groups before it was pruned, perhaps to one.
HAS_GROUPS = "_amc_hw_has_groups"
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d)
CONVS = (nn.Conv1d, nn.Conv2d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)
Asked = set[tuple[str, tuple[int, ...]]]  #: names of nodes, and dimensions of their tensors
#: What may be asked of a tensor without a look at its values.
SIZE_METHODS = ("size", "dim", "ndimension", "numel", "is_floating_point")
SIZE_ATTRIBUTES = ("shape", "ndim", "dtype", "device", "is_cuda")
CHUNKS = (torch.chunk, "chunk")
MAKERS = ("zeros", "ones", "full", "arange", "linspace", "eye")  #: calls that make tensors of numbers alone
FACTS = (
    "device",
    "dtype",
    "is_nested",
    "is_sparse",
)  #: of tensors, the same for all inputs: keys of caches, arguments of other calls
#: As they are when torch.fx traces nothing.
_CALL, _GETATTR = nn.Module.__call__, nn.Module.__getattr__


class _Known:
    """A traced value that is a plain number where the network's code needs one: what it is for the examples."""

    tracer: Any

    def __int__(self) -> int:
        return int(self.tracer.known(self))

    def __index__(self) -> int:
        return operator.index(self.tracer.known(self))

    def __float__(self) -> float:
        return float(self.tracer.known(self))

    def __len__(self) -> int:
        return len(self.tracer.known(self, slice(0)))


class _Proxy(_Known, fx.Proxy):
    def __getattr__(self, name: str) -> Any:
        value = self.tracer.value_of(self.node) if name in FACTS else None
        return getattr(value, name) if isinstance(value, torch.Tensor) else _Attribute(self, name)


class _Attribute(_Known, fx.proxy.Attribute):
    def __getattr__(self, name: str) -> _Attribute:
        return _Attribute(self, name)


class _Tracer(fx.Tracer):
    """Takes the branches that sizes decide as they go for `examples`.

    asked: (name of a node, dimensions of its tensor) whose sizes decided something.
    """

    record_stack_traces = True
    proxy_buffer_attributes = True  # whose methods may be given sizes

    def __init__(self, examples: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.examples = list(examples)
        self.asked: Asked = set()
        self.values: dict[fx.Node, Any] = {}

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """forward(), and a traced value for every example; what else it takes keeps its default."""
        root: Any = self.root
        names = [
            each.name
            for each in inspect.signature(root.forward).parameters.values()
            if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
        ]
        names += [f"_input_{place}" for place in range(len(names), len(self.examples))]
        given = names[: len(self.examples)]
        return root.forward, [self.create_proxy("placeholder", name, (), {}) for name in given]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.known(obj))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        try:
            return super().iter(obj)
        except fx.proxy.TraceError:
            traced: Any = obj
            return iter([traced[index] for index in range(len(traced))])

    def known(self, proxy: fx.Proxy, key: Any = slice(None)) -> Any:
        """A traced value for the examples; TraceError where it depends on what is in a tensor. key: what of a shape
        is wanted."""
        node, value = proxy.node, self.value_of(proxy.node)
        if isinstance(value, torch.Tensor) and key == slice(0):
            raise fx.proxy.TraceError(f"len({node.name}) of a tensor is a number, not a traced one: use .shape[0]")
        if isinstance(value, tuple | list) and all(isinstance(part, torch.Tensor) for part in value):
            # how many parts there are; equal chunks remain as many
            sources = [] if self._is_chunks(node, value) else node.all_input_nodes
            asked: Asked | None = {(each.name, tuple(range(self._rank(each) or 0))) for each in sources}
        else:
            asked = None if isinstance(value, torch.Tensor) else sizes_asked(node, self._rank, key)
        if asked is None:
            if self._of_buffers(node):
                return value
            return super().to_bool(proxy)  # raises
        weights = {each.name for each in self.graph.nodes if each.op == "get_attr"}
        if of_images({each for each in asked if each[0] not in weights}):
            raise fx.proxy.TraceError("it computes with the number of images")
        self.asked |= asked
        return value

    def value_of(self, node: fx.Node) -> Any:
        """What a node gives for the examples."""
        with _untraced():
            for each in self.graph.nodes:
                if each not in self.values:
                    self.values[each] = self._run(each)
                if each is node:
                    break
        return self.values[node]

    def _is_chunks(self, node: fx.Node, parts: Sequence[torch.Tensor]) -> bool:
        """Whether parts are as many equal ones as the network's code wants."""
        wanted = node.kwargs.get("chunks", node.args[1] if len(node.args) > 1 else None)
        return node.target in CHUNKS and len({part.shape for part in parts}) == 1 and len(parts) == wanted

    def _of_buffers(self, node: fx.Node) -> bool:
        """Whether a node depends on buffers alone, which no training changes."""
        if node.op == "get_attr":
            return not isinstance(self.values[node], nn.Parameter)
        return node.op != "placeholder" and all(map(self._of_buffers, node.all_input_nodes))

    def _rank(self, node: fx.Node) -> int | None:
        value = self.values[node]
        return value.dim() if isinstance(value, torch.Tensor) else None

    @torch.no_grad()
    def _run(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self.examples.pop(0).clone()
        return self._interpreter.run_node(node)

    @cached_property
    def _interpreter(self) -> fx.Interpreter:
        interpreter = fx.Interpreter(self.root, garbage_collect_values=False, graph=self.graph)
        interpreter.env = self.values
        return interpreter

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        # classes derived of them, too
        if isinstance(module, nn.TransformerEncoder | nn.TransformerEncoderLayer):
            return False
        leaves = ChannelMap, *CONVS, *BATCH_NORMS, nn.LayerNorm, nn.GroupNorm, nn.Linear
        if isinstance(module, leaves) or origin(type(module)) == PERMUTE:
            return True
        return super().is_leaf_module(module, qualified_name)


@contextmanager
def _sized(tracer: fx.Tracer) -> Iterator[None]:
    """`torch.zeros(n, 1, c)` and the like of traced sizes, which PyTorch takes for tensors."""
    made = {name: getattr(torch, name) for name in MAKERS}

    def traced(call: Callable[..., Any]) -> Callable[..., Any]:
        def either(*args: Any, **kwargs: Any) -> Any:
            given = [
                each
                for part in (*args, *kwargs.values())
                for each in (part if isinstance(part, tuple | list) else [part])
            ]
            if any(isinstance(each, fx.Proxy) for each in given):
                return tracer.create_proxy("call_function", call, args, kwargs)
            return call(*args, **kwargs)

        return either

    for name, call in made.items():
        setattr(torch, name, traced(call))
    try:
        yield
    finally:
        for name, call in made.items():
            setattr(torch, name, call)


@contextmanager
def _untraced() -> Iterator[None]:
    """Modules compute, in the middle of a trace."""
    module: Any = nn.Module
    traced = module.__call__, module.__getattr__
    module.__call__, module.__getattr__ = _CALL, _GETATTR
    try:
        yield
    finally:
        module.__call__, module.__getattr__ = traced


def trace_fx(module: nn.Module, examples: Sequence[torch.Tensor]) -> tuple[fx.GraphModule, Asked]:
    """The fx graph of a module in eval mode, and what its code asked of sizes to get there.

    examples: a tensor for every input, in the order of forward()'s arguments; where the code branches on sizes, theirs
    decide. UserError where torch.fx cannot trace the module.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    if needed := [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]:
        name = type(module).__name__
        raise UserError(f"forward() of {name} needs the keyword argument {needed[0]!r}: give a factory that wraps it")
    tracer, apart = _Tracer(examples), _apart(module)
    try:
        with _sized(tracer):
            graph = tracer.trace(apart)
        return fx.GraphModule(apart, graph), tracer.asked
    except Exception as error:  # tracing runs the user's forward: anything can be raised
        frames = [(each.filename, each.lineno) for each in traceback.extract_tb(error.__traceback__)]
        reason, place = one_line(error), own_line(frames)
        raise UserError(
            f"{type(module).__name__} cannot be traced by torch.fx ({reason}{place and f', {place}'}): give a factory "
            "that returns a module whose forward() takes tensors only, by position, stays in PyTorch, and does not "
            "branch on their values"
        ) from error


def own_line(frames: Iterable[tuple[str, int | str | None]]) -> str:
    """Of (file, line), outermost first, the innermost that is the network's own code, as `at FILE:LINE`."""
    libraries = Path(torch.__file__).parent, Path(__file__).parent
    python = Path(traceback.__file__).parent  # where packages of others may lie, too
    own = [
        (Path(file), line)
        for file, line in frames
        if not any(map(Path(file).is_relative_to, libraries))
        and (not Path(file).is_relative_to(python) or "site-packages" in file)
    ]
    return f"at {own[-1][0].name}:{own[-1][1]}" if own else ""


def _apart(module: nn.Module) -> nn.Module:
    """A copy of the modules, of the same tensors: what torch.fx and forward() put into modules, caches of what was
    traced among it, is not left in the user's."""
    held = [value for part in module.modules() for value in (*own_tensors(part).values(), *vars(part).values())]
    try:
        return copy.deepcopy(module, {id(value): value for value in held if isinstance(value, torch.Tensor)})
    except Exception as error:  # of locks, files and the like there is no copy
        raise UserError(
            f"{type(module).__name__} cannot be copied ({one_line(error)}), and pruning works on copies: keep locks, "
            "files and lists of tensors with gradients out of the network"
        ) from error


def sizes_asked(node: fx.Node, rank: Callable[[fx.Node], int | None], key: Any = slice(None)) -> Asked | None:
    """The sizes that a value which is no tensor follows from; None where it depends on what is in a tensor.

    rank: of a node's tensor, None where it has none. key: what is read of a shape.
    """
    asked: Asked = set()
    for source in node.all_input_nodes:
        dims = rank(source)
        if dims is None:
            more = sizes_asked(source, rank, node.args[1] if node.target is operator.getitem else slice(None))
            if more is None:
                return None
            asked |= more
            continue
        if not asks_for_size(node):
            return None
        what = str(node.target if node.op == "call_method" else node.args[1])
        if _selects(source):
            return None
        if what == "size" and (len(node.args) > 1 or "dim" in node.kwargs):
            key = node.kwargs.get("dim", node.args[-1])
        elif what not in ("size", "shape"):
            key = slice(None) if what == "numel" else slice(0)
        read = range(dims)[key] if isinstance(key, int | slice) else range(dims)
        asked.add((source.name, (read,) if isinstance(read, int) else tuple(read)))
    return asked


def of_images(asked: Asked) -> bool:
    """Whether the number of images is among sizes of tensors that have one."""
    return any(dims == (0,) for _, dims in asked)


def _selects(node: fx.Node) -> bool:
    """Whether the shape of what a node gives depends on values."""
    name = getattr(node.target, "__name__", str(node.target))
    if name == "getitem":
        return any(
            isinstance(each, fx.Node) for each in (node.args[1] if isinstance(node.args[1], tuple) else node.args[1:])
        )
    return name in ("nonzero", "argwhere", "masked_select", "unique", "where")


def asks_for_size(node: fx.Node) -> bool:
    """Whether a node reads no values of its tensor."""
    if node.op == "call_method":
        return node.target in SIZE_METHODS
    return node.target is getattr and node.args[1] in SIZE_ATTRIBUTES


def readers(node: fx.Node) -> list[fx.Node]:
    """What reads a tensor's values."""
    return [user for user in node.users if not asks_for_size(user)]


def own_tensors(part: nn.Module) -> dict[str, torch.Tensor]:
    """A module's own parameters and buffers."""
    return {name: value for name, value in (*part._parameters.items(), *part._buffers.items()) if value is not None}


def has_computed_weight(part: nn.Module) -> bool:
    """Whether a module's weight is no parameter of its own but computed, as by `torch.nn.utils.parametrizations`."""
    return part._parameters.get("weight") is None and isinstance(getattr(part, "weight", None), torch.Tensor)


def shared_tensors(module: nn.Module) -> set[int]:
    """Ids of the tensors that several of the network's modules hold; a batch-norm's count is in none."""
    owners = Counter(id(value) for part in module.modules() for value in own_tensors(part).values() if value.dim())
    return {tensor for tensor, count in owners.items() if count > 1}


def holds_any(part: nn.Module, tensors: set[int]) -> bool:
    """Whether a module holds one of the tensors of these ids itself."""
    return any(id(value) in tensors for value in own_tensors(part).values())


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    flags = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, flag in flags.items():
            part.training = flag


def batch_norm_affine(norm: nn.Module, *, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """What a batch-norm in eval mode multiplies by and adds, (channels,) each."""
    assert isinstance(norm, BATCH_NORMS) and norm.running_var is not None and norm.running_mean is not None
    scale = (norm.running_var.to(dtype) + norm.eps).rsqrt()
    shift = torch.zeros_like(scale)
    if norm.affine:
        scale, shift = scale * norm.weight, norm.bias.to(dtype)
    return scale, shift - scale * norm.running_mean


@torch.no_grad()
def gives(layer: nn.Module, drawn: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether a layer's own forward(), perhaps of a derived class, makes `wanted` of `drawn`."""
    try:
        found = layer.forward(drawn)  # without hooks, which may ask for this
    except Exception:  # the user's code, called with an image alone
        return False
    if not isinstance(found, torch.Tensor) or found.shape != wanted.shape:
        return False
    return torch.allclose(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def origin(thing: Any) -> tuple[str, str]:
    """The module that a class or function was defined in, and its name there."""
    return getattr(thing, "__module__", ""), getattr(thing, "__name__", "")
