"""Exported files compute what the pruned network does, and nothing is put in place that does not."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amc_hw.errors import FailedError, UserError
from amc_hw.export import FORMATS, export_int8, export_network
from amc_hw.graph import LayerGraph, build_graph
from amc_hw.models import ChannelMap, load_model
from amc_hw.prune import keep_channels, slice_channels
from amc_hw.weights import folded_weights
from profilers.ops import OpGraph

Disk = Callable[[int], AbstractContextManager[None]]

no_litert = importlib.util.find_spec("ai_edge_litert") is None
FORMAT_PARAMS = [
    pytest.param(name, marks=pytest.mark.skipif(name == "tflite" and no_litert, reason="LiteRT is not installed"))
    for name in ("torch", "onnx", "tflite")
]
every_format = pytest.mark.parametrize("file_format", FORMAT_PARAMS)


def randomise(module: nn.Module, *, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                part.weight.normal_(0, (2 / part.weight[0].numel()) ** 0.5, generator=generator)
                if part.bias is not None:
                    part.bias.normal_(0, 0.3, generator=generator)
            elif isinstance(part, nn.BatchNorm2d):
                if part.affine:
                    part.weight.uniform_(0.3, 1.0, generator=generator)
                    part.bias.normal_(0, 0.3, generator=generator)
                part.running_mean.normal_(0, 0.3, generator=generator)
                part.running_var.uniform_(0.5, 2.0, generator=generator)


class Small(nn.Module):
    """An option-A shortcut, a depthwise convolution, a concatenation, pooling, a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12, affine=False)
        self.shortcut = ChannelMap((-1, -1, *range(8), -1, -1), 2)
        self.depthwise, self.bn3 = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12)
        self.left, self.right = nn.Conv2d(12, 5, 1), nn.Conv2d(12, 7, 1)
        self.pool = nn.MaxPool2d(2)
        self.linear = nn.Linear(12 * 3 * 3, 10)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, 12, 12)
        x = F.relu6(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)) + self.shortcut(x))
        x = F.relu(self.bn3(self.depthwise(x)))
        x = self.pool(torch.cat([self.left(x), F.relu(self.right(x))], 1))
        return self.linear(torch.flatten(x, 1))


