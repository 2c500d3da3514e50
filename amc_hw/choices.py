"""What the command line offers, and takes where nothing is said. Its help is made of this alone: neither torch nor a
device is needed for it."""

from __future__ import annotations

DEFAULT_MODEL = "mobilenet_v1_cifar?width=0.25"
DEFAULT_DATA = "digits"
#: Of them `amc_hw.data.DATASETS` has a function each.
DATA_SETS = ("digits", "imagefolder", "cifar10", "npz")
BUDGETS = ("latency_ms", "latency_ratio", "flops_ratio", "params_ratio")
#: In the order of `amc_hw.search.loop.METHODS`, which has a class for each.
METHODS = (
    "ddpg",
    "amc",
    "knapsack",
    "greedy",
    "sensitivity",
    "evolution",
    "random",
    "uniform",
    "shallow",
    "deep",
)
TOLERANCE_PCT, MAX_MINUTES = 4.0, 10.0  #: of `profile`
RUNTIME_OF = {"onnx": "onnxruntime", "tflite": "litert"}  #: what runs an exported file
FORMATS = ("torch", *RUNTIME_OF)
PRECISIONS = ("no", "fp16", "bf16")  #: of `finetune`
USUAL_LR, LAYER_NORM_LR = 0.05, 0.002  #: transformers lose with the one what convolutional networks gain
