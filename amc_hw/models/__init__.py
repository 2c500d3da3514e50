"""Models by name: the registry of ours, and how any spec becomes a module with its input shape and normalisation."""

from __future__ import annotations

from amc_hw.models.channel_map import ChannelMap
from amc_hw.models.load import MODELS, LoadedModel, ModelEntry, has_own_weights, load_model

__all__ = ["MODELS", "ChannelMap", "LoadedModel", "ModelEntry", "has_own_weights", "load_model"]