def images(count: int, *, size: int = 12, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pruned() -> tuple[nn.Module, LayerGraph, list[int]]:
    """The small network with about half of its channels, no two groups alike."""
    net = Small().eval()
    randomise(net)
    graph = build_graph(net, (3, 12, 12))
    widths = [max(1, width // 2 + index % 2) for index, width in enumerate(graph.full_widths)]
    return slice_channels(net, graph, keep_channels(net, graph, widths)), graph, widths


def run(path: Path, file_format: str, batch: Tensor) -> np.ndarray:
    """What a reader of the file gets from it, without any of our code."""
    if file_format == "torch":
        with torch.no_grad():
            return torch.export.load(path).module()(batch).numpy()
    if file_format == "onnx":
        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        (source,) = session.get_inputs()
        assert source.shape == list(batch.shape)
        return session.run(None, {source.name: batch.numpy()})[0]
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path))
    interpreter.allocate_tensors()
    (source,) = interpreter.get_input_details()
    assert source["shape"].tolist() == [batch.shape[0], *batch.shape[2:], batch.shape[1]]
    interpreter.set_tensor(source["index"], np.ascontiguousarray(batch.permute(0, 2, 3, 1).numpy()))
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


@every_format
@pytest.mark.parametrize("batch", [1, 4])
def test_file_computes_what_the_pruned_network_does(pruned, tmp_path: Path, file_format: str, batch: int) -> None:
    net, graph, widths = pruned
    out = tmp_path / "new" / f"net.{file_format}"
    network = graph.op_graph(widths, batch=batch)
    found = export_network(net, graph, network, images(6), file_format=file_format, out=out)
    assert set(found) == {"file", "bytes", "max_abs_diff", "largest", "images"} | (
        {"outputs"} if file_format != "torch" else set()
    )
    assert found["file"] == str(out) and found["bytes"] == out.stat().st_size
    assert 0 <= found["max_abs_diff"] < 1e-4
    other = images(batch, seed=7)  # not those it was checked with
    with torch.no_grad():
        wanted = net(other).numpy()
    np.testing.assert_allclose(run(out, file_format, other), wanted, rtol=0, atol=1e-4)
    assert np.abs(wanted).max() > 0.1
    checked = net(images(6 // batch * batch)).detach()
    assert found["largest"] == pytest.approx(float(checked.abs().max()), rel=1e-5)
    assert [file.name for file in out.parent.iterdir()] == [out.name]


def metadata(path: Path, file_format: str) -> dict[str, Any]:
    """What a file says under "amc-hw"."""
    if file_format == "onnx":
        (value,) = (entry.value for entry in onnx.load(path).metadata_props if entry.key == "amc-hw")
        return json.loads(value)
    if file_format == "torch":
        files = {"amc-hw": ""}
        torch.export.load(io.BytesIO(path.read_bytes()), extra_files=files)
        return json.loads(files["amc-hw"])
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    (buffer,) = (each.buffer for each in model.metadata if each.name in ("amc-hw", b"amc-hw"))
    return json.loads(bytes(model.buffers[buffer].data))


@every_format
def test_a_file_says_what_it_reads_and_replaces_only_its_like(pruned, tmp_path: Path, file_format: str) -> None:
    net, graph, widths = pruned
    out, about = tmp_path / "net", {"model": "nets.py:tiny", "mean": [0.5], "std": [0.25]}
    network = graph.op_graph(widths)

    def export(out: Path, **more: Any) -> None:
        export_network(net, graph, network, images(2), file_format=file_format, out=out, **more)

    export(out, about=about)
    assert metadata(out, file_format) == {"program": "amc-hw", **about}
    before = out.read_bytes()
    export(out)
    assert metadata(out, file_format) == {"program": "amc-hw"} and out.read_bytes() != before
    for text in (b"def make(): ...\n", b"amc-hw"):
        (tmp_path / "mine.py").write_bytes(text)
        with pytest.raises(UserError, match="mine.py is there already, and not of amc-hw: name another --out"):
            export(tmp_path / "mine.py")
        assert (tmp_path / "mine.py").read_bytes() == text
    (tmp_path / "empty").touch()
    export(tmp_path / "empty")


@pytest.mark.parametrize("file_format", FORMAT_PARAMS[1:])
def test_an_int8_file_says_what_it_reads_too(tmp_path: Path, file_format: str) -> None:
    """Of a network with weights that LiteRT's quantizer puts behind the model's own bytes."""
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 512, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    graph, out = build_graph(net.eval(), (3, 12, 12)), tmp_path / "net"
    drawn = torch.randn(12, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    for about in ({"mean": [0.5]}, {"mean": [0.25]}):
        found, running = export_int8(net, graph, graph.op_graph(), drawn, file_format=file_format, out=out, about=about)
        assert metadata(out, file_format) == {"program": "amc-hw", **about}
    with torch.no_grad():
        off, right = running(drawn) - net(drawn), net(drawn)
    assert found["max_abs_diff"] == pytest.approx(float(off.abs().max()), rel=1e-4)
    assert found["largest"] == pytest.approx(float(right.abs().max()), rel=1e-4)
    assert found["rms_diff"] == pytest.approx(
        float(off.square().mean().sqrt() / right.square().mean().sqrt()), rel=1e-3
    )
    assert 0 < found["rms_diff"] < 0.1 and out.stat().st_size == found["bytes"] < 1_000_000


@pytest.mark.parametrize("file_format", FORMAT_PARAMS[1:])
def test_an_int8_file_is_compared_on_other_inputs_than_it_was_calibrated_on(tmp_path: Path, file_format: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten()).eval()
    graph = build_graph(net, (3, 8, 8))
    more = {"file_format": file_format, "out": tmp_path / "net"}
    flattered, _ = export_int8(net, graph, graph.op_graph(), images(12)[..., :8, :8], **more)
    others = 2 * images(7, seed=3)[..., :8, :8]  # beyond the ranges that were seen
    found, running = export_int8(net, graph, graph.op_graph(), images(12)[..., :8, :8], others=others, **more)
    with torch.no_grad():
        off, right = running(others) - net(others), net(others)
    assert found["rms_diff"] == pytest.approx(float(off.norm() / right.norm()), rel=1e-3)
    assert found["rms_diff"] > 3 * flattered["rms_diff"]
    assert [(each["images"], each["calibration_images"]) for each in (flattered, found)] == [(12, 12), (7, 12)]


INT8_LAYERS = {
    "a padded pooling of both signs": nn.Sequential(nn.SiLU(), nn.MaxPool2d(3, 2, 1)),
    "rounded up": nn.Sequential(nn.LeakyReLU(0.1), nn.MaxPool2d(3, 2, ceil_mode=True)),
    "clipped": nn.Hardtanh(-0.5, 1.5),
    "clipped to a unit": nn.Hardtanh(0.0, 1.0),
    "mish": nn.Mish(),
    "softplus": nn.Softplus(),
    "to any size": nn.AdaptiveAvgPool2d(4),
}


@pytest.mark.parametrize("file_format", FORMAT_PARAMS[1:])
@pytest.mark.parametrize("what", INT8_LAYERS)
def test_layers_that_are_several_operators_are_quantized(tmp_path: Path, what: str, file_format: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), INT8_LAYERS[what], nn.Conv2d(8, 4, 1)).eval()
    graph, drawn = build_graph(net, (3, 12, 12)), torch.randn(16, 3, 12, 12)
    found, _ = export_int8(net, graph, graph.op_graph(), drawn, file_format=file_format, out=tmp_path / "net")
    assert 0 < found["rms_diff"] < 0.04


@pytest.mark.parametrize("file_format", FORMAT_PARAMS[1:])
def test_a_network_of_infinite_outputs_is_not_quantized(tmp_path: Path, file_format: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    nn.init.constant_(net[2].weight, float("inf"))
    graph = build_graph(net, (3, 4, 4))
    with pytest.raises(FailedError, match="the network's own outputs are not finite: look at its weights"):
        export_int8(net, graph, graph.op_graph(), images(2)[..., :4, :4], file_format=file_format, out=tmp_path / "net")


@every_format
def test_fewer_images_than_a_batch_are_repeated(pruned, tmp_path: Path, file_format: str) -> None:
    net, graph, widths = pruned
    out = tmp_path / "net"
    export_network(net, graph, graph.op_graph(widths, batch=4), images(3), file_format=file_format, out=out)
    with torch.no_grad():
        np.testing.assert_allclose(run(out, file_format, images(4)), net(images(4)).numpy(), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_torch_file_loads_without_this_package(pruned, tmp_path: Path) -> None:
    net, graph, widths = pruned
    out = tmp_path / "net.pt2"
    export_network(net, graph, graph.op_graph(widths), images(2), file_format="torch", out=out)
    np.save(tmp_path / "x.npy", images(1).numpy())
    code = (
        "import sys; sys.modules['amc_hw'] = sys.modules['profilers'] = None\n"
        "import numpy as np, torch\n"
        "y = torch.export.load('net.pt2').module()(torch.from_numpy(np.load('x.npy')))\n"
        "np.save('y.npy', y.detach().numpy())\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    with torch.no_grad():
        np.testing.assert_allclose(np.load(tmp_path / "y.npy"), net(images(1)).numpy(), rtol=0, atol=1e-5)


def test_no_image_of_the_users_is_in_a_file(pruned, tmp_path: Path) -> None:
    """Programs of torch.export keep the inputs that they were traced with."""
    net, graph, widths = pruned
    given, out = images(32) + 3.0, tmp_path / "net.pt2"
    export_network(net, graph, graph.op_graph(widths), given, file_format="torch", out=out)
    (kept, _) = torch.export.load(out).example_inputs
    assert [part.abs().max().item() for part in kept] == [0.0]
    assert kept[0].untyped_storage().nbytes() == given[:1].numel() * 4
    assert out.stat().st_size < 100_000


def test_what_is_no_file_is_written_to_and_not_replaced(pruned, tmp_path: Path) -> None:
    net, graph, widths = pruned
    pipe, read = tmp_path / "pipe", list[bytes]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    found = export_network(net, graph, graph.op_graph(widths), images(1), file_format="onnx", out=pipe)
    reader.join()
    assert pipe.is_fifo() and len(read[0]) == found["bytes"]


def test_unknown_format_names_the_known_ones(pruned, tmp_path: Path) -> None:
    net, graph, widths = pruned
    with pytest.raises(UserError, match="unknown format 'coreml'; known: torch, onnx, tflite"):
        export_network(net, graph, graph.op_graph(widths), images(1), file_format="coreml", out=tmp_path / "x")
    assert FORMATS == ("torch", "onnx", "tflite") and not list(tmp_path.iterdir())


# What must not be put in place


def other_network() -> tuple[nn.Module, LayerGraph]:
    """A module whose shapes are those of the graph, which has a rectifier that the module lacks."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    randomise(net)
    graph = build_graph(net, (3, 12, 12))
    net[1] = nn.Identity()
    return net, graph


@pytest.mark.parametrize("file_format", FORMAT_PARAMS[1:])
@pytest.mark.parametrize("before", [None, b"the file of yesterday"])
def test_a_file_that_computes_something_else_is_not_written(
    tmp_path: Path, file_format: str, before: bytes | None
) -> None:
    net, graph = other_network()
    out = tmp_path / "net"
    if before is not None:
        out.write_bytes(before)
    with pytest.raises(FailedError, match=f"the {file_format} file's outputs are off by") as caught:
        export_network(net, graph, graph.op_graph(), images(4), file_format=file_format, out=out)
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ([] if before is None else ["net"])
    assert before is None or out.read_bytes() == before


@pytest.mark.parametrize("file_format", FORMAT_PARAMS[1:])
def test_weights_of_other_widths_are_not_written(pruned, tmp_path: Path, file_format: str) -> None:
    net, graph, widths = pruned
    out = tmp_path / "net"
    out.write_bytes(b"the file of yesterday")
    with pytest.raises((FailedError, ValueError), match="weight has shape"):
        export_network(net, graph, graph.op_graph(), images(1), file_format=file_format, out=out)
    assert out.read_bytes() == b"the file of yesterday" and len(list(tmp_path.iterdir())) == 1


def test_differences_count_by_the_largest_output(tmp_path: Path) -> None:
    """Outputs of 10 000 that are off by 1 are within a thousandth of the largest; outputs of 1 are not."""
    net, graph = other_network()
    out = tmp_path / "net.onnx"
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.fill_(-1.0)  # the rectifier of the graph makes 0 of it: a difference of 1 per weight
        net[4].weight.copy_(torch.tensor([[0.25] * 4] * 3))
        net[4].bias.fill_(10_000)
    network = graph.op_graph()
    found = export_network(net, graph, network, images(1), file_format="onnx", out=out)
    assert found["max_abs_diff"] == pytest.approx(1, abs=2e-3)
    with torch.no_grad():
        net[4].bias.fill_(100)
    with pytest.raises(FailedError, match=r"off by 1 \(largest 99\)"):
        export_network(net, graph, network, images(1), file_format="onnx", out=tmp_path / "second.onnx")
    with torch.no_grad():  # outputs of a millionth that are off by a hundredth of it
        net[4].weight.mul_(1e-8)
        net[4].bias.fill_(1e-6)
    with pytest.raises(FailedError, match="off by 1e-08"):
        export_network(net, graph, network, images(1), file_format="onnx", out=tmp_path / "third.onnx")


@every_format
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_network_that_gives_nan_is_not_written(tmp_path: Path, file_format: str, value: float) -> None:
    net, graph = other_network()
    with torch.no_grad():
        net[4].bias[1] = value
        net[0].bias.fill_(100)  # the rectifier that is missing does nothing
    with np.errstate(invalid="ignore"), pytest.raises(FailedError):
        export_network(net, graph, graph.op_graph(), images(2), file_format=file_format, out=tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_places_that_cannot_be_written_leave_what_was_there(pruned, tmp_path: Path, disk_with: Disk) -> None:
    net, graph, widths = pruned
    network, out = graph.op_graph(widths), tmp_path / "net.onnx"
    export_network(net, graph, network, images(1), file_format="onnx", out=out, about={"of": "yesterday"})
    before = out.read_bytes()
    with disk_with(100), pytest.raises(FailedError, match="cannot write .*net.onnx: File too large"):
        export_network(net, graph, network, images(1), file_format="onnx", out=out)
    assert out.read_bytes() == before
    with pytest.raises(FailedError, match="cannot write .*below: Not a directory|cannot write .*below: File exists"):
        export_network(net, graph, network, images(1), file_format="onnx", out=out / "below")
    with pytest.raises(FailedError, match="it is a folder"):
        export_network(net, graph, network, images(1), file_format="onnx", out=tmp_path)


def test_a_full_disk_leaves_no_part_of_a_file(pruned, tmp_path: Path, disk_with: Disk) -> None:
    net, graph, widths = pruned
    with disk_with(100), pytest.raises(FailedError):
        export_network(net, graph, graph.op_graph(widths), images(1), file_format="onnx", out=tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


# Folded weights


def reference(graph: OpGraph, weights: Mapping[str, Mapping[str, np.ndarray]], x: Tensor) -> Tensor:
    """The operators of `graph` with folded weights, by torch.nn.functional: no batch-norm is left."""
    activations = {"none": lambda value: value, "relu": F.relu, "relu6": F.relu6}
    values = {OpGraph.INPUT: x}
    for node in graph.nodes:
        op, source = node.op, values[node.inputs[0]]
        arrays = {name: torch.from_numpy(array) for name, array in weights.get(node.name, {}).items()}
        if op.kind in ("conv", "depthwise_conv"):
            made = F.conv2d(source, arrays["weight"], arrays["bias"], op.stride, op.padding, op.dilation, op.groups)
        elif op.kind == "linear":
            made = F.linear(source.flatten(1), arrays["weight"], arrays["bias"])
        elif op.kind == "channel_map":
            made = torch.zeros(len(x), op.out_channels, *source[0, 0, :: op.stride[0], :: op.stride[1]].shape)
            for position, index in enumerate(arrays["index"].tolist()):
                if index >= 0:
                    made[:, position] = source[:, index, :: op.stride[0], :: op.stride[1]]
        elif op.kind == "add":
            made = source + values[node.inputs[1]]
        elif op.kind == "concat":
            made = torch.cat([values[name] for name in node.inputs], 1)
        elif op.kind == "max_pool":
            made = F.max_pool2d(source, op.kernel, op.stride, op.padding)
        elif op.kind == "global_avg_pool":
            made = source.mean((2, 3))
        else:
            assert op.kind in ("flatten", "activation"), op.kind
            made = source.flatten(1) if op.kind == "flatten" else source
        values[node.name] = activations[op.activation](made)
    (output,) = graph.outputs
    return values[output]


def test_folding_by_hand() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, eps=0.0), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = nn.Sequential(*net, nn.Linear(2, 1, bias=False)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, -2.0]).view(2, 1, 1, 1))
        net[0].bias.copy_(torch.tensor([1.0, 3.0]))
        net[1].weight.copy_(torch.tensor([3.0, 5.0]))
        net[1].bias.copy_(torch.tensor([10.0, 20.0]))
        net[1].running_mean.copy_(torch.tensor([2.0, 4.0]))
        net[1].running_var.copy_(torch.tensor([4.0, 25.0]))
    weights = folded_weights(net, build_graph(net, (1, 2, 2)))
    assert set(weights) == {"0", "4"}
    assert weights["0"]["weight"].ravel().tolist() == [1.5, -2.0]  # w * gamma / sigma
    assert weights["0"]["bias"].tolist() == [8.5, 19.0]  # (b - mean) * gamma / sigma + beta
    assert weights["4"]["bias"].tolist() == [0.0]  # a layer without bias gets zeros
    assert weights["4"]["weight"].tolist() == net[4].weight.tolist()
    assert {array.dtype for layer in weights.values() for array in layer.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("half", [False, True])
def test_resnet20_with_folded_weights_is_resnet20_in_eval_mode(half: bool) -> None:
    loaded = load_model("resnet20")
    randomise(loaded.module)
    graph = build_graph(loaded.module, loaded.input_shape)
    net, widths = loaded.module, list(graph.full_widths)
    if half:
        widths = [width // 2 - index % 3 for index, width in enumerate(widths)]
        net = slice_channels(net, graph, keep_channels(net, graph, widths))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    weights = folded_weights(net, graph)
    maps = {name: arrays["index"].tolist() for name, arrays in weights.items() if "index" in arrays}
    assert set(maps) == {"layer2.0.shortcut", "layer3.0.shortcut"}
    if not half:
        assert maps["layer2.0.shortcut"] == [-1] * 8 + list(range(16)) + [-1] * 8
    x = images(2, size=32)
    with torch.no_grad():
        wanted = net(x)
        found = reference(graph.op_graph(widths), weights, x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_every_kind_of_layer_is_folded(pruned) -> None:
    """Also a batch-norm without weights, and a convolution that has a bias and a batch-norm."""
    net, graph, widths = pruned
    weights = folded_weights(net, graph)
    assert set(weights) == {"conv1", "conv2", "shortcut", "depthwise", "left", "right", "linear"}
    with torch.no_grad():
        wanted = net(images(3))
    torch.testing.assert_close(reference(graph.op_graph(widths), weights, images(3)), wanted, rtol=1e-5, atol=1e-5)


def test_subnormal_weights_are_folded_to_zero() -> None:
    torch.set_flush_denormal(False)  # ONNX Runtime sets it for the thread, where subnormal numbers look like zeros
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Conv2d(3, 1, 1)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1e-39, -1e-37, 0.5]).view(3, 1, 1, 1))
        net[0].bias.fill_(1e-45)
    weights = folded_weights(net, build_graph(net, (1, 2, 2)))["0"]
    assert weights["weight"].ravel().tolist() == [0.0, np.float32(-1e-37), 0.5]
    assert weights["bias"].tolist() == [0.0] * 3


def test_resnet20_exports_with_its_shortcuts(tmp_path: Path) -> None:
    loaded = load_model("resnet20")
    randomise(loaded.module)
    graph = build_graph(loaded.module, loaded.input_shape)
    widths = [width // 2 - index % 3 for index, width in enumerate(graph.full_widths)]
    net = slice_channels(loaded.module, graph, keep_channels(loaded.module, graph, widths))
    for file_format in ("onnx",) if no_litert else ("onnx", "tflite"):
        out = tmp_path / file_format
        export_network(net, graph, graph.op_graph(widths), images(2, size=32), file_format=file_format, out=out)
        with torch.no_grad():
            wanted = net(images(1, size=32, seed=5)).numpy()
        found = run(out, file_format, images(1, size=32, seed=5))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * max(1, np.abs(wanted).max()))


class Heads(nn.Module):
    """Outputs in a dictionary, of which one has the name of another's operator and one that of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.box, self.logits = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 6, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        boxes, logits = self.box(x).mean((2, 3)), self.logits(x)
        return {"logits": boxes, "box": logits, "input": (logits.relu().mean((2, 3)), {"tanh": logits.tanh()})}


@pytest.mark.parametrize("file_format", ["onnx", "tflite"])
def test_outputs_have_the_names_of_the_networks_own_dictionary(tmp_path: Path, file_format: str) -> None:
    torch.manual_seed(0)
    net = Heads().eval()
    graph = build_graph(net, (3, 8, 8))
    images = torch.randn(4, 3, 8, 8)
    out = tmp_path / f"heads.{file_format}"
    found = export_network(net, graph, graph.op_graph(), images, file_format=file_format, out=out)
    assert found["outputs"] == ["logits", "box", "input.0", "input.1.tanh"]
    with torch.no_grad():
        boxes = net(images[:1])["logits"].numpy()
    if file_format == "onnx":
        session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
        assert [output.name for output in session.get_outputs()] == found["outputs"]
        named = session.run(["logits"], {"input": images[:1].numpy()})[0]
    else:
        interpreter = pytest.importorskip("ai_edge_litert.interpreter").Interpreter(str(out))
        signature = interpreter.get_signature_list()["serving_default"]
        assert set(signature["outputs"]) == set(found["outputs"])
        run = interpreter.get_signature_runner("serving_default")
        named = run(**{signature["inputs"][0]: images[:1].permute(0, 2, 3, 1).numpy()})["logits"]
    np.testing.assert_allclose(named.reshape(boxes.shape), boxes, rtol=1e-3, atol=1e-4)


def test_outputs_without_names_keep_those_of_their_operators(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    graph = build_graph(net, (3, 8, 8))
    found = export_network(
        net, graph, graph.op_graph(), torch.randn(1, 3, 8, 8), file_format="onnx", out=tmp_path / "a.onnx"
    )
    assert found["outputs"] == ["2"]
