"""Networks that read signals (N, C, L), sequences (N, L, C) or vectors (N, C): images of one row, tokens, and rows."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import FORMATS, Call, Net, frozen_of, half_and_exported, kinds
from torch import Tensor, nn
from torch.nn import functional as F

from amc_hw.errors import UnsupportedOperatorError, UserError
from amc_hw.export import export_int8
from amc_hw.graph import build_graph
from amc_hw.models import load_model
from amc_hw.subject import load_graph


class Chomp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :-4].contiguous()


class Causal(nn.Conv1d):
    """Sees nothing that comes later."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.dilation[0] * (self.kernel_size[0] - 1), 0)))


class Reversed(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(2))


def around(into: int, between: nn.Module, out: int | None = None, *, norm: bool = True) -> nn.Module:
    """Something between two convolutions of 8 channels. out: that it gives."""
    norms = [nn.BatchNorm1d(8)] if norm else []
    return nn.Sequential(nn.Conv1d(into, 8, 3), *norms, nn.ReLU(), between, nn.Conv1d(out or 8, 4, 1))


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Conv1d(8, 2, 1), nn.ReLU(), nn.Conv1d(2, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.gate(x))


BETWEEN = {
    "depthwise": (nn.Conv1d(8, 8, 5, padding=2, groups=8), ["depthwise_conv"]),
    "in groups": (nn.Conv1d(8, 8, 3, groups=4), ["grouped_conv"]),
    "dilated": (nn.Conv1d(8, 8, 3, dilation=4, padding="same"), ["conv"]),
    "causal": (Causal(8, 8, 3, dilation=2), ["conv"]),
    "zeros in front": (nn.Sequential(nn.ConstantPad1d((2, 0), 0.0), nn.Conv1d(8, 8, 3)), ["conv"]),
    "zeros of its own": (Call(lambda x: F.relu(F.pad(x, (1, 2)) - 1)), ["pad", "add_scalar"]),
    "chomped": (nn.Sequential(nn.Conv1d(8, 8, 3, padding=4, dilation=2), Chomp()), ["conv", "crop"]),
    "transposed": (nn.ConvTranspose1d(8, 8, 4, stride=2, padding=1), ["conv_transpose"]),
    "one more": (nn.ConvTranspose1d(8, 8, 3, stride=2, padding=1, output_padding=1), ["conv_transpose"]),
    "largest": (nn.MaxPool1d(3, 2, 1), ["max_pool"]),
    "mean": (nn.AvgPool1d(2), ["avg_pool"]),
    "functions": (Call(lambda x: F.avg_pool1d(F.max_pool1d(x, 3, stride=1), 2)), ["max_pool", "avg_pool"]),
    "adaptive": (nn.AdaptiveMaxPool1d(7), ["max_pool"]),
    "adaptive mean": (Call(lambda x: F.adaptive_avg_pool1d(x, 7)), ["avg_pool"]),
    "nearest": (nn.Upsample(scale_factor=2), ["upsample_nearest"]),
    "linear": (Call(lambda x: F.interpolate(x, scale_factor=3, mode="linear")), ["upsample_bilinear"]),
    "by a half more": (nn.Upsample(scale_factor=1.5, mode="linear"), ["upsample_bilinear"]),
    "normalised": (nn.InstanceNorm1d(8, affine=True), ["instance_norm"]),
    "sloped": (nn.PReLU(8), ["prelu"]),
    "dropped": (nn.Dropout1d(0.5), []),
    "gated": (Gate(), ["global_avg_pool", "conv", "conv", "scale"]),
    "with the input": (Call(lambda x: torch.cat([x, x], 1)), ["concat"]),
}


@pytest.mark.parametrize("what", BETWEEN)
def test_what_is_between_two_convolutions_of_signals(tmp_path: Path, what: str) -> None:
    between, wanted = BETWEEN[what]
    net = around(2, between, 16 if what == "with the input" else None)
    graph = half_and_exported(net, torch.randn(8, 2, 30), tmp_path)
    assert kinds(graph) == ["conv", *wanted, "conv"]
    assert graph.input_shape == (2, 1, 30) and graph.op_graph().ops[0].kernel == (1, 3)
    assert "0" in {group.name for group in graph.groups} and set(frozen_of(graph)) == {"4"}


