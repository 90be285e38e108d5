"""Source-free and test-time adaptation: a trained model and unlabelled target data, no source at hand."""

from jaxtransfer.adaptation.source_free.normalization import ada_bn, dsbn, norm_parameters
from jaxtransfer.adaptation.source_free.shot import nearest_centroids, shot, shot_labels
from jaxtransfer.adaptation.source_free.t3a import Templates, t3a, t3a_predictions, t3a_templates
from jaxtransfer.adaptation.source_free.tent import tent

__all__ = [
    "Templates",
    "ada_bn",
    "dsbn",
    "nearest_centroids",
    "norm_parameters",
    "shot",
    "shot_labels",
    "t3a",
    "t3a_predictions",
    "t3a_templates",
    "tent",
]
