"""The tensors, constants and operators of a TFLite model, written with LiteRT's schema classes."""

from __future__ import annotations

from typing import Any

import numpy as np

from profilers.errors import UnsupportedOperatorError

SCHEMA_VERSION = 3
SIGNATURE = "serving_default"  #: under which inputs and outputs go by name
#: Kernels read constants in place, with vector loads; the generated classes alone align them to 4 bytes.
CONSTANT_ALIGNMENT = 16
FUSED = {"none": "NONE", "relu": "RELU", "relu6": "RELU6"}
ACTIVATION_OPS = {
    "relu": "RELU",
    "relu6": "RELU6",
    "hardswish": "HARD_SWISH",
    "sigmoid": "LOGISTIC",
    "tanh": "TANH",
    "elu": "ELU",
    "abs": "ABS",
    "exp": "EXP",
}


class _Constant:
    """A buffer of the model whose bytes start at a multiple of CONSTANT_ALIGNMENT; packed like the schema's own."""

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer

    def Pack(self, builder: Any) -> int:
        builder.Prep(CONSTANT_ALIGNMENT, self.buffer.data.nbytes)
        offset: int = self.buffer.Pack(builder)
        return offset


def labelled(model: bytes, key: str, text: str) -> bytes:
    """The model with a text in its metadata."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    found = schema.ModelT.InitFromPackedBuf(model, 0)
    text_bytes = np.frombuffer(text.encode(), np.uint8)
    metadata = schema.MetadataT(key, len(found.buffers))
    found.metadata = [*(found.metadata or []), metadata]
    buffers = [*found.buffers, schema.BufferT(text_bytes)]
    found.buffers = [each if each.data is None else _Constant(each) for each in buffers]
    builder = flatbuffers.Builder(len(model) + len(text_bytes) + 1024)
    builder.Finish(found.Pack(builder), file_identifier=b"TFL3")
    return bytes(memoryview(builder.Bytes)[builder.Head() :])


class Writer:
    """Adds to a model, by name; knows the schema, not the networks."""

    def __init__(self, schema: Any) -> None:
        self.schema = schema
        self.tensors: list[Any] = []
        self.buffers: list[Any] = [schema.BufferT()]  # buffer 0 is empty: that of all tensors computed at run time
        self.operators: list[Any] = []
        self.codes: dict[tuple[int, int], int] = {}  # (builtin operator, version) -> index
        self.index: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.constant_bytes = 0

    @property
    def size_bytes(self) -> int:
        """About the size of the model, from above; a builder that starts smaller copies itself as it grows."""
        return self.constant_bytes + 512 * (len(self.tensors) + len(self.operators) + 2)

    def tensor(self, name: str, shape: tuple[int, ...], *, dtype: str = "FLOAT32", buffer: int = 0) -> str:
        if name in self.index:
            raise ValueError(f"two tensors are named {name!r}; give every node a name of its own")
        self.index[name] = len(self.tensors)
        self.shapes[name] = shape
        code = getattr(self.schema.TensorType, dtype)
        self.tensors.append(self.schema.TensorT(list(shape), code, buffer, name, hasRank=True))
        return name

    def constant(self, name: str, array: np.ndarray, *, dtype: str = "FLOAT32") -> str:
        data = np.ascontiguousarray(array, dtype="<i4" if dtype == "INT32" else "<f4").reshape(-1).view(np.uint8)
        self.buffers.append(_Constant(self.schema.BufferT(data)))
        self.constant_bytes += data.nbytes + CONSTANT_ALIGNMENT
        return self.tensor(name, array.shape, dtype=dtype, buffer=len(self.buffers) - 1)

    def operator(
        self,
        code: str,
        inputs: list[str],
        output: str,
        shape: tuple[int, ...],
        *,
        version: int = 1,
        options: tuple[str, dict[str, Any]] | None = None,
    ) -> str:
        """Adds an operator whose output becomes the tensor `output`; `options` are a schema table and its fields."""
        operator = self.schema.OperatorT(
            opcodeIndex=self.codes.setdefault((getattr(self.schema.BuiltinOperator, code), version), len(self.codes)),
            inputs=[self.index[name] for name in inputs],
            outputs=[self.index[self.tensor(output, shape)]],
        )
        if options is not None:
            table, values = options
            operator.builtinOptionsType = getattr(self.schema.BuiltinOptions, table)
            operator.builtinOptions = getattr(self.schema, f"{table}T")(**values)
        self.operators.append(operator)
        return output

    def reshape(self, source: str, output: str, shape: tuple[int, ...]) -> str:
        wanted = self.constant(f"{output}/shape", np.array(shape), dtype="INT32")
        options = ("ReshapeOptions", {"newShape": shape})
        return self.operator("RESHAPE", [source, wanted], output, shape, options=options)

    def cut(self, source: str, output: str, begin: tuple[int, ...], shape: tuple[int, ...]) -> str:
        """What lies at `begin` and is of `shape`."""
        where = [("begin", begin), ("extent", shape)]
        constants = [self.constant(f"{output}/{key}", np.array(value), dtype="INT32") for key, value in where]
        return self.operator("SLICE", [source, *constants], output, shape)

    def transpose(self, source: str, output: str, order: tuple[int, ...]) -> str:
        places = self.constant(f"{output}/order", np.array(order), dtype="INT32")
        shape = tuple(self.shapes[source][place] for place in order)
        return self.operator("TRANSPOSE", [source, places], output, shape)

    def turned(self, source: str, output: str, groups: int) -> str:
        """The channels of an image, (groups, each), in the order (each, groups)."""
        *image, channels = self.shapes[source]
        each = channels // groups
        apart = self.reshape(source, f"{output}/apart", (*image, groups, each))
        swapped = self.transpose(apart, f"{output}/swapped", (0, 1, 2, 4, 3))
        return self.reshape(swapped, output, (*image, channels))

    def activation(self, activation: str, source: str, output: str) -> str:
        """An activation as operators of its own."""
        shape = self.shapes[source]
        if activation in ("gelu", "gelu_tanh"):
            options = ("GeluOptions", {"approximate": activation == "gelu_tanh"})
            return self.operator("GELU", [source], output, shape, options=options)
        if activation in ACTIVATION_OPS:
            return self.operator(ACTIVATION_OPS[activation], [source], output, shape)
        if activation == "silu":
            gate = self.operator("LOGISTIC", [source], f"{output}/gate", shape)
            return self.operator("MUL", [source, gate], output, shape, options=self.fusing("MulOptions", "none"))
        if activation == "softplus":
            return self._softplus(source, output)
        if activation == "mish":
            gate = self.operator("TANH", [self._softplus(source, f"{output}/softplus")], f"{output}/gate", shape)
            return self.operator("MUL", [source, gate], output, shape, options=self.fusing("MulOptions", "none"))
        if activation == "hardsigmoid":  # relu6(x + 3) / 6
            three = self.constant(f"{output}/three", np.array([3.0]))
            sixth = self.constant(f"{output}/sixth", np.array([1.0 / 6.0]))
            options = self.fusing("AddOptions", "relu6")
            sixfold = self.operator("ADD", [source, three], f"{output}/sixfold", shape, options=options)
            return self.operator("MUL", [sixfold, sixth], output, shape, options=self.fusing("MulOptions", "none"))
        raise UnsupportedOperatorError(f"{output}: {activation!r} is not an activation that can stand alone")

    def _softplus(self, source: str, output: str) -> str:
        """log(1 + exp(x)), as relu(x) + log(1 + exp(-|x|)): that overflows nowhere."""
        shape, one = self.shapes[source], self.constant(f"{output}/one", np.array([1.0]))
        found = source
        for code in ("ABS", "NEG", "EXP"):
            found = self.operator(code, [found], f"{output}/{code.lower()}", shape)
        options = self.fusing("AddOptions", "none")
        found = self.operator("ADD", [found, one], f"{output}/plus", shape, options=options)
        logarithm = self.operator("LOG", [found], f"{output}/log", shape)
        above = self.operator("RELU", [source], f"{output}/relu", shape)
        return self.operator("ADD", [above, logarithm], output, shape, options=options)

    def fusing(self, table: str, activation: str, **values: Any) -> tuple[str, dict[str, Any]]:
        """Options of an operator that also computes `activation`."""
        code = getattr(self.schema.ActivationFunctionType, FUSED[activation])
        return table, {"fusedActivationFunction": code, **values}

    def model(self, inputs: list[str], outputs: tuple[str, ...]) -> Any:
        schema = self.schema
        # Runtimes older than schema 3a read only the first field of a code, which is one byte.
        codes = [schema.OperatorCodeT(min(code, 127), None, version, code) for code, version in self.codes]
        ends = [[self.index[name] for name in names] for names in (inputs, outputs)]
        subgraph = schema.SubGraphT(self.tensors, *ends, self.operators, "network")
        maps = [[schema.TensorMapT(name, self.index[name]) for name in names] for names in (inputs, outputs)]
        signature = schema.SignatureDefT(*maps, SIGNATURE, 0)
        return schema.ModelT(SCHEMA_VERSION, codes, [subgraph], "amc-hw", self.buffers, signatureDefs=[signature])