def test_macs_are_those_of_the_signal() -> None:
    graph = build_graph(nn.Sequential(nn.Conv1d(2, 8, 5, stride=2), nn.Conv1d(8, 4, 1)).eval(), (2, 31))
    assert graph.macs() == 14 * (2 * 8 * 5 + 8 * 4)


ENDS = {
    "mean": lambda x: x.mean(-1),
    "pooled": lambda x: F.adaptive_avg_pool1d(x, 1).squeeze(-1),
    "averaged": lambda x: torch.flatten(F.avg_pool1d(x, x.shape[-1]), 1),
    "largest": lambda x: x.amax(2),
    "first of two": lambda x: torch.max(x, 2)[0],
    "by name": lambda x: x.max(dim=2, keepdim=True).values.flatten(1),
    "last": lambda x: x[:, :, -1],
    "all": lambda x: torch.flatten(x, 1),
}


@pytest.mark.parametrize("end", ENDS)
def test_how_a_signal_becomes_a_vector(tmp_path: Path, end: str) -> None:
    length = 9 if end == "all" else 1
    net = Net(
        lambda net, x: net.b(ENDS[end](F.relu(net.a(x)))), a=nn.Conv1d(3, 8, 4, padding=1), b=nn.Linear(8 * length, 5)
    )
    graph = half_and_exported(net, torch.randn(8, 3, 10), tmp_path)
    assert [group.name for group in graph.groups] == ["a"]


def test_a_temporal_network_reads_a_sequence(tmp_path: Path) -> None:
    """Bai, Kolter and Koltun, 2018: dilated causal convolutions with shortcuts; its input is (N, L, C)."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x.transpose(1, 2))
        x = F.relu(net.b(F.relu(net.a(x))) + x)
        return net.head(x[:, :, -1])

    parts = dict(stem=Causal(5, 12, 2), a=Causal(12, 12, 2, dilation=2), b=Causal(12, 12, 2, dilation=4))
    graph = half_and_exported(Net(forward, **parts, head=nn.Linear(12, 3)), torch.randn(8, 20, 5), tmp_path)
    assert graph.input_shape == (20, 5)
    assert [(group.name, group.width) for group in graph.groups] == [("stem", 12), ("a", 12)]


def test_an_output_for_every_step_is_a_sequence(tmp_path: Path) -> None:
    net = Net(
        lambda net, x: net.head(F.relu(net.a(x)).permute(0, 2, 1)),
        a=nn.Conv1d(4, 8, 3, padding=1),
        head=nn.Linear(8, 3),
    )
    assert net(torch.zeros(2, 4, 20)).shape == (2, 20, 3)
    graph = half_and_exported(net, torch.randn(8, 4, 20), tmp_path)
    assert kinds(graph) == ["conv", "to_tokens", "linear"]


def test_an_encoder_of_sequences(tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True)
    parts = dict(embed=nn.Linear(5, 16), encoder=nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))
    net = Net(lambda net, x: net.head(net.encoder(net.embed(x)).mean(1)), **parts, head=nn.Linear(16, 3))
    graph = half_and_exported(net, torch.randn(8, 12, 5), tmp_path)
    assert [(group.name, group.width) for group in graph.groups] == [("encoder.layers.0.linear1", 32)]


def test_a_perceptron(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
    graph = half_and_exported(net, torch.randn(16, 6), tmp_path)
    assert graph.input_shape == (6,) and kinds(graph) == ["linear"] * 3
    assert [(group.name, group.width) for group in graph.groups] == [("0", 16), ("3", 12)]


@pytest.mark.parametrize(("shape", "wanted"), [((24,), (1, 1, 24)), ((12, 10), (1, 12, 10))])
def test_a_channel_that_the_network_itself_puts_in(tmp_path: Path, shape: tuple[int, ...], wanted: tuple) -> None:
    """A waveform (N, L), or the bands of a spectrogram (N, H, W)."""
    conv, last = (nn.Conv1d, 2) if len(shape) == 1 else (nn.Conv2d, (2, 3))
    for put in (lambda x: x.unsqueeze(1), lambda x: x[:, None]):
        net = Net(lambda net, x, put=put: net.b(F.relu(net.a(put(x))).mean(last)), a=conv(1, 8, 3), b=nn.Linear(8, 3))
        graph = half_and_exported(net, torch.randn(8, *shape), tmp_path)
        assert graph.input_shape == wanted and [group.name for group in graph.groups] == ["a"]


class Normalised(nn.Module):
    """By buffers of its own, along the last axis or the first."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("mu", torch.randn(shape))
        self.register_buffer("sigma", torch.rand(shape) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mu) / self.sigma


