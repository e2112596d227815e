"""One clip from a caller's arguments to frames and sound."""

from .generation import GenerationResult
from .pipeline import MagiHumanPipeline

__all__ = ["GenerationResult", "MagiHumanPipeline"]
