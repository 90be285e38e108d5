"""Weights in and out: somebody's for our models, proven to fit, ours for others, and what images are prepared by."""

from jaxtransfer.pretrained.as_run import count_outputs as count_outputs
from jaxtransfer.pretrained.as_run import run_of as run_of
from jaxtransfer.pretrained.as_run import write_run as write_run
from jaxtransfer.pretrained.export_program import PLATFORMS as PLATFORMS
from jaxtransfer.pretrained.export_program import ExportedProgram as ExportedProgram
from jaxtransfer.pretrained.export_program import export_program as export_program
from jaxtransfer.pretrained.export_weights import DTYPES as DTYPES
from jaxtransfer.pretrained.export_weights import LIBRARIES as LIBRARIES
from jaxtransfer.pretrained.export_weights import ExportedWeights as ExportedWeights
from jaxtransfer.pretrained.export_weights import export_weights as export_weights
from jaxtransfer.pretrained.inventory import Inventory as Inventory
from jaxtransfer.pretrained.inventory import inspect_weights as inspect_weights
from jaxtransfer.pretrained.layouts import Layout as Layout
from jaxtransfer.pretrained.load import Pretrained as Pretrained
from jaxtransfer.pretrained.load import load_pretrained as load_pretrained
from jaxtransfer.pretrained.named import load_named as load_named
from jaxtransfer.pretrained.named import told_network as told_network
from jaxtransfer.pretrained.peft import PeftDelta as PeftDelta
from jaxtransfer.pretrained.peft import load_peft as load_peft
from jaxtransfer.pretrained.peft import save_peft as save_peft
from jaxtransfer.pretrained.preprocessing import Preprocessing as Preprocessing
from jaxtransfer.pretrained.report import WeightsReport as WeightsReport
from jaxtransfer.pretrained.scheme import Rule as Rule
from jaxtransfer.pretrained.scheme import Scheme as Scheme
from jaxtransfer.pretrained.schemes import SCHEMES as SCHEMES