def test_a_sequence_that_the_network_normalises_itself(tmp_path: Path) -> None:
    net = Net(
        lambda net, x: net.b(F.elu(net.a(net.norm(x).transpose(1, 2))).mean(2)),
        norm=Normalised((5,)),
        a=nn.Conv1d(5, 8, 3),
        b=nn.Linear(8, 3),
    )
    graph = half_and_exported(net, torch.randn(8, 20, 5), tmp_path)
    assert graph.input_shape == (20, 5) and kinds(graph)[:2] == ["add_map", "affine"]
    assert [group.name for group in graph.groups] == ["a"]


def test_a_signal_that_the_network_normalises_itself(tmp_path: Path) -> None:
    parts = dict(norm=Normalised((5, 1)), a=nn.Conv1d(5, 8, 3), act=nn.ELU(), b=nn.Conv1d(8, 3, 1))
    graph = half_and_exported(
        Net(lambda net, x: net.b(net.act(net.a(net.norm(x)))), **parts), torch.randn(8, 5, 20), tmp_path
    )
    assert graph.input_shape == (5, 1, 20) and kinds(graph) == ["add_map", "affine", "conv", "conv"]


def test_what_nothing_is_made_of_is_in_no_file_and_goes_on_running(tmp_path: Path) -> None:
    """The last block of a WaveNet has a convolution whose output nothing reads; of tuples one part is used."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        net.unused(x)
        x.std(2)
        values, _places = net.b(x).max(dim=2)
        return values

    parts = dict(a=nn.Conv1d(2, 8, 3), unused=nn.Conv1d(8, 6, 1), b=nn.Conv1d(8, 4, 1))
    graph = half_and_exported(Net(forward, **parts), torch.randn(8, 2, 30), tmp_path)
    assert frozen_of(graph)["a"] == "read by std, of which nothing is used"  # what reads it is not understood

    def without(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        net.unused(x)
        return net.b(x).max(dim=2)[0]

    graph = half_and_exported(Net(without, **parts), torch.randn(8, 2, 30), tmp_path)
    assert kinds(graph) == ["conv", "conv", "max_pool", "flatten"]
    assert [(group.name, set(group.modules("consumer"))) for group in graph.groups] == [("a", {"b", "unused"})]


def test_attention_whose_weights_nothing_reads(tmp_path: Path) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y, _ = net.attention(x, x, x)
        return net.head(net.mlp(x + y).mean(1))

    mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    parts = dict(attention=nn.MultiheadAttention(8, 2, batch_first=True), mlp=mlp, head=nn.Linear(8, 3))
    graph = half_and_exported(Net(forward, **parts), torch.randn(8, 12, 8), tmp_path)
    assert [(group.name, group.width) for group in graph.groups] == [("mlp.0", 16), ("mlp.2", 8)]


def test_waves_gated_in_halves(tmp_path: Path) -> None:
    """WaveNet's block, and the gated linear unit, which is the same without the tangent."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x)
        filtered, gate = net.a(x).chunk(2, 1)
        x = x + net.b(torch.tanh(filtered) * torch.sigmoid(gate))
        x = x + net.d(F.glu(net.c(x), dim=1))
        return net.head(net.gate(net.e(x))).mean(2)

    parts = dict(stem=nn.Conv1d(1, 8, 2), a=Causal(8, 16, 2), b=nn.Conv1d(8, 8, 1), c=Causal(8, 12, 2, dilation=2))
    parts |= dict(d=nn.Conv1d(6, 8, 1), e=nn.Conv1d(8, 20, 1), gate=nn.GLU(1), head=nn.Conv1d(10, 3, 1))
    graph = half_and_exported(Net(forward, **parts), torch.randn(8, 1, 40), tmp_path)
    assert {(group.name, group.width) for group in graph.groups} == {("stem", 8), ("a", 8), ("c", 6), ("e", 10)}


