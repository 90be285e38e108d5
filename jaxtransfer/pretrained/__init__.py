"""Somebody's weights for our models: read, translated, proven to fit, with what their images were prepared by."""

from jaxtransfer.pretrained.as_run import count_outputs as count_outputs
from jaxtransfer.pretrained.as_run import run_of as run_of
from jaxtransfer.pretrained.as_run import write_run as write_run
from jaxtransfer.pretrained.load import Pretrained as Pretrained
from jaxtransfer.pretrained.load import load_pretrained as load_pretrained
from jaxtransfer.pretrained.named import load_named as load_named
from jaxtransfer.pretrained.named import told_network as told_network
from jaxtransfer.pretrained.preprocessing import Preprocessing as Preprocessing
from jaxtransfer.pretrained.report import WeightsReport as WeightsReport
from jaxtransfer.pretrained.scheme import Rule as Rule
from jaxtransfer.pretrained.scheme import Scheme as Scheme
from jaxtransfer.pretrained.schemes import SCHEMES as SCHEMES
