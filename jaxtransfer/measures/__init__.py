"""How good predictions are: per class, calibrated or not, by rank; over whole data sets, exactly, or of arrays."""

from jaxtransfer.measures.class_scores import ClassScores, class_scores
from jaxtransfer.measures.classification import classification
from jaxtransfer.measures.label_scores import LabelScores, label_scores
from jaxtransfer.measures.measure import Measure
from jaxtransfer.measures.multilabel import multilabel_classification
from jaxtransfer.measures.pictures import plot_confusion, plot_reliability
from jaxtransfer.measures.ranking import auroc, average_precision
from jaxtransfer.measures.reliability import Reliability

__all__ = [
    "ClassScores",
    "LabelScores",
    "Measure",
    "Reliability",
    "auroc",
    "average_precision",
    "class_scores",
    "classification",
    "label_scores",
    "multilabel_classification",
    "plot_confusion",
    "plot_reliability",
]
