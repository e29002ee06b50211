"""Pruning for Keras 3: before, during or after training; masks that hold; checked exports."""

from importlib.metadata import version as _version

from tf_prune.batches import class_balanced as class_balanced
from tf_prune.callbacks import ForcePruning as ForcePruning
from tf_prune.callbacks import GraspPruning as GraspPruning
from tf_prune.callbacks import IterativeSnipPruning as IterativeSnipPruning
from tf_prune.callbacks import MagnitudePruning as MagnitudePruning
from tf_prune.callbacks import PruneBeforeTraining as PruneBeforeTraining
from tf_prune.callbacks import RandomPruning as RandomPruning
from tf_prune.callbacks import SnipPruning as SnipPruning
from tf_prune.callbacks import SynflowPruning as SynflowPruning
from tf_prune.criteria import SNIP as SNIP
from tf_prune.criteria import Criterion as Criterion
from tf_prune.criteria import GradientNormPreservation as GradientNormPreservation
from tf_prune.criteria import GraSP as GraSP
from tf_prune.criteria import LossPreservation as LossPreservation
from tf_prune.criteria import Magnitude as Magnitude
from tf_prune.criteria import OptimalBrainDamage as OptimalBrainDamage
from tf_prune.criteria import Random as Random
from tf_prune.criteria import SquaredGradient as SquaredGradient
from tf_prune.criteria import SynapticFlow as SynapticFlow
from tf_prune.enforcement import apply_masks as apply_masks
from tf_prune.enforcement import masks_of as masks_of
from tf_prune.enforcement import remove_masks as remove_masks
from tf_prune.exporting import ExportError as ExportError
from tf_prune.exporting import ExportReport as ExportReport
from tf_prune.exporting import export as export
from tf_prune.masks import Masks as Masks
from tf_prune.masks import masks_from_scores as masks_from_scores
from tf_prune.methods import FORCE as FORCE
from tf_prune.methods import METHODS as METHODS
from tf_prune.methods import GraSPIt as GraSPIt
from tf_prune.methods import Iterative as Iterative
from tf_prune.methods import IterativeSNIP as IterativeSNIP
from tf_prune.methods import SynFlow as SynFlow
from tf_prune.prunable import find_prunable as find_prunable
from tf_prune.pruning import PruningReport as PruningReport
from tf_prune.pruning import prune as prune
from tf_prune.pruning import score as score
from tf_prune.scopes import SCOPES as SCOPES
from tf_prune.scopes import check_sparsity as check_sparsity
from tf_prune.structures import STRUCTURES as STRUCTURES
from tf_prune.structures import Blocks as Blocks
from tf_prune.structures import Hybrid as Hybrid
from tf_prune.structures import InputChannels as InputChannels
from tf_prune.structures import NofM as NofM
from tf_prune.structures import OutputChannels as OutputChannels
from tf_prune.structures import Structure as Structure
from tf_prune.structures import Weights as Weights

__version__ = _version("tf_prune")
