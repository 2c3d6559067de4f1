"""The pictures of a report. Each takes the results; returns a figure, or None where there is nothing to show."""

from transformer_vq.studies.figures.common import MOST_LINES
from transformer_vq.studies.figures.emergence import emerged
from transformer_vq.studies.figures.forest import forest
from transformer_vq.studies.figures.lines import curves, lines
from transformer_vq.studies.figures.maps import grid_map, health_map, layer_map

__all__ = ["MOST_LINES", "curves", "emerged", "forest", "grid_map", "health_map", "layer_map", "lines"]
