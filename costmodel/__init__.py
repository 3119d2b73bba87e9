"""What test-time compute costs: shapes, hardware, two cost conventions, calibration, planner, frontiers."""

from ttc.costmodel.costs import KINETICS_INTENSITY, METHODS, Cost, SparseMethod, full, kinetics, kv_reads
from ttc.costmodel.hardware import Figures, Hardware, hardware_names
from ttc.costmodel.parameters import AttentionLayers
from ttc.costmodel.shapes import ModelShape, model_names

__all__ = [
    "KINETICS_INTENSITY",
    "METHODS",
    "AttentionLayers",
    "Cost",
    "Figures",
    "Hardware",
    "ModelShape",
    "SparseMethod",
    "full",
    "hardware_names",
    "kinetics",
    "kv_reads",
    "model_names",
]