@pytest.mark.parametrize("call", [lambda x: F.glu(x), lambda x: F.glu(x, -1), lambda x: F.glu(input=x, dim=1)])
def test_a_gate_of_vectors(tmp_path: Path, call) -> None:
    net = Net(lambda net, x: net.b(call(net.a(x))), a=nn.Linear(6, 16), b=nn.Linear(8, 3))
    graph = half_and_exported(net, torch.randn(16, 6), tmp_path)
    assert [(group.name, group.width) for group in graph.groups] == [("a", 8)]


REFUSED = {
    "reversed": (around(2, Reversed(8, 8, 3)), (2, 30), "computes something else than a convolution"),
    "circular": (around(2, nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular")), (2, 30), "only zero padding"),
    "one image": (nn.Sequential(nn.Conv2d(1, 4, 3)), (10, 30), "a Conv2d of what is no image"),
    "channels and samples padded": (around(2, Call(lambda x: F.pad(x, (1, 0, 1, 1))), 10), (2, 30), "operator pad"),
    "indices": (around(2, Call(lambda x: torch.max(x, 2)[1].float().unsqueeze(2))), (2, 30), "getitem"),
    "over channels": (around(2, Call(lambda x: x * x.sum(1, keepdim=True))), (2, 30), "operator sum"),
    "a single number": (
        nn.Sequential(nn.Flatten(), nn.Linear(60, 1), nn.Flatten(0)),
        (2, 30),
        r"\(1,\): return \(N, 1\)",
    ),
    "recurrent": (Net(lambda net, x: net.a(x)[0], a=nn.GRU(5, 8, batch_first=True)), (20, 5), "GRU"),
    "no channels first": (
        nn.Sequential(nn.Conv1d(3, 8, 1), Call(lambda x: x.transpose(1, 2)), nn.Conv1d(10, 4, 1)),
        (3, 10),
        "Conv1d",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_operator_of_a_signal_is_refused(what: str) -> None:
    net, shape, told = REFUSED[what]
    with pytest.raises(UnsupportedOperatorError, match=told):
        build_graph(net.eval(), shape)


def test_what_an_input_shape_may_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(
        "from torch import nn\n"
        "def signal(): return nn.Sequential(nn.Conv1d(2, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 1))\n"
        "def vector(): return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))\n"
    )
    for given in ((2, 30), (1, 2, 30)):  # the latter with a batch of one
        loaded, graph = load_graph("nets.py:signal", input_shape=given)
        assert loaded.input_shape == (2, 30) and graph.input_shape == (2, 1, 30)
    assert load_model("nets.py:vector", input_shape=(6,)).input_shape == (6,)
    with pytest.raises(UserError, match="does not take input 1x3x30"):
        load_model("nets.py:signal", input_shape=(3, 30))


def test_a_signal_is_normalised_by_channel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text("from torch import nn\ndef make(): return nn.Conv1d(3, 8, 3)\n")
    loaded = load_model("nets.py:make", input_shape=(3, 30))
    assert (loaded.mean, loaded.std) == ((0.0,), (1.0,))  # ImageNet's are of images
    loaded = load_model("nets.py:make", input_shape=(3, 30), mean=(1.0, 2.0, 3.0), std=(2.0,))
    found = loaded.normalised(torch.ones(2, 3, 30))
    torch.testing.assert_close(found[0, :, 0], torch.tensor([0.0, -0.5, -1.0]))
    Path("tcn.py").write_text("from torch import nn\ndef make(): return nn.Linear(3, 8)\n")
    sequence = load_model("tcn.py:make", input_shape=(30, 3), mean=(1.0, 2.0, 3.0), std=(2.0,))
    torch.testing.assert_close(sequence.normalised(torch.ones(2, 30, 3))[0, 5], torch.tensor([0.0, -0.5, -1.0]))
    with pytest.raises(UserError, match="mean must have 1 or 3 or 30 finite values"):
        load_model("tcn.py:make", input_shape=(30, 3), mean=(1.0, 2.0))


@pytest.mark.parametrize("file_format", FORMATS)
def test_an_int8_file_reads_a_signal(tmp_path: Path, file_format: str) -> None:
    net = around(2, nn.MaxPool1d(2)).eval()
    graph, x = build_graph(net, (2, 30)), torch.randn(16, 2, 30)
    found, running = export_int8(net, graph, graph.op_graph(), x, file_format=file_format, out=tmp_path / "signal")
    assert found["rms_diff"] < 0.05
    assert running(x).shape == net(x).shape == (16, 4, 14)


TASK = """
import torch
from torch import nn

def make():
    net = nn.Sequential(
        nn.Conv1d(2, 16, 5, padding=2), nn.BatchNorm1d(16), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(16, 16, 5, padding=2), nn.BatchNorm1d(16), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
        nn.Linear(16, 3),
    )
    net.input_shape, net.mean, net.std = (2, 32), (0.1, -0.1), (2.0, 2.0)
    return net
"""


def write_task(folder: Path) -> None:
    """Waves of three frequencies; a network that tells them apart."""
    rng, time = np.random.default_rng(0), np.arange(32)
    labels = rng.integers(0, 3, 600)
    phase = rng.uniform(0, 2 * math.pi, (600, 2, 1))
    waves = 3 * np.sin(time * (0.4 + 0.5 * labels[:, None, None]) + phase) + rng.normal(0, 1, (600, 2, 32))
    x, y = waves.astype(np.float32), labels
    np.savez(folder / "waves.npz", x_train=x[:400], y_train=y[:400], x_test=x[400:], y_test=y[400:])
    (folder / "nets.py").write_text(TASK)
    torch.manual_seed(0)
    found: dict = {}
    exec(TASK, found)
    net, mean = found["make"](), torch.tensor([0.1, -0.1])[:, None]
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    inputs, targets = (torch.from_numpy(x[:400]) - mean) / 2, torch.from_numpy(y[:400])
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(net(inputs), targets).backward()
        optimizer.step()
    torch.save(net.state_dict(), folder / "w.pt")


@pytest.mark.slow
def test_from_signals_to_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amc_hw) -> None:
    monkeypatch.chdir(tmp_path)
    write_task(tmp_path)
    network = ["--model", "nets.py:make", "--checkpoint", "w.pt", "--data", "npz:waves.npz"]
    assert amc_hw("init", "--device", "fake", *network).code == 0
    checked = json.loads(amc_hw("check", "--json").out)
    assert checked["accuracy"] > 0.9
    assert amc_hw("profile").code == 0
    done = amc_hw(
        "search", "--latency-ratio", "0.85", "--method", "knapsack", "--episodes", "10", "--out", "run", "--json"
    )
    assert done.code == 0, done.err
    assert json.loads(done.out)["speedup"] > 1.1
    assert json.loads(Path("run/policy.json").read_text())["input_shape"] == [2, 32]
    for file_format in FORMATS:
        done = amc_hw("export", "--policy", "run", "--format", file_format, "--out", f"small.{file_format}", "--json")
        shape = [1, 2, 1, 32] if file_format == "onnx" else [1, 1, 32, 2]
        assert json.loads(done.out)["inputs"] == {"input": shape}
        told = amc_hw("export", "--policy", "run", "--format", file_format, "--out", f"small.{file_format}").out
        assert f"it reads (x - mean) / std of inputs x, as {'x'.join(map(str, shape))}, channels" in told
    done = amc_hw("export", "--policy", "run", "--format", "torch", "--out", "small.pt2", "--json")
    assert json.loads(done.out)["inputs"] == {"input": [1, 2, 32]}
    assert "--flip mirrors images" in amc_hw("finetune", "--policy", "run", "--flip").mistake
    done = amc_hw("finetune", "--policy", "run", "--epochs", "2", "--batch", "64", "--json")
    assert json.loads(done.out)["accuracy_after"] > 0.85
    assert amc_hw("measure", "--policy", "run-finetuned").code == 0


def test_data_that_are_not_what_the_network_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amc_hw) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(TASK)
    arguments = ["check", "--device", "fake", "--model", "nets.py:make", "--data"]
    told = amc_hw(*arguments, "digits").mistake
    assert "digits gives images, the model takes 2x32: give npz:PATH, or a data set of your own" in told
    x, y = np.zeros((40, 2, 32), np.float32), np.zeros(40, int)
    for wrong, why in (
        (x[:, :1], "inputs are 1x32, the model takes 2x32"),
        (x.astype(np.uint8), "inputs must be floats, not uint8"),
        (np.where(np.arange(32) == 3, np.nan, x), "there are inputs that are not finite"),
    ):
        np.savez("wrong.npz", x_train=wrong, y_train=y, x_test=wrong, y_test=y)
        done = amc_hw(*arguments, "npz:wrong.npz")
        assert (done.code, why in done.mistake) == (2, True), done.err
