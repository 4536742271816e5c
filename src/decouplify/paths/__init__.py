"""Calculation paths: record them, keep them on disk, and read a network off them.

``record`` runs a wrapped model and returns a ``PathSet``: per image, which filters were open. A path set answers simple
questions itself (rates, filter states, distances). The functions here explain a network with it: maps, trees, what
single filters tell, what they decide when switched by hand, what changes with training.
"""

from decouplify.paths._results import Result
from decouplify.paths.clustering import Hopkins, hopkins
from decouplify.paths.comparison import BeforeAfter, before_after
from decouplify.paths.contrasts import Contrast, Counterfactual, contrast, counterfactual
from decouplify.paths.costs import macs_of_paths
from decouplify.paths.diff import PathDiff
from decouplify.paths.information import ClassInformation, class_information, class_prototypes
from decouplify.paths.interventions import GateEffect, force, gate_effect, transplant
from decouplify.paths.maps import PathMap, path_map
from decouplify.paths.merging import merge
from decouplify.paths.pathset import GroupRates, LayerSpec, PathSet
from decouplify.paths.pseudo import PseudoThresholds, pseudo_paths, pseudo_thresholds
from decouplify.paths.recording import RunningIdsWarning, record
from decouplify.paths.states import DYNAMIC, ENERGETIC, SILENT, ActivationHistogram, FilterStates, LayerStates
from decouplify.paths.sweeps import Sweep, SweepRun, sweep
from decouplify.paths.tree import DecisionTree, TreeNode, decision_tree

__all__ = [
    "DYNAMIC",
    "ENERGETIC",
    "SILENT",
    "ActivationHistogram",
    "BeforeAfter",
    "ClassInformation",
    "Contrast",
    "Counterfactual",
    "DecisionTree",
    "FilterStates",
    "GateEffect",
    "GroupRates",
    "Hopkins",
    "LayerSpec",
    "LayerStates",
    "PathDiff",
    "PathMap",
    "PathSet",
    "PseudoThresholds",
    "Result",
    "RunningIdsWarning",
    "Sweep",
    "SweepRun",
    "TreeNode",
    "before_after",
    "class_information",
    "class_prototypes",
    "contrast",
    "counterfactual",
    "decision_tree",
    "force",
    "gate_effect",
    "hopkins",
    "macs_of_paths",
    "merge",
    "path_map",
    "pseudo_paths",
    "pseudo_thresholds",
    "record",
    "sweep",
    "transplant",
]
